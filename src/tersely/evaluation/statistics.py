"""Means, shares and areas under curves with standard errors and 95 % intervals; tests of paired differences.

One document (or window, or item) is one observation: its tokens are not independent of each other. What resamples does
so with a fixed seed, and what it gives does not depend on the order of the observations. How often the intervals hold
the truth is measured by benchmarks/bench_statistics.py and shown in docs/statistics.md.

R = resamples, K = observations (or groups of them), B = bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tersely.results import Calibration, Estimate, Reliability

Array = NDArray[np.float64]
Numbers = Sequence[float] | Array

_Z, _Z_POWER = 1.959963984540054, 0.8416212335729143
"""Normal quantiles: of 97.5 %, for intervals and tests; of 80 %, for the power."""
_RESAMPLES = 4999
_CHUNK = 30_000
"""Weights at a time: so few that BLAS starts no threads, which on a busy machine cost a hundred times more."""
_GROUPS = 1000
"""More observations than this are put into as many random groups."""
_FEW = 5
"""Fewer observations than this have too few different resamples; Student's t is used alone."""
_STRETCH = 4.0
_BINS = 10
_UNBOUNDED = (-math.inf, math.inf)


def ratio(totals: Numbers, sizes: Numbers, *, seed: int = 0, bounds: tuple[float, float] = _UNBOUNDED) -> Estimate:
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


