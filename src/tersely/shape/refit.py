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
_FEWEST = 1.0
"""Tokens for each input below which nothing is refitted."""


@dataclass(frozen=True, eq=False)
class Refitted:
    """A weight after some of its inputs were cut."""

    weight_OI: Tensor
    """float32, with zeros where inputs are cut."""
    bias_O: Tensor | None
    note: str = ""
    """What the user should know."""


def refitted(weight_OI: Tensor, bias_O: Tensor | None, stats: Statistics | None, kept_K: Tensor) -> Refitted:
    """The weight that makes up best for the inputs that are cut.

    kept_K: the inputs that stay. stats: of the inputs, with a Gram matrix and, for a bias, means.
    """
    columns = weight_OI.shape[1]
    cut_I = torch.ones(columns, dtype=torch.bool)
    cut_I[kept_K] = False
    device = stats.device if stats is not None else weight_OI.device
    weight = weight_OI.to(device).float()
    masked_OI = weight.masked_fill(cut_I.to(device), 0.0)
    if stats is None or stats.gram_II is None or stats.tokens < _FEWEST * columns:
        few = 0 if stats is None else stats.tokens
        return Refitted(masked_OI, bias_O, f"{few} calibration tokens for {columns} inputs: not refitted")
    gram_II, mean_I = stats.gram_II / stats.tokens, stats.mean_I
    if bias_O is not None and mean_I is not None:
        gram_II = gram_II - torch.outer(mean_I, mean_I)
    kept, cut = kept_K.to(device), cut_I.to(device).nonzero()[:, 0]
    inner_KK = gram_II[kept[:, None], kept]
    size = inner_KK.diagonal().mean()
    damping = _DAMPING
    while True:
        damped = inner_KK.clone()
        damped.diagonal().add_(damping * size + torch.finfo(torch.float32).tiny)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            break
        damping *= 10
        if damping > 1:
            return Refitted(masked_OI, bias_O, "no Cholesky factor with damping up to 1: not refitted")
    added_KO = torch.cholesky_solve(gram_II[kept[:, None], cut] @ weight[:, cut].t(), lower)
    masked_OI[:, kept] += added_KO.t()
    if bias_O is not None and mean_I is not None:
        bias_O = bias_O.to(device).float() + (weight - masked_OI) @ mean_I
    return Refitted(masked_OI, bias_O)
