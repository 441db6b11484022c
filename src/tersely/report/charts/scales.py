"""Numbers and where they stand: how they are written, round ticks, and places between two ends."""

from __future__ import annotations

import math
from collections.abc import Callable

MINUS = "\N{MINUS SIGN}"
HUGE = 1e60
Format = Callable[[float], str]


def number(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits, as people write it; an infinite one as a sign."""
    if math.isnan(value):
        return "?"
    if math.isinf(value):
        return "∞" if value > 0 else MINUS + "∞"
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1e9 or size < 1e-6:
        return f"{value:.{digits - 1}e}".replace("-", MINUS)
    if size >= 10**digits:
        return f"{value:,.0f}".replace("-", MINUS)
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(size)))}f}".replace("-", MINUS)


def plain(value: float) -> str:
    return f"{value:.10g}".replace("-", MINUS)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within low..high: about `count` multiples of 1, 2, 2.5 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(s for s in (1, 2, 2.5, 5, 10) if rough <= s * power * (1 + 1e-9))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within low..high; only the powers where those are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [s * 10.0**p for p in powers for s in (1, 2, 5) if low <= s * 10.0**p <= high]
    tens = [10.0**p for p in powers if low <= 10.0**p <= high]
    return tens if len(every) > 8 and len(tens) > 1 else every


def linear(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda v: start + (min(max(v, -HUGE), HUGE) - low) / (high - low) * (end - start)