def resampled(count: int) -> bool:
    """Whether so many documents or items are resampled; Student's t is used alone for fewer."""
    return count >= _FEW


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
    return Estimate(share, math.sqrt(share * (1 - share) / (items - 1)), *_wilson(share, items))


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided p of no difference between two models' answers to the same items: exact, from those that changed.

    If neither model is better, each item that only one of them answers rightly is as likely to be lost as gained:
    p = min(1, 2 * P(X <= min(lost, gained))), X ~ Binomial(lost + gained, 1/2) (McNemar 1947, Psychometrika 12).
    Items that both answer rightly, or neither, say nothing about the difference. Raises ValueError: a negative count.
    """
    if lost < 0 or gained < 0:
        raise ValueError(f"{lost} lost, {gained} gained: expected counts of 0 or more")
    if lost == gained:
        return 1.0
    few, many = sorted((lost, gained))
    return min(1.0, 2 * _incomplete_beta(many, few + 1, 0.5))


def share_difference(both: int, lost: int, gained: int, neither: int) -> Estimate:
    """Share of items that a model answers rightly, minus its base's, on the same items, from the four counts.

    both, neither: items that both, or neither, answer rightly; lost: only the base; gained: only the model. The
    interval is Tango's (1998, Statistics in Medicine 17): the differences d that a score test does not reject,

        |gained - lost - n d| <= 1.96 * sqrt(n * (2 q + d (1 - d))),  q = the likeliest share of lost items given d

    It has a width where no answer changed, and leaves out 0 where McNemar's test without correction rejects.
    One item has no bounds. Raises ValueError: a negative count, or no items.
    """
    items = both + lost + gained + neither
    if min(both, lost, gained, neither) < 0 or not items:
        raise ValueError(f"{both}, {lost}, {gained}, {neither}: expected four counts of 0 or more, not all 0")
    value = (gained - lost) / items
    if items < 2:
        return Estimate(value, math.inf, *_UNBOUNDED)
    stderr = math.sqrt(max(0.0, (lost + gained) / items - value * value) / (items - 1))

    def score(d: float) -> float:
        linear = (2 * items - gained + lost) * d - lost - gained
        root = math.sqrt(max(0.0, linear * linear + 8 * items * lost * d * (1 - d)))
        variance = items * ((root - linear) / (2 * items) + d * (1 - d))
        off = gained - lost - items * d
        return off / math.sqrt(variance) if variance > 1e-12 else math.copysign(math.inf, off) if off else 0.0

    def where(low: float, high: float, target: float) -> float:
        """Where the score, which falls with d, passes the target."""
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if score(middle) > target else (low, middle)
        return (low + high) / 2

    low = -1.0 if value == -1 else where(-1.0, value, _Z)
    high = 1.0 if value == 1 else where(value, 1.0, -_Z)
    return Estimate(value, stderr, low, high)


def holm(ps: Sequence[float]) -> tuple[float, ...]:
    """p-values corrected for their number, in their order (Holm 1979, Scandinavian Journal of Statistics 6).

    Of m sorted p-values the i-th becomes max over j <= i of min(1, (m - j + 1) * p_j). Where all below 0.05 are called
    differences, the chance of any wrong call is at most 5 %, however the tests depend on each other.
    Raises ValueError: a p outside 0 to 1.
    """
    if wrong := [p for p in ps if not 0 <= p <= 1]:
        raise ValueError(f"p = {wrong[0]}: expected 0 to 1")
    adjusted, most = [0.0] * len(ps), 0.0
    for place, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        most = max(most, min(1.0, (len(ps) - place) * ps[i]))
        adjusted[i] = most
    return tuple(adjusted)


def detectable(difference: Estimate) -> float:
    """The smallest true difference that a sample like this one finds; inf for one document or item.

    Found: with a power of 80 %, by a two-sided test at the 5 % level of this comparison alone. For many documents that
    is (1.96 + 0.84) * stderr; here 1 + 0.84 / 1.96 times the longer side of the interval, which knows of few documents
    and long tails.
    """
    return (1 + _Z_POWER / _Z) * max(difference.value - difference.low, difference.high - difference.value)


def detectable_share(items: int, changed: int) -> float:
    """The smallest true difference of shares that so many items find, 0 to 1; inf where they cannot find any.

    changed: items that only one of the two models answers rightly; r = changed / items. Solved for d (Connor 1987,
    Biometrics 43): d * sqrt(items) = 1.96 * sqrt(r) + 0.84 * sqrt(r - d^2), where r is at least d, since a difference
    needs answers that change. Fewer than 3 changed ones count as 3: none seen among n still allows a rate of 3 / n.
    Raises ValueError: no items, or more changed than there are.
    """
    if items < 1 or not 0 <= changed <= items:
        raise ValueError(f"{changed} of {items} items changed: expected 0 to all of 1 or more")
    if mcnemar(items, 0) >= 0.05:
        return math.inf
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if items_needed(middle, max(changed, 3) / items) > items else (low, middle)
    return high


def items_needed(difference: float, rate: float) -> float:
    """Items that find a true difference of shares (0 to 1), where a share `rate` of the answers changes.

    n = ((1.96 * sqrt(r) + 0.84 * sqrt(r - d^2)) / d)^2 with r = max(rate, d); see `detectable_share`.
    Raises ValueError: a difference that is not above 0 and at most 1.
    """
    if not 0 < difference <= 1:
        raise ValueError(f"a difference of {difference}: expected more than 0, at most 1")
    rate = min(1.0, max(rate, difference))
    both = _Z * math.sqrt(rate) + _Z_POWER * math.sqrt(max(0.0, rate - difference**2))
    return (both / difference) ** 2


def auc(scores: Numbers, labels: Sequence[bool]) -> Estimate:
    """Area under the ROC curve: the chance that a member scores above another item, ties counting one half.

    The variance is DeLong's (DeLong, DeLong and Clarke-Pearson 1988, Biometrics 44): with a member's placement the
    share of the others below it, var(placements of members) / members + var(placements of others) / others. The
    interval is taken on the logit, log(a / (1 - a)) +- 1.96 * stderr / (a * (1 - a)). Where the scores separate the two
    perfectly it is Wilson's, of as many pairs as the smaller side has. One member, or one other, has no bounds.
    Raises ValueError: lengths differ, a score is not finite, or members or others are missing.
    """
    members, others = _placements(scores, labels)
    value, stderr = float(members.mean()), _delong(members, others)
    if math.isinf(stderr):
        return Estimate(value, stderr, *_UNBOUNDED)
    if value in (0, 1):
        return Estimate(value, stderr, *_wilson(value, min(len(members), len(others))))
    logit, width = math.log(value / (1 - value)), _Z * stderr / (value * (1 - value))
    return Estimate(value, stderr, _logistic(logit - width), _logistic(logit + width))


def auc_difference(model_scores: Numbers, base_scores: Numbers, labels: Sequence[bool]) -> tuple[Estimate, float]:
    """AUC of a model minus its base's on the same items, and the two-sided p of no difference (DeLong, paired).

    The variance is that of the differences of the placements, see `auc`; interval and p are Student's t, with as many
    degrees of freedom as the smaller side has items, less one. Where neither spread nor chance is left (one model
    separates perfectly, the other not at all), both are those of as many pairs of answers as the smaller side has.
    Raises ValueError: as `auc`.
    """
    if len(model_scores) != len(base_scores):
        raise ValueError(f"{len(model_scores)} scores of the model, {len(base_scores)} of the base: expected as many")
    (members, others), (base_members, base_others) = (_placements(s, labels) for s in (model_scores, base_scores))
    value = float(members.mean() - base_members.mean())
    stderr = _delong(members - base_members, others - base_others)
    pairs = min(len(members), len(others))
    if math.isinf(stderr):
        return Estimate(value, stderr, *_UNBOUNDED), 1.0
    if stderr > 1e-12:
        width = _student_quantile(pairs - 1) * stderr
        found = Estimate(value, stderr, max(-1.0, value - width), min(1.0, value + width))
        return found, _student_p(value / stderr, pairs - 1)
    if abs(value) <= 1e-12:
        return Estimate(0.0, 0.0, 0.0, 0.0), 1.0
    changed = round(abs(value) * pairs)
    counts = (changed, 0) if value < 0 else (0, changed)
    bounds = share_difference(0, *counts, pairs - changed)
    return Estimate(value, stderr, min(bounds.low, value), max(bounds.high, value)), mcnemar(*counts)


def calibration(probabilities: Sequence[Sequence[float]], answers: Sequence[int], *, seed: int = 0) -> Calibration:
    """Whether a model's certainty in multiple-choice answers is earned; see `Calibration` for the formulas.

    probabilities: of each item's choices, in any one unit (they are divided by their sum); items may have different
    numbers of choices. answers: index of the right choice of each item. Of equally likely choices the first is chosen.
    bins: all ten, those without items as zeros.

    The calibration error is biased upward, all the more with few items: even a model whose certainty is earned shows
    gaps by chance. Its standard error and interval come from 4999 resamples of the items. From e* = errors of the
    resamples, e = the error found, bias b = mean(e*) - e, and the distance D* = sum over bins of |gap* - gap|:

        low = 0 if e <= D*_0.975 (what chance alone can make), else min(e*_0.025 - 2 b, 2 e - e*_0.975)
        high = e*_0.975 - b

    Raises ValueError: lengths differ, no items, no choices, a probability that is negative or not finite, all of an
    item's 0, or an answer that is none of the choices.
    """
    if len(probabilities) != len(answers) or not len(answers):
        raise ValueError(f"{len(probabilities)} items, {len(answers)} answers: expected as many, at least one")
    confidences, rights, briers = [], [], []
    for place, (row, answer) in enumerate(zip(probabilities, answers, strict=True)):
        whole = math.fsum(row)
        if not all(p >= 0 for p in row) or not 0 < whole < math.inf or not 0 <= answer < len(row):
            raise ValueError(
                f"item {place}: answer {answer} of probabilities {list(row)}: expected 0 or more, not all 0"
            )
        risks = [p / whole for p in row]
        chosen = max(range(len(risks)), key=risks.__getitem__)
        confidences.append(risks[chosen])
        rights.append(float(chosen == answer))
        briers.append(math.fsum((risk - (choice == answer)) ** 2 for choice, risk in enumerate(risks)))
    confidence_K, right_K = np.array(confidences), np.array(rights)
    bin_K = np.minimum((confidence_K * _BINS).astype(np.int64), _BINS - 1)
    count_B = np.bincount(bin_K, minlength=_BINS)
    bins = tuple(
        Reliability(int(n), float(sure / n) if n else 0.0, float(right / n) if n else 0.0)
        for n, sure, right in zip(
            count_B,
            np.bincount(bin_K, confidence_K, _BINS),
            np.bincount(bin_K, right_K, _BINS),
            strict=True,
        )
    )
    brier = ratio(briers, [1.0] * len(briers), seed=seed, bounds=(0.0, 2.0))
    return Calibration(brier, _calibration_error(right_K - confidence_K, bin_K, seed), bins)


def _calibration_error(gap_K: Array, bin_K: NDArray[np.int64], seed: int) -> Estimate:
    """sum over bins of |sum of gaps| / n, from right minus confidence of each item."""
    n = len(gap_K)
    error = float(np.abs(np.bincount(bin_K, gap_K, _BINS)).sum()) / n
    if n < 2:
        return Estimate(error, math.inf, *_UNBOUNDED)
    gap_KB = np.zeros((n, _BINS))
    gap_KB[np.arange(n), bin_K] = gap_K
    gap_KB = _grouped(gap_KB[np.lexsort((gap_K, bin_K))], seed)
    resampled_RB = _resampled(gap_KB, seed) / n
    error_R = np.sort(np.abs(resampled_RB).sum(1))
    chance_R = np.sort(np.abs(resampled_RB - gap_KB.sum(0) / n).sum(1))
    least, most = _outer(error_R)
    bias = float(error_R.mean()) - error
    low = 0.0 if error <= _outer(chance_R)[1] else min(least - 2 * bias, 2 * error - most)
    return Estimate(error, float(error_R.std()), min(error, max(0.0, low)), min(1.0, max(error, most - bias)))


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
        return Estimate(value, math.inf, *_UNBOUNDED), 1.0
    off_K = total_K - value * size_K
    if (np.abs(off_K) <= 1e-12 * np.maximum(np.abs(total_K), abs(value) * size_K)).all():
        p = 1.0 if value == 0 else max(2 / (_RESAMPLES + 1), 2.0 ** (1 - k))
        return Estimate(value, 0.0, value, value), p
    stderr = math.sqrt(k / (k - 1) * math.fsum(off_K**2)) / size
    above = below = _student_quantile(k - 1)
    p = _student_p(value / stderr, k - 1)
    if resampled(k):
        order_K = np.lexsort((size_K, off_K))
        pivot = _pivot(_grouped(np.stack([off_K[order_K], size_K[order_K]], 1), seed), k, seed)
        least, most = _outer(pivot.t_R)
        above, below = max(above, most * pivot.above), max(below, -least * pivot.below)
        t = value / stderr
        beyond = pivot.t_R >= t / pivot.above * (1 - 1e-9) if t > 0 else pivot.t_R <= t / pivot.below * (1 - 1e-9)
        p = max(p, min(1.0, 2 * (int(beyond.sum()) + 1) / (_RESAMPLES + 1)))
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
    e, s, ee, es, ss = _resampled(columns_K5, seed).T
    d = e / np.maximum(s, 1e-9)
    squares = groups / (groups - 1) * (ee - 2 * d * es + d * d * ss)
    t_R = np.sort(e / np.sqrt(np.where(squares > 1e-12 * ee, squares, 0.5)))
    least, most = _outer(t_R)
    stretch = 1 + _STRETCH / k
    return _Pivot(t_R, stretch if -least > most else 1.0, stretch if most >= -least else 1.0)


def _outer(sorted_R: Array) -> tuple[float, float]:
    """2.5 % and 97.5 % of a sorted sample of which 40 divides the size plus one."""
    outside = (len(sorted_R) + 1) // 40
    return float(sorted_R[outside - 1]), float(sorted_R[-outside])


def _grouped(rows_KN: Array, seed: int) -> Array:
    """The rows, or sums of them over 1000 random groups, which keep the mean and its error's scale and skewness."""
    if len(rows_KN) <= _GROUPS:
        return rows_KN
    group_K = np.random.default_rng(seed).permutation(len(rows_KN)) % _GROUPS
    return np.stack([np.bincount(group_K, column, _GROUPS) for column in rows_KN.T], 1)


