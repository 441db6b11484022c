"""The architectures of llama.cpp that tersely writes (architectures.toml), and what a file says of a model of each."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import gguf
import torch
from torch import Tensor

from tersely.errors import CheckpointError, UsageError
from tersely.graph import Graph, Weight

Value = int | float | str | bool | list[bool]


@dataclass(frozen=True)
class Architecture:
    """One table of architectures.toml, with what all have."""

    name: str
    model_types: tuple[str, ...]
    scalings: tuple[str, ...]
    biases: frozenset[str]
    requires: Mapping[str, Any]
    sizes: Mapping[str, str]
    config: Mapping[str, str]
    reals: Mapping[str, str]
    turned: bool = False
    tied: bool = False
    square: bool = False
    queries: int = 0
    windows: bool = False


@dataclass(frozen=True)
class Described:
    """A model in llama.cpp's terms."""

    architecture: Architecture
    settings: Mapping[str, Value]
    """By the key that follows the architecture's name."""
    tensors: Mapping[str, Tensor]
    """What the file holds beside the model's weights: factors of RoPE."""
    notes: tuple[str, ...]
    """What llama.cpp does otherwise."""

    def name_of(self, weight: Weight) -> str:
        """The tensor that a weight is, or is a part of (all experts of a block are one).

        UsageError: llama.cpp has none for it.
        """
        inside = weight.path if weight.expert is None else weight.path.replace(f".{weight.expert}.", ".")
        path = f"{weight.unit}.{inside}".lstrip(".")
        found = _names(self.architecture.name, int(self.settings["block_count"])).get_name(path)  # type: ignore[arg-type]
        bias = weight.kind == "bias" and not set(weight.writes.spaces) <= self.architecture.biases
        if found is None or bias:
            raise UsageError(f"{weight.name}: llama.cpp's {self.architecture.name} has no such tensor; no GGUF for it")
        return f"{found}.{weight.leaf}"


