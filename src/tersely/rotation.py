"""A change of basis of the whole model that needs nothing measured: the source, rewritten before anything is encoded.

What is written is an ordinary checkpoint that computes what the source does. It lies beside the output while the job
runs, so that each step after it reads a folder, as it would the source.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from tersely.bases import Basis, Diagonal, Orthogonal
from tersely.checkpoint import Checkpoint, open_checkpoint
from tersely.graph import Graph, Weight, read_graph
from tersely.measure import Statistics
from tersely.plan.assignment import spaces
from tersely.plan.recipe import Change
from tersely.rebase import fold_norms, rebase
from tersely.rewriting import finish, units_of
from tersely.writer import Writer


def untied(checkpoint: Checkpoint, graph: Graph) -> Checkpoint:
    """The checkpoint with a head of its own, where its head is the embedding: as if that were stored twice."""
    if not graph.tied:
        return checkpoint
    table = next(w for w in graph.weights if w.role == "embedding" and w.reads.spaces == ("tokens",))
    head = f"{graph.family.heads[0]}.weight"
    specs = {name: checkpoint.spec(name) for name in checkpoint} | {
        head: replace(checkpoint.spec(table.name), name=head)
    }
    return checkpoint.with_headers({**checkpoint.config, "tie_word_embeddings": False}, specs)


def planned(checkpoint: Checkpoint, graph: Graph, changes: Sequence[Change]) -> Checkpoint:
    """The checkpoint as its shapes will be: with a head of its own where the residual stream changes."""
    wide = any(graph.coordinates[s] == "residual" for change in changes for s in spaces(change, graph))
    return untied(checkpoint, graph) if wide else checkpoint


def rotate(
    checkpoint: Checkpoint, changes: Sequence[Change], seed: int, folder: Path, facts: Mapping[str, Any], resume: bool
) -> Checkpoint:
    """Write the checkpoint in other bases to `folder`, unit by unit; one that lies there whole is taken as it is."""
    if resume and folder.is_dir():
        return open_checkpoint(folder)
    source = planned(checkpoint, read_graph(checkpoint), changes)
    return turned(source, _chosen(changes, read_graph(source), seed), folder, facts, resume)


def turned(
    source: Checkpoint, bases: Sequence[tuple[str, Basis]], folder: Path, facts: Mapping[str, Any], resume: bool
) -> Checkpoint:
    """Write a checkpoint, its head not the embedding if the residual stream changes, with these bases of its spaces."""
    graph = read_graph(source)
    writer = Writer(folder, facts, resume=resume)
    try:
        units = units_of(graph)
        for name, weights in units.items():
            if not writer.done(name):
                tensors = _rebased(graph, source, bases, weights)
                writer.put(name, {n: t.contiguous() for n, t in tensors.items()}, {})
        finish(writer, source, graph, list(units), source.config)
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
    graph: Graph, source: Checkpoint, bases: Sequence[tuple[str, Basis]], weights: Sequence[Weight]
) -> dict[str, Tensor]:
    """The tensors of one unit, or of a part of what lies outside, after all changes."""
    own = {w.name: source[w.name] for w in weights}
    unit = weights[0].unit
    read = {space for w in weights if w.kind == "linear" for space in w.reads.spaces}
    for space, basis in bases:
        wide = graph.coordinates[space] == "residual"
        if wide and isinstance(basis, Orthogonal):
            # A norm outside the blocks may be read in them (what an encoder gives).
            norms = {w.name for w in graph.unit("") if w.kind == "norm" and w.writes.spaces[0] in read}
            both = ChainMap(own, cast("dict[str, Tensor]", source))
            folded = fold_norms(graph, both, space, only={*own, *norms}, readers=own)
            own |= {name: tensor for name, tensor in folded.items() if name in own}
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
