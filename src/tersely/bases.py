"""A weight in another basis of a space that it reads or writes: the arithmetic on stored tensors.

Shapes: N coordinates of a space, K kept ones, M elements that a weight has of each, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tersely.errors import UsageError
from tersely.families import Axis
from tersely.graph import Graph, Weight

_SLAB = 1 << 24
"""Elements that are turned together."""


@dataclass(frozen=True, eq=False)
class Index:
    """Keep these coordinates, in this order: (K,), int64, no repeats."""

    index_K: Tensor


@dataclass(frozen=True, eq=False)
class Diagonal:
    """Multiply each coordinate: (N,), finite, no zeros."""

    scale_N: Tensor


@dataclass(frozen=True, eq=False)
class Orthogonal:
    """Rotate or reflect: (N, N), basis_NN @ basis_NN.T = identity."""

    basis_NN: Tensor


Basis = Index | Diagonal | Orthogonal


def checked(space: str, basis: Basis, sizes: tuple[int, ...]) -> Basis:
    """The basis itself, if its shape and values are those of a space of one of these sizes (any, if none)."""
    expected = " or ".join(map(str, sizes))
    if isinstance(basis, Index):
        index_K = basis.index_K
        if index_K.dtype != torch.int64 or index_K.dim() != 1 or not len(index_K):
            raise UsageError(f"{space}: an index is int64 with one dimension, not {index_K.dtype} {[*index_K.shape]}")
        if int(index_K.min()) < 0 or (sizes and int(index_K.max()) >= max(sizes)):
            span = f"{int(index_K.min())} to {int(index_K.max())}"
            raise UsageError(f"{space}: has {expected} coordinates; the index holds {span}")
        if len(torch.unique(index_K)) != len(index_K):
            raise UsageError(f"{space}: the index repeats coordinates")
    elif isinstance(basis, Diagonal):
        scale_N = basis.scale_N
        if scale_N.dim() != 1 or (sizes and len(scale_N) not in sizes):
            raise UsageError(f"{space}: has {expected} coordinates; the scale has shape {[*scale_N.shape]}")
        if not bool(torch.isfinite(scale_N).all()) or bool((scale_N == 0).any()):
            raise UsageError(f"{space}: a scale must be finite and not zero")
    else:
        basis_NN = basis.basis_NN
        if basis_NN.dim() != 2 or basis_NN.shape[0] != basis_NN.shape[1]:
            raise UsageError(f"{space}: a rotation is a square matrix, not {[*basis_NN.shape]}")
        if sizes and len(basis_NN) not in sizes:
            raise UsageError(f"{space}: has {expected} coordinates; the rotation has {len(basis_NN)}")
        exact_NN = basis_NN.double()
        if not torch.allclose(exact_NN @ exact_NN.T, torch.eye(len(exact_NN)).double(), atol=1e-4):
            raise UsageError(f"{space}: the matrix is not orthogonal to within 1e-4")
    return basis


def axes(weight: Weight) -> tuple[tuple[int, Axis, bool], ...]:
    """Stored dimension, what it covers, and whether it is read (not written)."""
    if weight.kind in ("norm", "bias"):
        return ((0, weight.writes, False),)
    reads = 0 if weight.transposed or weight.kind == "lookup" else 1
    return ((reads, weight.reads, True), (1 - reads, weight.writes, False))


def stored_axes(weight: Weight) -> tuple[Axis, ...]:
    """What each stored dimension covers."""
    return tuple(axis for _, axis, _ in sorted(axes(weight), key=lambda each: each[0]))


def selected(
    graph: Graph, weight: Weight, tensor: Tensor, index: Mapping[str, Index], heads: int, *, read: bool = True
) -> Tensor:
    """A stored tensor with these coordinates of these spaces: a cut, which may change what the model computes.

    heads: how many there are afterwards, for axes that are interleaved head by head. read: whether what it reads is
    selected too.
    """
    for dim, axis, reads in axes(weight):
        if (read or not reads) and any(part.space in index for part in axis.parts):
            tensor = along(graph, weight, tensor, dim, axis, index, reads, heads)
    return tensor.contiguous()


def coordinates_first(
    graph: Graph, weight: Weight, tensor: Tensor, dim: int, axis: Axis
) -> Iterator[tuple[str, Tensor]]:
    """Each space along an axis of a tensor, and its share of it: (N, M), its coordinates first, in order."""
    _, apart = _apart(graph, weight, tensor, dim, axis)
    for part, piece in zip(axis.parts, apart, strict=True):
        first = piece.flatten(dim, dim + 1).movedim(dim, 0)
        yield part.space, first.reshape(len(first), -1)


def along(
    graph: Graph,
    weight: Weight,
    tensor: Tensor,
    dim: int,
    axis: Axis,
    bases: Mapping[str, Basis],
    reads: bool,
    heads_after: int | None = None,
) -> Tensor:
    """The tensor with one of its axes in the new bases; heads_after: of one interleaved by head, if they change."""
    heads, apart = _apart(graph, weight, tensor, dim, axis)
    pieces = [
        _split(
            _piece(graph, weight, p.flatten(dim, dim + 1), dim, part.act, bases.get(part.space), reads),
            dim,
            heads_after if heads_after is not None and axis.by_head else heads,
        )
        for p, part in zip(apart, axis.parts, strict=True)
    ]
    return (torch.cat(pieces, dim + 1) if len(pieces) > 1 else pieces[0]).flatten(dim, dim + 1)


def _apart(graph: Graph, weight: Weight, tensor: Tensor, dim: int, axis: Axis) -> tuple[int, tuple[Tensor, ...]]:
    """How many runs an axis has, and each space's share of the tensor: dimension `dim` as (runs, size)."""
    sizes = [graph.size(s) for s in axis.spaces]
    if len(sizes) == 1:
        sizes = [tensor.shape[dim]]
    known = [n for n in sizes if n is not None]
    if len(known) < len(sizes):
        raise UsageError(f"{weight.name}: config.json does not give the sizes of {'+'.join(axis.spaces)}")
    heads = graph.sizes["heads"] if axis.by_head else 1
    return heads, torch.split(_split(tensor, dim, heads), [n // heads for n in known], dim + 1)


def _split(tensor: Tensor, dim: int, runs: int) -> Tensor:
    """One dimension as two: (runs, size // runs)."""
    shape = tensor.shape
    return tensor.reshape(*shape[:dim], runs, shape[dim] // runs, *shape[dim + 1 :])


def _piece(
    graph: Graph, weight: Weight, tensor: Tensor, dim: int, act: bool, basis: Basis | None, reads: bool
) -> Tensor:
    """One space's share of an axis in its new basis."""
    if basis is None:
        return tensor
    if isinstance(basis, Index):
        return tensor.index_select(dim, basis.index_K)
    if isinstance(basis, Orthogonal):
        return tensor if weight.kind == "norm" else _turned(tensor, dim, basis.basis_NN.to(precise(tensor)))
    exact = tensor.to(precise(tensor))
    if act:
        return tensor
    scale = basis.scale_N.to(exact.dtype).view([-1 if d == dim else 1 for d in range(tensor.dim())])
    offset = graph.family.norm_offset if weight.kind == "norm" else 0.0
    made = exact / scale if reads else (exact + offset) * scale - offset
    return made.to(tensor.dtype)


def scaled(tensor: Tensor, gain_N: Tensor, dim: int) -> Tensor:
    """Times a gain along one of its two dimensions, some rows at a time."""
    made = torch.empty_like(tensor)
    step = max(1, _SLAB // tensor.shape[1])
    for start in range(0, len(tensor), step):
        gain = gain_N[start : start + step, None] if dim == 0 else gain_N
        made[start : start + step] = tensor[start : start + step].to(gain_N.dtype) * gain
    return made


def _turned(tensor: Tensor, dim: int, basis_NN: Tensor) -> Tensor:
    """x @ basis along a dimension, some rows at a time: a vocabulary's weight would else be held in float32."""
    last = tensor.movedim(dim, -1)
    rows = last.reshape(-1, len(basis_NN))
    turned = torch.empty_like(rows)
    step = max(1, _SLAB // len(basis_NN))
    for start in range(0, len(rows), step):
        turned[start : start + step] = rows[start : start + step].to(basis_NN.dtype) @ basis_NN
    return turned.reshape(last.shape).movedim(-1, dim)


def precise(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
