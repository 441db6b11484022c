"""Means per unit with standard errors and intervals, and paired differences of them.

R = resamples, K = observations (or groups of them).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from tersely.evaluation.statistics.quantiles import UNBOUNDED, student_p, student_quantile, wilson
from tersely.evaluation.statistics.resampling import RESAMPLES, Array, Numbers, grouped, outer, resample, resampled
from tersely.results import Estimate

_STRETCH = 4.0


def ratio(totals: Numbers, sizes: Numbers, *, seed: int = 0, bounds: tuple[float, float] = UNBOUNDED) -> Estimate:
    """Mean per unit of size, R = sum(totals) / sum(sizes), with k clusters as the independent observations.

    Tokens of one document are not independent of each other, so the document is the unit of sampling. The
    variance is the delta method's for a ratio of two means (Cochran, Sampling Techniques, 3rd ed., 6.3):

        var(R) = k / (k - 1) * sum((totals_i - R * sizes_i)^2) / sum(sizes)^2

    Clusters are taken as independent; neighbouring windows of one long text are not quite, and their standard
    error is then somewhat low. For a paired difference, pass the differences of the totals.

    The interval is the wider of two on each side: Student's t with k - 1 degrees of freedom, R +- t * stderr, and the
    bootstrap-t (Efron and Tibshirani, An Introduction to the Bootstrap, 12.5), which follows a skewed distribution:

        t* = (R* - R) / stderr*  of 4999 resamples of the clusters; from R - t*_0.975 stderr to R - t*_0.025 stderr

    with the t* of the longer side times 1 + 4 / k, since few clusters show too little of a long tail. Each of the two
    alone falls short where the other does well: t for skewed totals, bootstrap-t for heavy tails on both sides. Fewer
    than 5 clusters have Student's t alone, and one has no bounds. Where all clusters show the same R the interval has
    no width. bounds: what R can be at all, for example 0 and 1 for a share.

    Raises ValueError: lengths differ, a number is not finite, a size is negative, or the sizes sum to 0.
    """
    found = _clusters(totals, sizes, seed)[0]
    if math.isinf(found.stderr):
        return found
    return replace(
        found, low=min(found.value, max(found.low, bounds[0])), high=max(found.value, min(found.high, bounds[1]))
    )


def paired(totals: Numbers, sizes: Numbers, *, seed: int = 0) -> tuple[Estimate, float]:
    """A mean difference per unit of size, and the two-sided p of no difference, from the same resamples.

    totals: differences of two models on the same clusters; the estimate is `ratio`'s. p inverts the interval, so that
    p < 0.05 where the interval leaves out 0: the larger of Student's p and

        2 * (b + 1) / (R + 1),  b = resamples whose t* lies beyond R / stderr on that side

    It is never 0. Where every cluster shows the same difference, p = 2^(1 - k), the chance that k signs agree.
    Raises ValueError: as `ratio`.
    """
    return _clusters(totals, sizes, seed)


def mean(values: Numbers, *, seed: int = 0) -> Estimate:
    """Mean of items that count alike.

    For right or wrong (all values 0 or 1) the interval is Wilson's: the shares p that a score test does not reject,
    |p - mean| <= 1.96 * sqrt(p * (1 - p) / n) (Wilson 1927, JASA 22); it has a width where all items are right.
    Otherwise as `ratio`. One item has no bounds. Raises ValueError: no values, or one that is not finite.
    """
    if not len(values):
        raise ValueError("no values: a mean needs at least one")
    items = len(values)
    if items < 2 or not all(value in (0, 1) for value in values):
        return ratio(values, [1.0] * items, seed=seed)
    share = math.fsum(values) / items
    return Estimate(share, math.sqrt(share * (1 - share) / (items - 1)), *wilson(share, items))


@dataclass(frozen=True, eq=False)
class _Pivot:
    """The distribution of (R* - R) / stderr* over resamples, sorted, and by what each side of it is stretched."""

    t_R: Array
    below: float
    above: float


def _clusters(totals: Numbers, sizes: Numbers, seed: int) -> tuple[Estimate, float]:
    """The estimate of `ratio`, and the p of `paired`."""
    total_K, size_K = np.asarray(totals, np.float64), np.asarray(sizes, np.float64)
    finite = np.isfinite(total_K).all() and np.isfinite(size_K).all()
    size = math.fsum(size_K) if finite else math.nan
    if total_K.ndim != 1 or total_K.shape != size_K.shape or not size > 0 or (size_K < 0).any():
        raise ValueError(
            f"{total_K.size} totals and {size_K.size} sizes (sum {size}): expected as many, all finite, "
            "no size below 0, their sum above 0"
        )
    value, k = math.fsum(total_K) / size, len(total_K)
    if k < 2:
        return Estimate(value, math.inf, *UNBOUNDED), 1.0
    off_K = total_K - value * size_K
    if (np.abs(off_K) <= 1e-12 * np.maximum(np.abs(total_K), abs(value) * size_K)).all():
        p = 1.0 if value == 0 else max(2 / (RESAMPLES + 1), 2.0 ** (1 - k))
        return Estimate(value, 0.0, value, value), p
    stderr = math.sqrt(k / (k - 1) * math.fsum(off_K**2)) / size
    above = below = student_quantile(k - 1)
    p = student_p(value / stderr, k - 1)
    if resampled(k):
        order_K = np.lexsort((size_K, off_K))
        pivot = _pivot(grouped(np.stack([off_K[order_K], size_K[order_K]], 1), seed), k, seed)
        least, most = outer(pivot.t_R)
        above, below = max(above, most * pivot.above), max(below, -least * pivot.below)
        t = value / stderr
        beyond = pivot.t_R >= t / pivot.above * (1 - 1e-9) if t > 0 else pivot.t_R <= t / pivot.below * (1 - 1e-9)
        p = max(p, min(1.0, 2 * (int(beyond.sum()) + 1) / (RESAMPLES + 1)))
    return Estimate(value, stderr, value - above * stderr, value + below * stderr), p


def _pivot(cluster_K2: Array, k: int, seed: int) -> _Pivot:
    """t* of resampled clusters, from each one's (total - R * size, size).

    With E, S the resampled sums of the two columns: R* - R = E / S = d, and the squares of the residuals about R* are
    sum (e - d s)^2 = sum e^2 - 2 d sum e s + d^2 sum s^2. A resample without any spread (few clusters differ from
    the others, and it has none of them) takes the largest residual over sqrt 2 for its error.
    """
    e_K, s_K = (column / np.abs(column).max() for column in cluster_K2.T)
    columns_K5 = np.stack([e_K, s_K, e_K * e_K, e_K * s_K, s_K * s_K], 1)
    groups = len(e_K)
    e, s, ee, es, ss = resample(columns_K5, seed).T
    d = e / np.maximum(s, 1e-9)
    squares = groups / (groups - 1) * (ee - 2 * d * es + d * d * ss)
    t_R = np.sort(e / np.sqrt(np.where(squares > 1e-12 * ee, squares, 0.5)))
    least, most = outer(t_R)
    stretch = 1 + _STRETCH / k
    return _Pivot(t_R, stretch if -least > most else 1.0, stretch if most >= -least else 1.0)