def _resampled(rows_KN: Array, seed: int) -> Array:
    """Sums of k rows drawn with replacement from k, R x N."""
    counts_RK = _counts(len(rows_KN), seed)
    rows = max(1, _CHUNK // len(rows_KN))
    return np.concatenate([counts_RK[i : i + rows].astype(np.float64) @ rows_KN for i in range(0, _RESAMPLES, rows)])


@lru_cache(maxsize=4)
def _counts(k: int, seed: int) -> NDArray[np.uint8]:
    """How often each of k is drawn, R x K; at most 5 MB. An evaluation asks for the same ones again and again."""
    generator = np.random.default_rng(seed)
    counts_RK = np.empty((_RESAMPLES, k), np.uint8)
    for row_K in counts_RK:
        row_K[:] = np.bincount(generator.integers(0, k, k), minlength=k)
    counts_RK.flags.writeable = False
    return counts_RK


def _placements(scores: Numbers, labels: Sequence[bool]) -> tuple[Array, Array]:
    """Share of the others below each member, and of the members above each other item; ties count one half."""
    score_K, member_K = np.asarray(scores, np.float64), np.asarray(labels, bool)
    if score_K.ndim != 1 or score_K.shape != member_K.shape or not np.isfinite(score_K).all():
        raise ValueError(f"{score_K.size} scores, {member_K.size} labels: expected as many, all scores finite")
    members, others = score_K[member_K], score_K[~member_K]
    if not len(members) or not len(others):
        raise ValueError(f"{len(members)} members, {len(others)} others: expected at least one of each")
    sorted_members, sorted_others = np.sort(members), np.sort(others)
    below = np.searchsorted(sorted_others, members, "left") + np.searchsorted(sorted_others, members, "right")
    under = np.searchsorted(sorted_members, others, "left") + np.searchsorted(sorted_members, others, "right")
    return below / (2 * len(others)), 1 - under / (2 * len(members))


def _delong(members: Array, others: Array) -> float:
    if min(len(members), len(others)) < 2:
        return math.inf
    return math.sqrt(members.var(ddof=1) / len(members) + others.var(ddof=1) / len(others))


def _wilson(share: float, n: int) -> tuple[float, float]:
    z2 = _Z * _Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return (0.0 if share == 0 else middle - half), (1.0 if share == 1 else middle + half)


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def _student_p(t: float, degrees: int) -> float:
    """P(|T| >= |t|) = I_x(degrees / 2, 1 / 2) with x = degrees / (degrees + t^2)."""
    return _incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))


@lru_cache
def _student_quantile(degrees: int) -> float:
    """t of 97.5 %."""
    low, high = 1.0, 13.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_p(middle, degrees) > 0.05 else (low, middle)
    return (low + high) / 2


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b), the regularized incomplete beta function, by its continued fraction (DLMF 8.17.22).

    P(X <= m) of a binomial with n trials and chance p is I_(1 - p)(n - m, m + 1).
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x) - math.log(a)
    )
    # Lentz's method, with the two terms of a step together.
    tiny = 1e-300
    c, d = 1.0, 1 / _apart(1 - (a + b) * x / (a + 1), tiny)
    fraction = d
    for m in range(1, 1_000_000):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _apart(1 + term * d, tiny)
            c = _apart(1 + term / c, tiny)
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * fraction


def _apart(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny
