"""Distributions by their formulas: Student, the binomial, and intervals of shares."""

from __future__ import annotations

import math
from functools import lru_cache

Z, Z_POWER = 1.959963984540054, 0.8416212335729143
"""Normal quantiles: of 97.5 %, for intervals and tests; of 80 %, for the power."""
UNBOUNDED = (-math.inf, math.inf)


def student_p(t: float, degrees: int) -> float:
    """P(|T| >= |t|) = I_x(degrees / 2, 1 / 2) with x = degrees / (degrees + t^2)."""
    return incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))


@lru_cache
def student_quantile(degrees: int) -> float:
    """t of 97.5 %."""
    low, high = 1.0, 13.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_p(middle, degrees) > 0.05 else (low, middle)
    return (low + high) / 2


def wilson(share: float, n: int) -> tuple[float, float]:
    z2 = Z * Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return (0.0 if share == 0 else middle - half), (1.0 if share == 1 else middle + half)


def incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b), the regularized incomplete beta function, by its continued fraction (DLMF 8.17.22).

    P(X <= m) of a binomial with n trials and chance p is I_(1 - p)(n - m, m + 1).
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
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
