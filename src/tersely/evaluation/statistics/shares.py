"""Shares of right answers of two models on the same items."""

from __future__ import annotations

import math

from tersely.evaluation.statistics.quantiles import UNBOUNDED, Z, incomplete_beta
from tersely.results import Estimate


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
    return min(1.0, 2 * incomplete_beta(many, few + 1, 0.5))


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
        return Estimate(value, math.inf, *UNBOUNDED)
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

    low = -1.0 if value == -1 else where(-1.0, value, Z)
    high = 1.0 if value == 1 else where(value, 1.0, -Z)
    return Estimate(value, stderr, low, high)
