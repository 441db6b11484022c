"""What can be cut out of a model: neurons, heads, experts and hidden coordinates, found in the family's table.

Shapes: G structures, D coordinates that a space has for each, M elements that a weight has of each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tersely.bases import Index, axes, coordinates_first
from tersely.errors import UsageError
from tersely.graph import Graph, Weight
from tersely.methods.cut import Kind, Member
from tersely.stream.sums import Gradient

KINDS: tuple[Kind, ...] = ("neurons", "heads", "hidden", "experts")
_HEADED = re.compile(r"(cross_)?(q|k|v|attn)|k_nope|heads")
"""Spaces of the tables that have coordinates for each head."""
_SLAB = 1 << 24
"""Elements of a vocabulary's weight that are looked at together."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where structures of one kind lie: in one block, or (unit "") through the whole model."""

    kind: Kind
    unit: str
    count: int
    """G."""
    spaces: Mapping[str, int]
    """Space -> D."""
    read: str
    """The space that is measured to score them."""
    expert: int | None = None
    together: str = ""
    """Places with the same (not empty) must keep the same structures."""

    def index(self, kept_K: Tensor) -> Mapping[str, Index]:
        """The coordinates of each space that some structures have, in order."""
        return {
            space: Index((kept_K[:, None] * own + torch.arange(own)).reshape(-1)) for space, own in self.spaces.items()
        }

    def holds(self, weight: Weight) -> bool:
        """Whether a weight writes or reads any of it."""
        here = not self.unit or weight.unit == self.unit
        return here and self.expert in (None, weight.expert) and bool(set(self.spaces) & _spaces(weight))

    def made_of(self, weight: Weight) -> bool:
        """Whether its structures have a share of a weight: experts, all their own weights; others, what they hold."""
        if self.kind == "experts":
            return weight.unit == self.unit and weight.expert is not None
        return self.holds(weight)


def kinds_of(where: str) -> tuple[Kind, ...]:
    """The kinds that a step names: `neurons`, `heads`, `hidden` or `experts`, joined by `|`."""
    names = [term.strip() for term in where.split("|")]
    for name in names:
        if name not in KINDS:
            raise UsageError(
                f"where = {where!r}: no structures named {name!r}; expected {', '.join(KINDS)}, joined by |"
            )
    return tuple(kind for kind in KINDS if kind in names)


def places_of(graph: Graph, kind: Kind) -> list[Place]:
    """All places of a kind, in the order of the model. UsageError where the model has none."""
    found = {"neurons": _neurons, "heads": _heads, "hidden": _hidden, "experts": _experts}[kind](graph)
    if not found:
        raise UsageError(f"{kind}: this {graph.model_type} model has none")
    return found


def _neurons(graph: Graph) -> list[Place]:
    places = []
    for unit in graph.units:
        weights = graph.unit(unit)
        spaces = dict.fromkeys((p.space, w.expert) for w in weights for p in w.writes.parts if p.act)
        for space, expert in spaces:
            reader = next(w for w in weights if w.kind == "linear" and space in w.reads.spaces and w.expert == expert)
            places.append(Place("neurons", unit, reader.columns, {space: 1}, space, expert))
    return places


