"""The largest singular values of a matrix, with their vectors.

Shapes: M, N any matrix, R how many are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FEW = 8
"""So many times more singular values than are kept: from there on they are sought by iteration."""
_SMALL = 512
_TOLERANCE = 1e-4
_ITERATIONS = 40
_USUAL = 15
"""Iterations that the error of a rounded weight takes, whose singular values fall slowly."""


def largest_singular(matrix_MN: Tensor, rank: int, energy: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """U (M, R), sigma (R,) falling, V^T (R, N): U diag(sigma) V^T is the best approximation of rank R.

    energy above 0: the least R <= rank with sum of the R largest sigma >= energy * sum of all.

    Where `rank` is small against the matrix, a subspace is iterated from a fixed start until what it misses of the
    matrix (its squared norm less the squared sigma, exactly) falls by less than 1e-4 of itself; where it does not
    get there, and in small matrices, all singular values are computed. (Halko et al., arXiv 0909.4061.)
    """
    rows, columns = matrix_MN.shape
    rank = min(rank, rows, columns)
    if not energy and _few(rows, columns, rank):
        found = _iterate(matrix_MN, rank)
        if found is not None:
            return found
    left, sigma, right = torch.linalg.svd(matrix_MN, full_matrices=False)
    if energy and sigma.sum() > 0:
        share = sigma.cumsum(0) / sigma.sum()
        rank = min(rank, int((share < energy).sum()) + 1)
    return left[:, :rank], sigma[:rank], right[:rank]


def singular_flops(rows: int, columns: int, rank: int, energy: float = 0.0) -> float:
    """What `largest_singular` takes of a matrix of this shape, as a rule."""
    if not energy and _few(rows, columns, rank):
        return _USUAL * 4.0 * rows * columns * _width(rank)
    least, most = sorted((rows, columns))
    return 6.0 * most * least**2 + 20.0 * least**3


def _few(rows: int, columns: int, rank: int) -> bool:
    least = min(rows, columns)
    return least > _SMALL and rank * _FEW <= least


def _width(rank: int) -> int:
    """Of the subspace that is iterated."""
    return rank + max(16, rank // 2)


def _iterate(matrix_MN: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """`largest_singular` by subspace iteration; None where it does not converge."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn((matrix_MN.shape[1], _width(rank)), generator=generator, dtype=torch.float64)
    basis = start.to(matrix_MN)
    whole = matrix_MN.square().sum()
    kept = torch.zeros_like(whole)
    for _ in range(_ITERATIONS):
        left = torch.linalg.qr(matrix_MN @ basis).Q
        basis, small = torch.linalg.qr((left.t() @ matrix_MN).t())
        u, sigma, v = torch.linalg.svd(small.t())
        before, kept = kept, sigma[:rank].square().sum()
        if kept - before <= _TOLERANCE * (whole - kept):
            return left @ u[:, :rank], sigma[:rank], v[:rank] @ basis.t()
    return None
