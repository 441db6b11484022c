"""Lines with whiskers over numbers or named places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tersely.report.charts import svg
from tersely.report.charts.labels import apart, breadth, fitted, spaced
from tersely.report.charts.scales import HUGE, Format, linear, number, plain, ticks
from tersely.report.charts.svg import SMALL


@dataclass(frozen=True)
class Series:
    """Points (x, y, low, high) of one colour, joined by a line or not."""

    name: str
    points: tuple[tuple[float, float, float, float], ...]
    tone: str = "model"
    joined: bool = True


def lines(
    key: str,
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    names: Sequence[str] | None = None,
    zero: bool = False,
    diagonal: bool = False,
    tick: Format | None = None,
    x_tick: Format | None = None,
) -> str:
    """Lines with whiskers over numbers, or over named places 0, 1, ...; diagonal: the unit square with y = x."""
    width, height, top, bottom = SMALL, 236, 30.0, 196.0
    write, write_x = tick or plain, x_tick or plain
    shown = [p for s in series for p in s.points if abs(p[1]) < HUGE and abs(p[0]) < HUGE]
    ys = [v for p in shown for v in p[1:] if abs(v) < HUGE] or [0.0]
    xs = [p[0] for p in shown] or [0.0]
    low, high = (0.0, 1.0) if diagonal else (min(ys), max(ys))
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        low, high = (low - 0.5, high + 0.5) if low else (0.0, 1.0)
    pad = 0.0 if diagonal else 0.05 * (high - low)
    low, high = (low if zero and low == 0 else low - pad), high + pad
    first, last = (0.0, 1.0) if diagonal else (min(xs), max(xs))
    if first == last:
        first, last = first - 0.5, last + 0.5
    marks = ticks(low, high, 4)
    left = max(breadth(write(v)) for v in marks) + 10
    named = max((breadth(s.name) for s in series if s.points), default=0)
    right = width - (named + 14 if named else 12)
    inner = 10 if names else 0
    x, y = linear(first, last, left + 6 + inner, right - 6 - inner), linear(low, high, bottom, top)
    drawn = [svg.text(0, 13, y_label, "mute", "start")]
    for value in marks:
        drawn.append(svg.rule(left, y(value), right, y(value), "zero" if value == 0 else "grid"))
        drawn.append(svg.text(left - 6, y(value) + 4, write(value), anchor="end"))
    places = list(enumerate(names)) if names else [(v, write_x(v)) for v in _whole(first, last, 5, diagonal)]
    for value, text in spaced(places, x, width):
        drawn.append(svg.text(fitted(x(value), text, width), bottom + 16, text))
        drawn.append(svg.rule(x(value), bottom, x(value), bottom + 4, "axis"))
    drawn.append(svg.text((left + right) / 2, bottom + 34, x_label, "mute"))
    if diagonal:
        drawn.append(svg.rule(x(0), y(0), x(1), y(1), "dash"))
    ends = []
    for s in series:
        points = [p for p in s.points if abs(p[1]) < HUGE and abs(p[0]) < HUGE]
        if s.joined and len(points) > 1:
            path = "L".join(f"{svg.px(x(p[0]))} {svg.px(y(p[1]))}" for p in points)
            drawn.append(f'<path class="line s-{s.tone}" d="M{path}"/>')
        small = len(points) > 40
        for px, py, plow, phigh in points:
            if abs(plow) < HUGE and abs(phigh) < HUGE and plow < phigh:
                drawn.append(svg.rule(x(px), y(plow), x(px), y(phigh), f"whisker s-{s.tone}"))
            if not small:
                drawn.append(svg.dot(x(px), y(py), s.tone))
        if points:
            ends.append((y(points[-1][1]), s))
    for at, (_, s) in zip(apart([e[0] for e in ends], 15, top, bottom), ends, strict=True):
        drawn.append(svg.text(right + 4, at + 4, s.name, f"t-{s.tone}", "start"))
    words = "; ".join(
        f"{s.name or title}: " + ", ".join(f"{_said(p[0], names, write_x)}: {number(p[1])}" for p in s.points)
        for s in series
    )
    return svg.picture(key, "small", width, height, drawn, title, words)


def _whole(first: float, last: float, count: int, fractions: bool) -> list[float]:
    """Ticks; of whole numbers only, unless fractions are meant."""
    return [v for v in ticks(first, last, count) if fractions or v == round(v)]


def _said(x: float, names: Sequence[str] | None, write: Format) -> str:
    return names[int(x)] if names else write(x)
