"""Areas under ROC curves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tersely.evaluation.statistics.quantiles import UNBOUNDED, Z, student_p, student_quantile, wilson
from tersely.evaluation.statistics.resampling import Array, Numbers
from tersely.evaluation.statistics.shares import mcnemar, share_difference
from tersely.results import Estimate


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
        return Estimate(value, stderr, *UNBOUNDED)
    if value in (0, 1):
        return Estimate(value, stderr, *wilson(value, min(len(members), len(others))))
    logit, width = math.log(value / (1 - value)), Z * stderr / (value * (1 - value))
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
        return Estimate(value, stderr, *UNBOUNDED), 1.0
    if stderr > 1e-12:
        width = student_quantile(pairs - 1) * stderr
        found = Estimate(value, stderr, max(-1.0, value - width), min(1.0, value + width))
        return found, student_p(value / stderr, pairs - 1)
    if abs(value) <= 1e-12:
        return Estimate(0.0, 0.0, 0.0, 0.0), 1.0
    changed = round(abs(value) * pairs)
    counts = (changed, 0) if value < 0 else (0, changed)
    bounds = share_difference(0, *counts, pairs - changed)
    return Estimate(value, stderr, min(bounds.low, value), max(bounds.high, value)), mcnemar(*counts)


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


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))