def describe(graph: Graph, config: Mapping[str, Any]) -> Described:
    """What a GGUF file says of the model of a config.json.

    UsageError: llama.cpp runs no such model; CheckpointError: transformers cannot read the config.
    """
    full = _complete(config)
    found = _architecture_of(graph)
    _require(found, graph, full)
    settings: dict[str, Value] = {"block_count": len(graph.units)}
    settings |= {key: graph.sizes[size] for key, size in found.sizes.items() if size in graph.sizes}
    settings |= {key: int(full[name]) for key, name in found.config.items() if full.get(name) is not None}
    settings |= {key: float(full[name]) for key, name in found.reals.items() if full.get(name) is not None}
    notes = []
    window = full.get("sliding_window") if full.get("use_sliding_window", True) else None
    if found.windows and window:
        settings["attention.sliding_window"] = int(window)
        settings["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in full["layer_types"]]
    elif window and window < full["max_position_embeddings"]:
        notes.append(f"the model looks back {window} tokens; llama.cpp looks at all, so longer contexts differ")
    tensors: dict[str, Tensor] = {}
    for key, value in _positions(found, graph, full):
        if isinstance(value, Tensor):
            tensors[key] = value
        else:
            settings[key] = value
    if len(tensors) > 1:
        notes.append(
            "llama.cpp takes the factors of RoPE by the size of the context, transformers by the text's length"
        )
    return Described(found, settings, tensors, tuple(notes))


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with what transformers takes for what it does not say."""
    from transformers import AutoConfig

    try:
        full: dict[str, Any] = AutoConfig.for_model(**config).to_dict()
    except Exception as error:
        raise CheckpointError(f"config.json is none that transformers takes: {error}; fetch it again") from error
    return full


def turn(heads: int, rows: int) -> Tensor:
    """Order of the rows of q or k in which RoPE's pairs are neighbours: in each head, i, i + head/2 to 2i, 2i + 1."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def _architecture_of(graph: Graph) -> Architecture:
    known = {name: each for each in _architectures() for name in each.model_types}
    if (found := known.get(graph.model_type)) is None:
        names = ", ".join(sorted(known))
        raise UsageError(f"tersely writes no GGUF for models of type {graph.model_type}; it does for {names}")
    return found


def _require(found: Architecture, graph: Graph, full: Mapping[str, Any]) -> None:
    where = f"llama.cpp's {found.name}"
    for key, wanted in found.requires.items():
        value = bool(full.get(key)) if isinstance(wanted, bool) else full.get(key)
        if value != wanted:
            raise UsageError(
                f"{where} takes {key} = {wanted} for granted, and the config says {full.get(key)}; no GGUF"
            )
    sizes = graph.sizes
    if found.square and sizes["heads"] * sizes["head"] != sizes["residual"]:
        raise UsageError(
            f"{where} wants heads * head size = hidden size, here {sizes['heads']} * {sizes['head']}; no GGUF"
        )
    if found.tied and not graph.tied:
        raise UsageError(f"{where} has no head but the embedding, and this checkpoint has one; no GGUF")
    if found.queries:
        wide = len(graph.units) == found.queries
        wanted = sizes["residual"] // sizes["heads"] if wide else sizes["head"]
        if full["query_pre_attn_scalar"] != wanted:
            raise UsageError(
                f"{where} takes query_pre_attn_scalar = {wanted} for granted, and the config says "
                f"{full['query_pre_attn_scalar']}; no GGUF"
            )


def _positions(found: Architecture, graph: Graph, full: Mapping[str, Any]) -> Iterator[tuple[str, Value | Tensor]]:
    """Settings and tensors of RoPE."""
    rope: Mapping[str, Any] = full["rope_parameters"]
    if "full_attention" in rope:
        local = rope["sliding_attention"]
        if local["rope_type"] != "default":
            raise UsageError(f"llama.cpp's {found.name} scales no positions within its windows; no GGUF")
        yield "rope.freq_base_swa", float(local["rope_theta"])
        rope = rope["full_attention"]
    yield "rope.freq_base", float(rope["rope_theta"])
    yield "rope.dimension_count", int(graph.sizes["head"] * rope.get("partial_rotary_factor", 1.0))
    kind = rope["rope_type"]
    if kind == "default":
        return
    if kind not in found.scalings:
        raise UsageError(
            f"llama.cpp's {found.name} cannot scale positions by {kind}, only by {', '.join(found.scalings)}; no GGUF"
        )
    if kind == "llama3":
        yield "rope_freqs.weight", _slowed(rope, graph.sizes["head"])
        return
    yield "rope.scaling.type", kind
    if kind == "longrope":
        old = rope["original_max_position_embeddings"]
        factor = rope.get("factor") or full["max_position_embeddings"] / old
        usual = math.sqrt(1 + math.log(factor) / math.log(old)) if factor > 1 else 1.0
        yield "rope.scaling.original_context_length", int(old)
        yield "rope.scaling.attn_factor", float(rope.get("attention_factor") or usual)
        yield "rope_factors_long.weight", torch.tensor(rope["long_factor"], dtype=torch.float32)
        yield "rope_factors_short.weight", torch.tensor(rope["short_factor"], dtype=torch.float32)
        return
    yield "rope.scaling.factor", float(rope["factor"])
    if kind == "yarn":
        if not rope.get("truncate", True) or rope.get("mscale"):
            raise UsageError(f"llama.cpp's {found.name} knows no yarn with mscale or without truncate; no GGUF")
        usual = 0.1 * math.log(rope["factor"]) + 1
        old = rope.get("original_max_position_embeddings") or full["max_position_embeddings"]
        yield "rope.scaling.original_context_length", int(old)
        yield "rope.scaling.attn_factor", float(rope.get("attention_factor") or usual) / usual
        yield "rope.scaling.yarn_beta_fast", float(rope.get("beta_fast") or 32)
        yield "rope.scaling.yarn_beta_slow", float(rope.get("beta_slow") or 1)


def _slowed(rope: Mapping[str, Any], head: int) -> Tensor:
    """By how much Llama 3.1 divides each frequency: 1 for short waves, `factor` for long ones, smooth between."""
    wave = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float32) / head)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = (rope["original_max_position_embeddings"] / wave - low) / (high - low)
    return 1 / torch.lerp(torch.tensor(1 / factor), torch.tensor(1.0), smooth.clamp(0, 1))


@cache
def _names(architecture: str, blocks: int) -> gguf.TensorNameMap:
    (number,) = (n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(number, blocks)


@cache
def _architectures() -> tuple[Architecture, ...]:
    text = (resources.files("tersely") / "export" / "gguf" / "architectures.toml").read_text("utf-8")
    tables = tomllib.loads(text)
    every = tables.pop("every")
    made = []
    for name, table in tables.items():
        mixed = {key: {**every.get(key, {}), **table.get(key, {})} for key in ("sizes", "config", "reals", "requires")}
        merged = {**every, **table, **mixed, "name": name}
        lists = {key: tuple(merged[key]) for key in ("model_types", "scalings")}
        made.append(Architecture(**{**merged, **lists, "biases": frozenset(merged["biases"])}))
    return tuple(made)
