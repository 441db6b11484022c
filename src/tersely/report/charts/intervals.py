"""Rows of points or bars with their intervals over one axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from tersely.report.charts import svg
from tersely.report.charts.labels import breadth, fitted, shorten
from tersely.report.charts.scales import HUGE, Format, linear, plain, ticks
from tersely.report.charts.svg import NARROW, WIDE


@dataclass(frozen=True)
class Mark:
    """A number of a row: its place, its interval (infinite: unknown) and what is printed beside it."""

    value: float
    low: float
    high: float
    text: str
    tone: str = "model"
    """Names the colour: model, base, worse, better, none."""
    name: str = ""
    words: str = ""
    """Said instead of the text where there is room for more."""


@dataclass(frozen=True)
class Line:
    """A row of marks under one label. band: half the width of a grey band around zero."""

    label: str
    marks: tuple[Mark, ...]
    band: float = 0.0


def rows(
    key: str,
    title: str,
    lines: Sequence[Line],
    *,
    unit: str,
    bars: bool = False,
    hints: tuple[str, str] = ("", ""),
    tick: Format | None = None,
) -> str:
    """Rows of points or bars with whiskers over one axis that holds zero; hints: what left and right of it mean."""
    words = "; ".join(f"{line.label}: {', '.join(f'{m.name} {m.text}'.strip() for m in line.marks)}" for line in lines)
    return "".join(
        svg.picture(
            f"{key}-{layout}", layout, width, *_rows(lines, width, unit, bars, hints, tick or plain), title, words
        )
        for layout, width in (("wide", WIDE), ("narrow", NARROW))
    )


def _rows(
    lines: Sequence[Line], width: int, unit: str, bars: bool, hints: tuple[str, str], tick: Format
) -> tuple[float, list[str]]:
    wide = width == WIDE
    finite = [v for line in lines for m in line.marks for v in (m.value, m.low, m.high) if abs(v) < HUGE]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    if low == high:
        high = low + 1
    pad = 0.03 * (high - low)
    low, high = (low - pad if low < 0 else -pad / 3 if not bars else 0), high + pad
    many = max((len(line.marks) for line in lines), default=1)
    texts = max((breadth(m.text) for line in lines for m in line.marks), default=0) + 14
    labels = min(300.0 if many == 1 else 240.0, max((breadth(line.label) for line in lines), default=0) + 14)
    beside = wide or many > 1
    left, right = (labels if wide else 4.0), width - (texts if beside else 8.0)
    x = linear(low, high, left, right)
    step = 17.0 if many > 1 else 15.0
    drawn: list[str] = []
    y = 4.0
    for line in lines:
        head = 0.0 if wide else 17.0
        if wide:
            middle = y + 6 + step * len(line.marks) / 2
            drawn.append(svg.text(left - 12, middle + 4, shorten(line.label, left - 14), anchor="end"))
        else:
            room = width - 6 if beside else width - texts - 6
            drawn.append(svg.text(left + 3, y + 13, shorten(line.label, room), "halo", "start"))
        top, bottom = y + head + 3, y + head + 9 + step * len(line.marks)
        if line.band > 0:
            start, end = max(left, x(-min(line.band, HUGE))), min(right, x(min(line.band, HUGE)))
            drawn.append(svg.rect(start, top + 2, end - start, bottom - top - 4, "band"))
        for place, m in enumerate(line.marks):
            at = y + head + 6 + step * (place + 0.5)
            if beside:
                drawn.append(svg.text(width - 2, at + 4, m.text, anchor="end"))
            else:
                drawn.append(svg.text(width - 2, y + 13, m.text, "halo", "end"))
            drawn += _mark(m, line.label, x, at, left, right, bars)
        y = bottom + (5 if wide and many == 1 else 8)
    grid = []
    for value in ticks(low, high, 6 if wide else 4):
        zero = abs(value) < 1e-12 * (high - low)
        grid.append(svg.rule(x(value), 2, x(value), y, "zero" if zero else "grid"))
        grid.append(svg.text(fitted(x(value), tick(0 if zero else value), width), y + 15, tick(0 if zero else value)))
    y += 34
    if any(hints):
        left_hint, right_hint = f"← {hints[0]}", f"{hints[1]} →"
        if x(0) - breadth(left_hint) - 8 > 0:
            drawn.append(svg.text(x(0) - 8, y, left_hint, "mute", "end"))
        drawn.append(svg.text(x(0) + 8, y, right_hint, "mute", "start"))
    else:
        drawn.append(svg.text(right if wide else width - 2, y, unit, "mute", "end"))
    return y + 6, grid + drawn


def _mark(
    m: Mark, label: str, x: Callable[[float], float], at: float, left: float, right: float, bars: bool
) -> list[str]:
    """A point or a bar, its whisker (dashed to the edge where the interval has no bound) and its words."""
    if not abs(m.value) < HUGE:
        return []
    said = f"{label}: " + f"{m.name} {m.words or m.text}".strip()
    shapes = []
    if bars:
        start, end = sorted((x(0), x(m.value)))
        shapes.append(svg.rect(start, at - 5.5, max(end - start, 1), 11, f"bar f-{m.tone}"))
    if not (m.low == m.high == m.value):
        known = abs(m.low) < HUGE and abs(m.high) < HUGE
        start = x(m.low) if abs(m.low) < HUGE else left
        end = x(m.high) if abs(m.high) < HUGE else right
        style = "over" if bars else f"whisker s-{m.tone}"
        shapes.append(svg.rule(start, at, end, at, style if known else f"{style} open"))
        for edge, value in ((start, m.low), (end, m.high)):
            if abs(value) < HUGE:
                shapes.append(svg.rule(edge, at - 3.5, edge, at + 3.5, style))
    if not bars:
        shapes.append(_point(x(m.value), at, m.tone))
    return [f"<g><title>{escape(said)}</title>{''.join(shapes)}</g>"]


def _point(x: float, y: float, tone: str) -> str:
    """Tones differ in shape, too: worse is a triangle, better a square, all others a circle."""
    if tone == "worse":
        return f'<path class="f-worse" d="M{svg.px(x - 5.5)} {svg.px(y - 4.5)}h11l-5.5 10z"/>'
    if tone == "better":
        return f'<rect class="f-better" x="{svg.px(x - 4.5)}" y="{svg.px(y - 4.5)}" width="9" height="9"/>'
    return f'<circle class="f-{tone}" cx="{svg.px(x)}" cy="{svg.px(y)}" r="4.5"/>'
