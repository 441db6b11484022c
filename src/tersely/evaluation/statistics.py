"""Means over tokens with standard errors over the documents or windows that the tokens came from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, in the same unit; stderr is inf where one cluster shows no spread."""

    value: float
    stderr: float


def ratio(totals: Sequence[float], sizes: Sequence[float]) -> Estimate:
    """Mean per unit of size, R = sum(totals) / sum(sizes), with k clusters as the independent observations.

    Tokens of one document are not independent of each other, so the document is the unit of sampling. The
    variance is the delta method's for a ratio of two means (Cochran, Sampling Techniques, 3rd ed., 6.3):

        var(R) = k / (k - 1) * sum((totals_i - R * sizes_i)^2) / sum(sizes)^2

    Clusters are taken as independent; neighbouring windows of one long text are not quite, and their standard
    error is then somewhat low. For a paired difference, pass the differences of the totals.
    Raises ValueError: lengths differ, or the sizes do not sum to something positive.
    """
    size = math.fsum(sizes)
    if len(totals) != len(sizes) or size <= 0:
        raise ValueError(f"{len(totals)} totals and {len(sizes)} sizes (sum {size}): expected as many, sum positive")
    value = math.fsum(totals) / size
    clusters = len(totals)
    if clusters < 2:
        return Estimate(value, math.inf)
    squares = math.fsum((total - value * n) ** 2 for total, n in zip(totals, sizes, strict=True))
    return Estimate(value, math.sqrt(clusters / (clusters - 1) * squares) / size)
