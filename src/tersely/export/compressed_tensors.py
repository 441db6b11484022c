"""compressed-tensors `pack-quantized`: integer weights that plain transformers and vLLM load.

Names, dtypes, shapes and config keys are those that llm-compressor 0.14 writes for the same scheme.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from tersely.errors import UsageError
from tersely.graph import Graph, Weight
from tersely.methods import Encode


def check(graph: Graph, methods: Mapping[str, Encode]) -> None:
    """UsageError where the format cannot say what the methods will do."""
    for name in methods:
        weight = graph.weight(name)
        if weight.transposed:
            raise UsageError(
                f"{name} is stored as (inputs, outputs), as Conv1D layers are; compressed-tensors holds "
                "only linear layers. Use --format dense: an ordinary checkpoint of the same size with the "
                "compressed values"
            )
        if weight.leaf != "weight" or not name.endswith(".weight"):
            raise UsageError(f"{name} is not the weight of a linear layer; compressed-tensors cannot hold it")
    schemes = {repr(_weights(method)) for method in methods.values()}
    if len(schemes) > 1 and not all(method.symmetric for method in methods.values()):
        raise UsageError(
            "transformers cannot load a checkpoint of several schemes of which one is asymmetric; use "
            "--set symmetric=true, one scheme for all weights, or --format dense"
        )
    if len(schemes) > 1 and graph.family.decoded:
        raise UsageError(
            f"transformers decodes a {graph.model_type} model while it loads it, and that with one scheme only; "
            "use one scheme for all weights, or --format dense"
        )
    experts = [w.name for w in graph.weights if w.expert is not None and w.kind == "linear"]
    alike = {repr(_weights(methods[n])) if n in methods and methods[n].symmetric else n for n in experts}
    if len(alike) > 1:
        raise UsageError(
            "transformers loads the experts of a compressed checkpoint only if all of them are compressed in the "
            "same way, on symmetric grids; let one symmetric step select `experts`, or use --format dense"
        )


def quantization_config(graph: Graph, methods: Mapping[str, Encode]) -> dict[str, Any]:
    """The `quantization_config` of config.json: one group per scheme, and all other linear layers ignored."""
    schemes: dict[str, tuple[dict[str, Any], list[Weight]]] = {}
    for name, method in methods.items():
        scheme = _weights(method)
        schemes.setdefault(repr(scheme), (scheme, []))[1].append(graph.weight(name))
    linear = [w for w in graph.weights if w.kind == "linear" and not w.transposed]
    groups = {}
    for number, (scheme, weights) in enumerate(schemes.values()):
        targets = ["Linear"] if len(schemes) == 1 else _targets(weights, linear)
        groups[f"group_{number}"] = {
            "format": "pack-quantized",
            "input_activations": None,
            "output_activations": None,
            "targets": targets,
            "weights": scheme,
        }
    loaded = {
        piece.weight.name: f"{unit}.{name}".lstrip(".")
        for unit in ("", *graph.units)
        for name, pieces in graph.parameters(unit).items()
        for piece in pieces
        if len(pieces) == 1 and piece.index is None
    }
    ignored = [w.name.removesuffix(".weight") for w in linear if w.name not in methods]
    if graph.head is None:
        ignored += graph.family.heads
        ignored += [
            p.removesuffix(".weight")
            for p, path in graph.family.memory.get("", {}).items()
            if path in graph.family.heads
        ]
    # Engines go by the stored names, transformers by those that it has in memory.
    renamed = [loaded.get(w.name, w.name).removesuffix(".weight") for w in linear if w.name not in methods]
    ignored = list(dict.fromkeys([*ignored, *renamed]))
    # transformers 5.23 cannot load packed zero points into a compressed layer, only decode them while it loads.
    symmetric = all(method.symmetric for method in methods.values())
    decode = {"dequantize": True} if graph.family.decoded or not symmetric else {}
    return {
        "config_groups": groups,
        **decode,
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": ignored,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": version("compressed-tensors"),
    }


def _weights(method: Encode) -> dict[str, Any]:
    group: int = method.group
    return {
        "actorder": "static" if method.act_order else None,
        "block_structure": None,
        "dynamic": False,
        "group_size": group or None,
        "num_bits": method.bits,
        "observer": "memoryless_minmax" if method.clip == "none" else "memoryless_mse",
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": "group" if group else "channel",
        "symmetric": method.symmetric,
        "type": "int",
        "zp_dtype": None if method.symmetric else "torch.int8",
    }


def _targets(weights: list[Weight], linear: list[Weight]) -> list[str]:
    """A regular expression for each path that is taken in every block; full names otherwise."""
    targets = []
    names = {w.name for w in weights}
    for path in dict.fromkeys(_generic(w) for w in weights):
        same = [w for w in linear if _generic(w) == path]
        if same[0].block is not None and all(w.name in names for w in same):
            pattern = re.escape(path).replace(r"\{e\}", r"\d+")
            targets.append(rf"re:.*\.\d+\.{pattern}$")
        else:
            targets += [w.name.removesuffix(".weight") for w in same if w.name in names]
    return targets


def _generic(weight: Weight) -> str:
    return weight.path if weight.expert is None else weight.path.replace(f".{weight.expert}.", ".{e}.")
