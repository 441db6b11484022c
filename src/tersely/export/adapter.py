"""A PEFT adapter of the low-rank parts: plain `peft` adds them to the checkpoint that holds the other parts.

It goes into a folder of its own: transformers takes a folder with an adapter_config.json for an adapter alone, be
there a whole model in it or not. PEFT needs weights that it can see: a compressed-tensors checkpoint is loaded with
`CompressedTensorsConfig(dequantize=True)`.

Shapes: E experts, O outputs, I inputs, R rank.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tersely.codecs.low_rank import LowRank
from tersely.errors import UsageError
from tersely.graph import Graph, Piece
from tersely.writer import METADATA, write_safetensors

_TASKS = {"CausalLM": "CAUSAL_LM", "Seq2SeqLM": "SEQ_2_SEQ_LM"}


def write_adapter(folder: Path, graph: Graph, low_rank: Mapping[str, LowRank], base_name: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors into a new folder.

    low_rank: the part of each weight that has one, by the weight's stored name. alpha = rank everywhere, so that
    what is added is b @ a itself. base_name: what the config names as the checkpoint to add it to. Linear layers are
    modules for PEFT, each of its own rank. Experts are parameters, as are the other weights of a mixture's MLP, whose
    names PEFT takes for those of experts; all parameters have one rank, and what is shorter is filled up with zeros.

    PEFT multiplies the inputs as they come: beside quantized inputs, only parts with inputs = "full" are what it
    computes. Raises UsageError: no part at all, or one of a weight that PEFT has no place for.
    """
    modules: dict[str, LowRank] = {}
    parameters: dict[str, Sequence[Piece]] = {}
    left = set(low_rank)
    for unit in ("", *graph.units):
        for parameter, pieces in graph.parameters(unit).items():
            first, name = pieces[0].weight, f"{unit}.{parameter}".lstrip(".")
            alone = len(pieces) == 1 and pieces[0].index is None and name.endswith(".weight")
            if not any(piece.weight.name in low_rank for piece in pieces):
                continue
            if alone and not (graph.has_experts and first.role in ("mlp", "router")):
                modules[name.removesuffix(".weight")] = low_rank[first.name]
            elif alone or all(piece.index is not None for piece in pieces):
                parameters[name] = pieces
            else:
                continue
            left -= {piece.weight.name for piece in pieces}
    if left:
        raise UsageError(
            f"a PEFT adapter has no place for the low-rank part of {min(left)}: transformers holds that weight "
            "together with others; use --format tersely or --format dense"
        )
    if not low_rank:
        raise UsageError("no weight has a low-rank part, which is what an adapter holds")
    tensors = {
        f"base_model.model.{module}.lora_{letter}.weight": factor
        for module, part in modules.items()
        for letter, factor in (("A", part.a_RI), ("B", part.b_OR))
    }
    ranks = {module: part.form.rank for module, part in modules.items()}
    rank = max((_rank(pieces, low_rank) for pieces in parameters.values()), default=max(ranks.values(), default=0))
    for name, filling in parameters.items():
        owner = name.rpartition(".")[0]
        # PEFT wraps a module once for each of its parameters; the last one is the outermost.
        within = [other for other in parameters if other.rpartition(".")[0] == owner]
        place = owner + ".base_layer" * (len(within) - 1 - within.index(name))
        for letter, factor in zip("AB", _stacked(filling, low_rank, rank), strict=True):
            tensors[f"base_model.model.{place}.lora_{letter}.weight"] = factor
    other = {module: own for module, own in ranks.items() if own != rank}
    config: dict[str, Any] = {
        "alpha_pattern": other,
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": any(graph.weight(name).transposed for name in low_rank),
        "inference_mode": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": other,
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters) or None,
        "task_type": _TASKS.get(graph.family.auto_class),
    }
    folder.mkdir(parents=True)
    with (folder / "adapter_model.safetensors").open("xb") as file:
        write_safetensors(file, tensors, METADATA)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def _rank(pieces: Sequence[Piece], low_rank: Mapping[str, LowRank]) -> int:
    """Of the block-diagonal factor that holds the parts of one expert's pieces side by side, the largest."""
    ranks: Counter[int | None] = Counter()
    for piece in pieces:
        if piece.weight.name in low_rank:
            ranks[piece.index] += low_rank[piece.weight.name].form.rank
    return max(ranks.values())


def _stacked(pieces: Sequence[Piece], low_rank: Mapping[str, LowRank], rank: int) -> tuple[Tensor, Tensor]:
    """Factors (E R, I) and (O, R E) of a parameter (E, O, I), or (O, I), that these pieces fill."""
    like = next(low_rank[piece.weight.name].a_RI for piece in pieces if piece.weight.name in low_rank)
    experts = 1 + max(piece.index or 0 for piece in pieces)
    outputs = max(piece.start + piece.rows for piece in pieces)
    a_ERI = like.new_zeros((experts, rank, like.shape[1]))
    b_EOR = like.new_zeros((experts, outputs, rank))
    filled = [0] * experts
    for piece in pieces:
        part, expert = low_rank.get(piece.weight.name), piece.index or 0
        if part is not None:
            own = slice(filled[expert], filled[expert] + part.form.rank)
            a_ERI[expert, own] = part.a_RI
            b_EOR[expert, piece.start : piece.start + piece.rows, own] = part.b_OR
            filled[expert] = own.stop
    return a_ERI.flatten(0, 1), b_EOR.permute(1, 2, 0).flatten(1)
