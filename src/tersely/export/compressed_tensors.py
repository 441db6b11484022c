"""compressed-tensors: quantized weights that plain transformers and vLLM load.

Names, dtypes, shapes and config keys are those that llm-compressor writes for the same scheme. What transformers 5.23
makes of it was found by trying:

- It decodes weights before the first forward, and rounds the inputs of linear layers in every forward. Dynamic scales
  are those of a token only where the inputs have three dimensions: two are taken for one token, and of four the first
  two for tokens (fc1 and fc2 of OPT, kv_b_proj of DeepSeek-V3). vLLM has a scale for each token everywhere.
- The inputs of experts, which are no layers there, stay as they are.
- Where it must decode while it loads ("dequantize"), it knows one scheme, and rounds no inputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from tersely.codecs import Form, IntegerForm, Scheme
from tersely.codecs.activations import ACTIVATIONS, Number, PerTensor, layout
from tersely.codecs.floats import BLOCK, FP8Form, MXFP4Form, NVFP4Form
from tersely.errors import UsageError
from tersely.graph import Graph, Weight


def check(graph: Graph, schemes: Mapping[str, Scheme]) -> None:
    """UsageError where the format cannot say this, or transformers cannot load it."""
    schemes = {name: scheme for name, scheme in schemes.items() if not scheme.ordinary}
    if not schemes:
        raise UsageError("no weight is quantized, which is what compressed-tensors is for; use --format dense")
    for name, scheme in schemes.items():
        weight = graph.weight(name)
        if not _sayable(scheme):
            kinds = " + ".join(form.kind for form in scheme.parts)
            inputs = f" with {scheme.activations} inputs" if scheme.activations else ""
            raise UsageError(
                f"{name}: compressed-tensors has no form for {kinds}{inputs}; use --format tersely, which loads "
                "after `import tersely`, or --format dense"
            )
        if weight.transposed:
            raise UsageError(
                f"{name} is stored as (inputs, outputs), as Conv1D layers are; compressed-tensors holds "
                "only linear layers. Use --format tersely, or --format dense: an ordinary checkpoint of the same size "
                "with the compressed values"
            )
        if weight.leaf != "weight" or not name.endswith(".weight"):
            raise UsageError(f"{name} is not the weight of a linear layer; compressed-tensors cannot hold it")
    _check_decoded(graph, schemes)
    experts = [w.name for w in graph.weights if w.expert is not None and w.kind == "linear"]
    for name in experts:
        if name in schemes and (why := _not_in_experts(layout(schemes[name]), graph.weight(name).spec.dtype)):
            raise UsageError(
                f"{name}: transformers cannot load experts in {why}; use another method for `experts`, or "
                "--format tersely or --format dense"
            )
    alike = {schemes[n] if n in schemes and _symmetric(schemes[n]) else n for n in experts}
    if len(alike) > 1:
        raise UsageError(
            "transformers loads the experts of a compressed checkpoint only if all of them are compressed in the "
            "same way, on symmetric grids; let one symmetric step select `experts`, or use --format tersely or "
            "--format dense"
        )


def _check_decoded(graph: Graph, schemes: Mapping[str, Scheme]) -> None:
    """UsageError where transformers must decode while it loads, and cannot."""
    reasons = {name: _decoded(graph, name, scheme) for name, scheme in schemes.items()}
    why = next(filter(None, reasons.values()), "")
    if why and any(scheme.activations for scheme in schemes.values()):
        raise UsageError(
            f"transformers decodes {why} while it loads them, and rounds no inputs then; leave `activations` out, or "
            "use --format tersely or --format dense"
        )
    if why and len(set(schemes.values())) > 1:
        raise UsageError(
            f"transformers decodes {why} while it loads them, and cannot do so in a checkpoint of several schemes; use "
            "one scheme for all weights, or --format tersely or --format dense"
        )


def _decoded(graph: Graph, name: str, scheme: Scheme) -> str:
    """What it is that transformers must decode while it loads; "" where it need not."""
    dtype = graph.weight(name).spec.dtype
    if graph.family.decoded:
        return f"the weights of a {graph.model_type} model"
    if not _symmetric(scheme):
        return "integers with zero points (--set symmetric=true has none)"
    return _four_bits(scheme.parts[0], dtype)


def _four_bits(form: Form, dtype: torch.dtype) -> str:
    """Four-bit floats where they are not decoded to the dtype of the model: transformers makes bfloat16 of them."""
    if isinstance(form, MXFP4Form | NVFP4Form) and dtype != torch.bfloat16:
        return f"four-bit floats of a {str(dtype).removeprefix('torch.')} model"
    return ""


def _not_in_experts(scheme: Scheme, dtype: torch.dtype) -> str:
    """What it is that transformers cannot load in experts; "" where it can."""
    form = scheme.parts[0]
    if isinstance(form, IntegerForm) and not form.packed:
        return "integers for integer inputs"
    if isinstance(form, NVFP4Form):
        return "NVFP4"
    if isinstance(form, FP8Form) and form.scales == "block":
        return "FP8 with blocks of scales"
    return _four_bits(form, dtype)


def quantization_config(graph: Graph, schemes: Mapping[str, Scheme], *, fp8_cache: bool = False) -> dict[str, Any]:
    """The `quantization_config` of config.json: one group per scheme, and all other linear layers ignored.

    fp8_cache: keys and values are kept in FP8, with the scales of `cache_scales`.
    """
    by_scheme: dict[Scheme, list[Weight]] = {}
    for name, scheme in schemes.items():
        by_scheme.setdefault(scheme, []).append(graph.weight(name))
    linear = [w for w in graph.weights if w.kind == "linear" and not w.transposed]
    groups = {}
    for number, (scheme, weights) in enumerate(by_scheme.items()):
        targets = ["Linear"] if len(by_scheme) == 1 else _targets(weights, linear)
        groups[f"group_{number}"] = _group(scheme, targets)
    formats = {group["format"] for group in groups.values()}
    loaded = {
        piece.weight.name: f"{unit}.{name}".lstrip(".")
        for unit in ("", *graph.units)
        for name, pieces in graph.parameters(unit).items()
        for piece in pieces
        if len(pieces) == 1 and piece.index is None
    }
    ignored = [w.name.removesuffix(".weight") for w in linear if w.name not in schemes]
    if graph.head is None:
        ignored += graph.family.heads
        ignored += [
            p.removesuffix(".weight")
            for p, path in graph.family.memory.get("", {}).items()
            if path in graph.family.heads
        ]
    # Engines go by the stored names, transformers by those that it has in memory.
    renamed = [loaded.get(w.name, w.name).removesuffix(".weight") for w in linear if w.name not in schemes]
    ignored = list(dict.fromkeys([*ignored, *renamed]))
    decode = {"dequantize": True} if any(_decoded(graph, n, scheme) for n, scheme in schemes.items()) else {}
    return {
        "config_groups": groups,
        **decode,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": ignored,
        "kv_cache_scheme": {**_DEFAULTS, **PerTensor(Number("float", 8)).entry} if fp8_cache else None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": version("compressed-tensors"),
    }


def cache_scales(graph: Graph) -> dict[str, Tensor]:
    """What is stored for a cache of keys and values in FP8: a scale for each attention layer, of 1, since they lie
    well within +-448.

    UsageError where transformers, which goes by the names of the projections, would not round them.
    """
    keys = [w for w in graph.weights if w.kind == "linear" and w.path.rpartition(".")[2] in ("k_proj", "qkv_proj")]
    if not keys or graph.family.decoded:
        raise UsageError(f"transformers cannot keep the cache of a {graph.model_type} model in FP8; leave it as it is")
    layers = {w.name.rpartition(".")[0].rpartition(".")[0]: w.spec.dtype for w in keys}
    return {f"{layer}.{which}_scale": torch.ones(1, dtype=dtype) for layer, dtype in layers.items() for which in "kv"}


def _sayable(scheme: Scheme) -> bool:
    return (
        len(scheme.parts) == 1
        and isinstance(scheme.parts[0], IntegerForm | FP8Form | MXFP4Form | NVFP4Form)
        and (not scheme.activations or ACTIVATIONS[scheme.activations].entry is not None)
        and not scheme.hadamard
    )


def _symmetric(scheme: Scheme) -> bool:
    form = scheme.parts[0]
    return not isinstance(form, IntegerForm) or form.symmetric


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """One of `config_groups`."""
    (form,) = scheme.parts
    inputs = ACTIVATIONS[scheme.activations].entry if scheme.activations else None
    return {
        "format": _format(form),
        "input_activations": None if inputs is None else {**_DEFAULTS, **inputs},
        "output_activations": None,
        "targets": targets,
        "weights": {**_DEFAULTS, **_weights(form)},
    }


_DEFAULTS: dict[str, Any] = {
    "actorder": None,
    "block_structure": None,
    "dynamic": False,
    "group_size": None,
    "observer": None,
    "observer_kwargs": {},
    "scale_dtype": None,
    "symmetric": True,
    "zp_dtype": None,
}


def _format(form: Form) -> str:
    if isinstance(form, IntegerForm):
        return "pack-quantized" if form.packed else "int-quantized"
    return {"fp8": "float-quantized", "mxfp4": "mxfp4-pack-quantized", "nvfp4": "nvfp4-pack-quantized"}[form.kind]


def _weights(form: Form) -> dict[str, Any]:
    """What `weights` of a group differs in from the defaults."""
    if isinstance(form, IntegerForm):
        return {
            "group_size": form.group or None,
            "num_bits": form.bits,
            "observer": "memoryless_minmax",
            "strategy": "group" if form.group else "channel",
            "symmetric": form.symmetric,
            "type": "int",
            "zp_dtype": None if form.symmetric else "torch.int8",
        }
    common = {"type": "float", "observer": "memoryless_minmax"}
    if isinstance(form, FP8Form):
        block = {"block_structure": [BLOCK, BLOCK]} if form.scales == "block" else {}
        return {**common, **block, "num_bits": 8, "strategy": form.scales}
    if isinstance(form, MXFP4Form):
        return {**common, "num_bits": 4, "strategy": "group", "group_size": form.group, "scale_dtype": "torch.uint8"}
    assert isinstance(form, NVFP4Form)
    scale = {"group_size": form.group, "scale_dtype": "torch.float8_e4m3fn"}
    return {**common, **scale, "num_bits": 4, "strategy": "tensor_group"}


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
