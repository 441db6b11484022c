"""Least squares: what reads a space makes up for the coordinates that are cut out of it.

    x ~ x_K R,   R = (G_KK + damping)^-1 G_K,    W' = W_K + W_R G_RK (G_KK + damping)^-1

with G = sum over tokens of x x^T, K the kept coordinates and R the removed ones: of all matrices on the kept
coordinates, W' gives outputs nearest to those of W, in the mean over the calibration text. With a bias, G is taken
about the mean, and the bias takes up what is left of it. (The update of OBS, as SparseGPT and ZipLM have it: Kurtic et
al., NeurIPS 2023, arXiv 2302.04089.)

Shapes: O outputs, I inputs, K kept inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersely.measure import Statistics

_DAMPING = 1e-2
_SLAB = 1 << 24
"""Elements of a weight that are worked on together."""
_FEWEST = 1.0
"""Tokens for each input below which nothing is refitted."""


@dataclass(frozen=True, eq=False)
class Refitted:
    """A weight after some of its inputs were cut."""

    weight_OK: Tensor
    """Of the kept inputs, in its dtype, on its device."""
    bias_O: Tensor | None
    """float32."""
    note: str = ""
    """What the user should know."""


def refitted(weight_OI: Tensor, bias_O: Tensor | None, stats: Statistics | None, kept_K: Tensor) -> Refitted:
    """The weight that makes up best for the inputs that are cut; worked on a few rows at a time.

    kept_K: the inputs that stay, ascending. stats: of the inputs, with a Gram matrix and, for a bias, means.
    """
    columns = weight_OI.shape[1]
    cut_I = torch.ones(columns, dtype=torch.bool)
    cut_I[kept_K] = False
    cut_R = cut_I.nonzero()[:, 0]
    mean_I = None if stats is None or bias_O is None else stats.mean_I
    share_KR, note = _share(stats, mean_I, kept_K, cut_R, columns)
    device = share_KR.device if share_KR is not None else weight_OI.device
    kept, cut, moved = kept_K.to(device), cut_R.to(device), []
    new_OK = weight_OI.new_empty((len(weight_OI), len(kept_K)))
    step = max(1, _SLAB // columns)
    for start in range(0, len(weight_OI), step):
        before = weight_OI[start : start + step].to(device).float()
        after = before[:, kept]
        if share_KR is not None:
            after += before[:, cut] @ share_KR.t()
            if mean_I is not None:
                moved.append(before @ mean_I - after @ mean_I[kept])
        new_OK[start : start + step] = after.to(new_OK)
    if bias_O is not None and moved:
        bias_O = bias_O.to(device).float() + torch.cat(moved)
    return Refitted(new_OK, bias_O, note)


def _share(
    stats: Statistics | None, mean_I: Tensor | None, kept_K: Tensor, cut_R: Tensor, columns: int
) -> tuple[Tensor | None, str]:
    """(G_KK + damping)^-1 G_KR, float32: what each kept input takes of each that is cut; None, and why, for nothing."""
    if stats is None or stats.gram_II is None or stats.tokens < _FEWEST * columns:
        few = 0 if stats is None else stats.tokens
        return None, f"{few} calibration tokens for {columns} inputs: not refitted"
    gram_II = stats.gram_II / stats.tokens
    if mean_I is not None:
        gram_II = gram_II - torch.outer(mean_I, mean_I)
    kept, cut = kept_K.to(gram_II.device), cut_R.to(gram_II.device)
    inner_KK = gram_II[kept[:, None], kept]
    size = inner_KK.diagonal().mean()
    damping = _DAMPING
    while damping <= 1:
        damped = inner_KK.clone()
        damped.diagonal().add_(damping * size + torch.finfo(torch.float32).tiny)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return torch.cholesky_solve(gram_II[kept[:, None], cut], lower), ""
        damping *= 10
    return None, "no Cholesky factor with damping up to 1: not refitted"