def _heads(graph: Graph) -> list[Place]:
    groups = graph.sizes.get("kv_heads", 0)
    places = []
    for unit in graph.units:
        weights = graph.unit(unit)
        own = dict.fromkeys(s for w in weights for s in _spaces(w) if _HEADED.fullmatch(s))
        for attended in (s for s in graph.family.mixes if s in own):
            cross = attended.removesuffix("attn")
            mine = [s for s in own if s.startswith(cross) and s.startswith("cross_") == bool(cross)]
            spaces = {s: (graph.sizes["heads"] if s == "heads" else graph.sizes[s]) // groups for s in sorted(mine)}
            # A bias that only the first block has is every block's.
            first = any("heads" in _spaces(w) for w in graph.weights if w.stack == weights[0].stack)
            together = f"{weights[0].stack} heads" if first and not cross else ""
            places.append(Place("heads", unit, groups, spaces, attended, None, together))
    return places


def _hidden(graph: Graph) -> list[Place]:
    same = [s for s, c in graph.coordinates.items() if c == graph.coordinates["residual"]]
    return [Place("hidden", "", graph.sizes["residual"], dict.fromkeys(same, 1), "residual")]


def _experts(graph: Graph) -> list[Place]:
    places = []
    for unit in graph.units:
        experts = {w.expert for w in graph.unit(unit)} - {None}
        if experts:
            last = next(w for w in graph.unit(unit) if w.expert is not None and "residual" in w.writes.spaces)
            places.append(Place("experts", unit, len(experts), {"router": 1}, last.reads.spaces[0]))
    return places


def _spaces(weight: Weight) -> set[str]:
    return {*weight.reads.spaces, *weight.writes.spaces}


def members(
    graph: Graph,
    place: Place,
    read: Callable[[Weight], Iterator[Tensor]],
    gradients: Mapping[str, Gradient] | None = None,
) -> Iterator[Member]:
    """What each weight has of the structures of a place; with gradients, of the weights that have one.

    read: the stored tensor, as pieces along its vocabulary where it has one.
    """
    if place.kind == "experts":
        yield from _of_experts(graph, place, read, gradients)
        return
    for weight in graph.weights if not place.unit else graph.unit(place.unit):
        if not place.holds(weight):
            continue
        if gradients is None:
            for piece in read(weight):
                yield from (Member(each) for each in _grouped(graph, place, weight, piece))
        elif (own := gradients.get(weight.name)) is not None:
            values = _grouped(graph, place, weight, torch.cat(list(read(weight))))
            means, squares = (_of_gradient(graph, place, weight, t, len(values)) for t in (own.mean, own.square))
            yield from (Member(*found) for found in zip(values, means, squares, strict=True))


def _of_gradient(
    graph: Graph, place: Place, weight: Weight, value: Tensor | None, count: int
) -> Sequence[Tensor | None]:
    if value is None:
        return [None] * count
    stored = value.cpu()
    return _grouped(graph, place, weight, stored.t() if weight.transposed else stored)


def _of_experts(
    graph: Graph,
    place: Place,
    read: Callable[[Weight], Iterator[Tensor]],
    gradients: Mapping[str, Gradient] | None,
) -> Iterator[Member]:
    by_path: dict[str, list[Weight]] = {}
    for weight in graph.unit(place.unit):
        if weight.expert is not None:
            by_path.setdefault(weight.parameter.replace(f".{weight.expert}.", ".{e}."), []).append(weight)
    for weights in by_path.values():
        values = torch.stack([next(iter(read(w))).float().reshape(-1) for w in weights])
        own = [gradients.get(w.name) for w in weights] if gradients is not None else []
        known = [(w, g) for w, g in zip(weights, own, strict=False) if g is not None]
        if len(known) == len(weights):
            means = [_flat(w, g.mean) for w, g in known if g.mean is not None]
            squares = [_flat(w, g.square) for w, g in known if g.square is not None]
            yield Member(values, torch.stack(means) if means else None, torch.stack(squares) if squares else None)
        elif gradients is None:
            yield Member(values)


def _flat(weight: Weight, value: Tensor) -> Tensor:
    """The elements in the order in which they are stored."""
    return (value.t() if weight.transposed else value).cpu().reshape(-1)


def _grouped(graph: Graph, place: Place, weight: Weight, tensor: Tensor) -> list[Tensor]:
    """What a tensor has of a place: for each axis and space, (G, D * M), float32."""
    found = []
    for dim, axis, _ in axes(weight):
        for space, piece in coordinates_first(graph, weight, tensor, dim, axis):
            if space in place.spaces:
                found.append(piece.reshape(place.count, -1).float())
    return found


class _Tensors(Protocol):
    def __getitem__(self, name: str) -> Tensor: ...

    def slab(self, name: str, start: int, end: int) -> Tensor: ...


def reader(checkpoint: _Tensors) -> Callable[[Weight], Iterator[Tensor]]:
    """What reads weights for `members`: those of a vocabulary a few rows at a time."""

    def read(weight: Weight) -> Iterator[Tensor]:
        wide = "tokens" in _spaces(weight) and len(weight.spec.shape) == 2
        if not wide:
            yield checkpoint[weight.name]
            return
        rows, columns = weight.spec.shape
        step = max(1, _SLAB // columns)
        for start in range(0, rows, step):
            yield checkpoint.slab(weight.name, start, min(rows, start + step))

    return read
