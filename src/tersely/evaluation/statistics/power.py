"""What a sample can find, and p-values of several tests together."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tersely.evaluation.statistics.quantiles import Z_POWER, Z
from tersely.evaluation.statistics.shares import mcnemar
from tersely.results import Estimate


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
    return (1 + Z_POWER / Z) * max(difference.value - difference.low, difference.high - difference.value)


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
    both = Z * math.sqrt(rate) + Z_POWER * math.sqrt(max(0.0, rate - difference**2))
    return (both / difference) ** 2
