"""The GPTQ sweep: round a weight column by column, each column making up for the errors of those before it.

Shapes: O outputs, I inputs; a leading I means that the layout is transposed (inputs first), in which one column of
the weight is contiguous.

The loop is the equivalent form that needs no inverse ("LDLQ" of QuIP, arXiv 2307.13304, which proves the two equal).
With H = X X^T + damping and its factor H = R R^T, R upper triangular,

    tr(D H D^T) = sum_k R_kk^2 |d_k + sum_{j<k} d_j R_jk / R_kk|^2,   D = W - W_hat,

so column k is rounded after the errors of the columns before it are added, weighted by R_jk / R_kk. One Cholesky
factorization replaces factorization, inversion and a second factorization.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tersely.measure import Statistics

_BLOCK = 128
_INNER = 16
_PANEL = 512


@dataclass(frozen=True, eq=False)
class Factor:
    """What a sweep needs of a Gram matrix; `factorize` makes it."""

    lower_II: Tensor
    """Lower triangular L with J H J = L L^T, J reversing `order_I`: R = J L J is then the upper triangular factor."""
    order_I: Tensor
    """The columns in the order in which they are rounded."""
    damping: float
    """What the factorization took, relative to the mean of the diagonal."""


def factorize(gram_II: Tensor, *, damping: float, act_order: bool) -> Factor | None:
    """Factorize a Gram matrix with damping, which grows tenfold up to 1 where that fails; None where it fails still.

    act_order: the inputs with the largest mean square come first.
    """
    diagonal = gram_II.diagonal()
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    else:
        order = torch.arange(len(gram_II), device=gram_II.device)
    mean = float(diagonal.mean())
    flip = order.flip(0)
    while True:
        lower = gram_II[flip[:, None], flip]
        # A dead input has a zero diagonal: any positive number decouples it.
        lower.diagonal().add_(damping * mean if mean > 0 else 1.0)
        if _cholesky_(lower):
            return Factor(lower, order, damping)
        if damping >= 1:
            return None
        damping = min(damping * 10, 1.0)


def prepare(
    stats: Statistics, *, damping: float, act_order: bool, minimum_tokens: float, otherwise: str = "rounded to nearest"
) -> tuple[Factor | None, Tensor | None, str]:
    """What a sweep needs, or None where it must not be made; the mean square of each input, where enough tokens say so;
    and what the user should know of it. otherwise: what is done without a sweep."""
    gram, columns = stats.gram_II, stats.columns
    if gram is None or stats.tokens < max(1, minimum_tokens * columns):
        few = f"{stats.tokens} calibration tokens for {columns} inputs, fewer than {minimum_tokens:g} per input"
        return None, None, f"{few}: {otherwise}"
    importance_I = gram.diagonal() / stats.tokens
    factor = factorize(gram, damping=damping, act_order=act_order)
    if factor is None:
        note = f"the Gram matrix has no Cholesky factor with damping up to 1: {otherwise}"
        return None, importance_I, note
    return factor, importance_I, "" if factor.damping == damping else f"damping raised to {factor.damping:g}"


def sweep(
    weight_OI: Tensor,
    factor: Factor,
    rounded: Callable[[int, Tensor], Tensor],
    *,
    ahead: Callable[[list[int], Tensor, Tensor], None] | None = None,
    stride: int = 0,
) -> None:
    """Round every column of a float32 weight once, in the factor's order.

    rounded(column, target_O): round a column, whose index is that in the weight, to what is stored, keep the codes,
    and return their values (float32, (O,)).

    ahead(columns, current_SO, size_S): called before the first of every `stride` columns in the order of the sweep.
    current: what the S columns had best be, after the errors of all before them and none of their own, transposed.
    size: R_kk of each, whose square is what an error in it costs if the columns behind it make up for it.
    """
    columns = weight_OI.shape[1]
    order = factor.order_I.tolist()
    weight_IO = weight_OI.t()[factor.order_I]
    error_IO = torch.empty_like(weight_IO)
    diagonal = factor.lower_II.diagonal().flip(0)

    def weights(j0: int, j1: int, k0: int, k1: int) -> Tensor:
        """R_jk / R_kk transposed, (k, j), for columns j0 to j1 and k0 to k1 in the order of the sweep."""
        part = factor.lower_II[columns - j1 : columns - j0, columns - k1 : columns - k0]
        return part.flip(0, 1).div_(diagonal[k0:k1]).t()

    def look_ahead(a: int, c: int, k: int, target_BO: Tensor, inside_BB: Tensor) -> None:
        """Of a block from a whose targets know of the columns before c. With errors e of those before k, and none of
        their own, d = e R_ek R_kk^-1 for the columns from k on, R_ek / diag(R_kk) being what targets are made with."""
        assert ahead is not None
        end = min(k + stride, a + len(target_BO))
        own = slice(k - a, end - a)
        passed_SO = target_BO[own] - weight_IO[k:end]
        if k > c:
            passed_SO.addmm_(inside_BB[own, c - a : k - a], error_IO[c:k])
        current_SO = torch.linalg.solve_triangular(inside_BB[own, own], passed_SO, upper=False, unitriangular=True)
        ahead(order[k:end], current_SO.add_(weight_IO[k:end]), diagonal[k:end])

    outer, inner = _BLOCK, _INNER
    if ahead is not None:
        outer, inner = (_BLOCK // stride * stride, _INNER // stride * stride) if stride <= _INNER else (stride, _INNER)
    for a in range(0, columns, outer):
        b = min(a + outer, columns)
        target_BO = weight_IO[a:b].addmm(weights(0, a, a, b), error_IO[:a])
        inside_BB = weights(a, b, a, b)
        for c in range(a, b, inner):
            d = min(c + inner, b)
            if c > a:
                target_BO[c - a : d - a].addmm_(inside_BB[c - a : d - a, : c - a], error_IO[a:c])
            for k in range(c, d):
                if ahead is not None and (k - a) % stride == 0:
                    look_ahead(a, c, k, target_BO, inside_BB)
                target_O = target_BO[k - a]
                if k > c:
                    target_O = torch.addmv(target_O, error_IO[c:k].t(), inside_BB[k - a, c - a : k - a])
                torch.sub(weight_IO[k], rounded(order[k], target_O), out=error_IO[k])


def _cholesky_(matrix_II: Tensor) -> bool:
    """Factorize in place, block by block; the upper triangle keeps what it held. False where it is not positive."""
    size = len(matrix_II)
    for a in range(0, size, _PANEL):
        b = min(a + _PANEL, size)
        corner, failed = torch.linalg.cholesky_ex(matrix_II[a:b, a:b])
        if failed or not corner.isfinite().all():
            return False
        matrix_II[a:b, a:b] = corner
        if b == size:
            break
        panel = torch.linalg.solve_triangular(corner, matrix_II[b:, a:b].t(), upper=False).t().contiguous()
        matrix_II[b:, a:b] = panel
        for c in range(b, size, _PANEL):
            d = min(c + _PANEL, size)
            matrix_II[c:, c:d].addmm_(panel[c - b :], panel[c - b : d - b].t(), alpha=-1)
    return True
