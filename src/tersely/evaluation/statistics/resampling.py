"""Resamples of observations with a fixed seed.

R = resamples, K = observations (or groups of them), N = numbers of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Numbers = Sequence[float] | Array
RESAMPLES = 4999
_CHUNK = 30_000
"""Weights at a time: so few that BLAS starts no threads, which on a busy machine cost a hundred times more."""
_GROUPS = 1000
"""More observations than this are put into as many random groups."""
_FEW = 5
"""Fewer observations than this have too few different resamples; Student's t is used alone."""


def resampled(count: int) -> bool:
    """Whether so many documents or items are resampled; Student's t is used alone for fewer."""
    return count >= _FEW


def grouped(rows_KN: Array, seed: int) -> Array:
    """The rows, or sums of them over 1000 random groups, which keep the mean and its error's scale and skewness."""
    if len(rows_KN) <= _GROUPS:
        return rows_KN
    group_K = np.random.default_rng(seed).permutation(len(rows_KN)) % _GROUPS
    return np.stack([np.bincount(group_K, column, _GROUPS) for column in rows_KN.T], 1)


def resample(rows_KN: Array, seed: int) -> Array:
    """Sums of k rows drawn with replacement from k, R x N."""
    counts_RK = _counts(len(rows_KN), seed)
    rows = max(1, _CHUNK // len(rows_KN))
    return np.concatenate([counts_RK[i : i + rows].astype(np.float64) @ rows_KN for i in range(0, RESAMPLES, rows)])


@lru_cache(maxsize=4)
def _counts(k: int, seed: int) -> NDArray[np.uint8]:
    """How often each of k is drawn, R x K; at most 5 MB. An evaluation asks for the same ones again and again."""
    generator = np.random.default_rng(seed)
    counts_RK = np.empty((RESAMPLES, k), np.uint8)
    for row_K in counts_RK:
        row_K[:] = np.bincount(generator.integers(0, k, k), minlength=k)
    counts_RK.flags.writeable = False
    return counts_RK


def outer(sorted_R: Array) -> tuple[float, float]:
    """2.5 % and 97.5 % of a sorted sample of which 40 divides the size plus one."""
    outside = (len(sorted_R) + 1) // 40
    return float(sorted_R[outside - 1]), float(sorted_R[-outside])
