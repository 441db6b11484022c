"""A change of basis of the whole model that needs nothing measured: the source, rewritten before anything is encoded.

What is written is an ordinary checkpoint that computes what the source does. It lies beside the output while the job
runs, so that each step after it reads a folder, as it would the source.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersely.checkpoint import Checkpoint, TensorSpec, open_checkpoint
from tersely.graph import Graph, read_graph
from tersely.measure import Statistics
from tersely.plan.assignment import spaces
from tersely.plan.recipe import Change
from tersely.rebase import Basis, Diagonal, Orthogonal, fold_norms, rebase
from tersely.writer import Writer


@dataclass(frozen=True)
class Untied:
    """A checkpoint whose head is tied to the embedding, as if the head were stored as well."""

    checkpoint: Checkpoint
    embedding: str
    head: str
    path: Path = field(init=False)
    config: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", self.checkpoint.path)
        object.__setattr__(self, "config", {**self.checkpoint.config, "tie_word_embeddings": False})

    def __iter__(self) -> Iterator[str]:
        yield from self.checkpoint
        yield self.head

    def spec(self, name: str) -> TensorSpec:
        if name == self.head:
            return replace(self.checkpoint.spec(self.embedding), name=name)
        return self.checkpoint.spec(name)

    def __getitem__(self, name: str) -> Tensor:
        return self.checkpoint[self.embedding if name == self.head else name]


def planned(checkpoint: Checkpoint, graph: Graph, changes: Sequence[Change]) -> Untied | Checkpoint:
    """The checkpoint as its shapes will be: with a head of its own where the residual stream changes."""
    if not graph.tied or all(graph.coordinates[s] != "residual" for change in changes for s in spaces(change, graph)):
        return checkpoint
    table = next(w for w in graph.weights if w.role == "embedding" and w.reads.spaces == ("tokens",))
    return Untied(checkpoint, table.name, f"{graph.family.heads[0]}.weight")


def rotate(
    checkpoint: Checkpoint, changes: Sequence[Change], seed: int, folder: Path, facts: Mapping[str, Any], resume: bool
) -> Checkpoint:
    """Write the checkpoint in other bases to `folder`, unit by unit; one that lies there whole is taken as it is."""
    if resume and folder.is_dir():
        return open_checkpoint(folder)
    graph = read_graph(checkpoint)
    source = planned(checkpoint, graph, changes)
    graph = read_graph(source)
    bases = _chosen(changes, graph, seed)
    writer = Writer(folder, facts, resume=resume)
    try:
        units = ["outside", *(f"block-{n:05d}" for n in range(len(graph.units)))]
        for name, unit in zip(units, ("", *graph.units), strict=True):
            if not writer.done(name):
                tensors = _rebased(graph, source, bases, unit)
                if not unit:
                    tensors |= {extra: checkpoint[extra] for extra in graph.extra}
                writer.put(name, {n: t.contiguous() for n, t in tensors.items()}, {})
        companions = {name: checkpoint.path / name for name in checkpoint.companions}
        config = (json.dumps(source.config, indent=2, ensure_ascii=False) + "\n").encode()
        writer.finish(units, {**companions, "config.json": config})
    finally:
        writer.close()
    return open_checkpoint(folder)


def _chosen(changes: Sequence[Change], graph: Graph, seed: int) -> list[tuple[str, Basis]]:
    """The basis of each space that changes, in order."""
    bases: list[tuple[str, Basis]] = []
    for change in changes:
        for space in spaces(change, graph):
            bases.append((space, change.method((), Statistics(_size(graph, space)), seed)))
    return bases


def _rebased(
    graph: Graph, source: Untied | Checkpoint, bases: Sequence[tuple[str, Basis]], unit: str
) -> dict[str, Tensor]:
    """The tensors of one unit after all changes."""
    own = {w.name: source[w.name] for w in graph.unit(unit)}
    for space, basis in bases:
        wide = graph.coordinates[space] == "residual"
        if wide and isinstance(basis, Orthogonal):
            own |= fold_norms(graph, own, space, only=own)
        if wide:
            own |= rebase(graph, own, space, basis, only=own)
        elif unit:
            own |= rebase(graph, own, space, basis, unit=unit)
    return own


def places(graph: Graph, space: str, change: Change) -> list[tuple[str, int | None]]:
    """Unit and expert of each copy of a space; ("", None) for one that runs through the model."""
    if not change.needs and graph.coordinates[space] == "residual":
        return [("", None)]
    touching = [w for w in graph.weights if space in (*w.reads.spaces, *w.writes.spaces) and w.block is not None]
    found = dict.fromkeys((w.unit, w.expert) for w in touching)
    shared = {unit for unit, expert in found if expert is None}
    return [(unit, expert) for unit, expert in found if (expert is None) == (unit in shared)]


def trial(change: Change, graph: Graph, space: str) -> Basis:
    """A basis of the kind that a change will choose: to ask beforehand whether it may."""
    if change.needs:
        return tie(graph, space, Diagonal(torch.ones(reader_columns(graph, space))))
    flip = torch.eye(_size(graph, space))
    flip[0, 0] = -1
    return Orthogonal(flip)


def reader_columns(graph: Graph, space: str) -> int:
    """Inputs of the weights that read a space."""
    return graph.size(space) or next(w.columns for w in graph.readers(space) if w.kind == "linear")


def _size(graph: Graph, space: str) -> int:
    """Coordinates of a space, or of a head of one that attention mixes."""
    if any(space in pair for pair in graph.family.mixes.items()):
        return graph.sizes["v"] // graph.sizes["kv_heads"]
    return reader_columns(graph, space)


def tie(graph: Graph, space: str, basis: Diagonal) -> Diagonal:
    """A scale of a space whose heads share coordinates (query heads of one key/value head), as one that they can share:
    the geometric mean of theirs, of the size of the space that writes them."""
    pair = next((pair for pair in graph.family.mixes.items() if space == pair[0]), None)
    if pair is None:
        return basis
    shared = graph.sizes["heads"] // graph.sizes["kv_heads"]
    head = len(basis.scale_N) // graph.sizes["heads"]
    scale = basis.scale_N.view(graph.sizes["kv_heads"], shared, head).log().mean(1).exp()
    return Diagonal(scale.reshape(-1)) if bool(torch.isfinite(scale).all()) else basis
