"""Facts as a page shows them: tables, pictures, and numbers with no more digits than are known."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from tersely.plan.cost import duration
from tersely.report.charts import MINUS, number
from tersely.results import Bin, Estimate, Report, Row

LONGEST_NAME, LONGEST_NOTE = 160, 1000
MOST_ROWS, MOST_BARS, MOST_PICTURES = 1500, 12, 6
_MOST_NOTES, _LONGEST_SAMPLE = 200, 4000
TIMES, DASH = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, smaller text below, and what it is sorted by where that is not its text."""

    text: str
    below: str = ""
    order: float | None = None
    wraps: bool = False
    """Whether the smaller text may take several lines."""


@dataclass(frozen=True)
class Table:
    """A table whose first `left` columns are text."""

    caption: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    left: int = 1
    sortable: bool = False
    broad: bool = False
    """Whether it may be broader than the text on the page."""


@dataclass(frozen=True)
class Figure:
    """A picture, its title and how to read it."""

    title: str
    text: str
    svg: Markup


def measured(estimate: Estimate, factor: float = 1, unit: str = "", *, sign: bool = False) -> Cell:
    """A number with as many decimals as its interval allows, and the interval below it."""
    value, low, high = (v * factor for v in (estimate.value, estimate.low, estimate.high))
    half = (high - low) / 2
    if math.isfinite(half) and half > 0:
        decimals = min(6, max(0, 1 - math.floor(math.log10(half))))
        if factor == 100:
            decimals = min(decimals, 2)
        below = f"{fixed(low, decimals, sign)} to {fixed(high, decimals, sign)}"
        text = fixed(value, decimals, sign)
    else:
        text = ("+" if sign and value > 0 else "") + number(value)
        below = "" if half == 0 else "no interval"
    return Cell(f"{text}{unit}", below, order=value if math.isfinite(value) else None)


def fixed(value: float, decimals: int, sign: bool) -> str:
    if not math.isfinite(value) or abs(value) >= 1e9:
        return number(value)
    text = f"{value:+,.{decimals}f}" if sign else f"{value:,.{decimals}f}"
    return text.replace("-", MINUS)


def unit_words(unit: str) -> str:
    return {"points": " points", "nats": " nats", "bits": " bits"}.get(unit, "")


def probability(p: float) -> str:
    return "<\N{NO-BREAK SPACE}0.0001" if p < 1e-4 else f"{p:.2g}"


def percentile(quantile: str) -> str:
    share = float(quantile) if re.fullmatch(r"[01](\.\d+)?", quantile) else math.nan
    return {0.5: "median", 1.0: "largest"}.get(share, f"{100 * share:.10g} %" if not math.isnan(share) else quantile)


def percent(value: float) -> str:
    """A share in per cent."""
    shown = 100 * value
    return f"{number(shown, 2) if 0 < shown < 0.95 or shown >= 1e6 else f'{shown:.1f}'} %"


def time_taken(seconds: float) -> str:
    return f"{number(1000 * seconds)} ms" if seconds < 1 else duration(seconds)


def ratio(after: float, before: float | None) -> str:
    return f"{after / before:.2f} {TIMES}" if before else ""


def of_base(after: float, before: float | None) -> str:
    return f"{ratio(after, before)} the base's" if before else ""


def times_smaller(report: Report) -> str:
    return f"{report.ratio:.2f} times smaller" if report.bytes_after else ""


def share_of(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""


def bits_a_weight(own: Sequence[Row]) -> float | None:
    parameters = sum(r.parameters for r in own)
    return 8 * sum(r.bytes_after for r in own) / parameters if parameters else None


def counted(n: float) -> str:
    for unit in ("", " k", " M", " G"):
        if n < 999.5:
            return f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:.3g} T"


def exponential(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def setting(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def shortened(notes: Sequence[str]) -> list[str]:
    shown = [short(n, LONGEST_NOTE) for n in notes[:_MOST_NOTES]]
    return [*shown, f"and {len(notes) - _MOST_NOTES} more"] if len(notes) > _MOST_NOTES else shown


def short(text: str, most: int) -> str:
    """A text of at most so many characters, its middle left out where it is longer."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most - most // 2 - 1) :]}"


def long_text(text: str) -> str:
    over = len(text) - _LONGEST_SAMPLE
    return text if over <= 0 else f"{text[:_LONGEST_SAMPLE]} … ({over:,} more characters)"


def bin_name(b: Bin) -> str:
    return thousands(b.first) if b.first == b.last else f"{thousands(b.first)}{DASH}{thousands(b.last)}"


def thousands(value: int) -> str:
    for unit, step in (("M", 10**6), ("k", 10**3)):
        if value >= 10 * step:
            return f"{value / step:.3g}{unit}"
    return str(value)
