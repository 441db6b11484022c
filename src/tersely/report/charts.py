"""Pictures as inline SVG, without a library: intervals and bars in rows, lines, heat maps, scatter plots.

Every function returns markup in which all text is escaped. Colours are classes; the page gives them a value for light,
dark and print. A picture that would be too small to read on a phone comes in two layouts, of which the page shows one:
`wide` (800 units) and `narrow` (358 units); small ones have one layout that fits both. A unit is a CSS pixel.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDE, NARROW, SMALL = 800, 358, 384
FONT = 12
"""Pixels of all text in pictures, as in style.css."""
MINUS = "\N{MINUS SIGN}"
_HUGE = 1e60

Format = Callable[[float], str]
Box = tuple[float, float, float, float]


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


@dataclass(frozen=True)
class Series:
    """Points (x, y, low, high) of one colour, joined by a line or not."""

    name: str
    points: tuple[tuple[float, float, float, float], ...]
    tone: str = "model"
    joined: bool = True


@dataclass(frozen=True)
class Heat:
    """A cell of a heat map: its number, as it is printed in the cell, and in words."""

    value: float
    text: str
    words: str


@dataclass(frozen=True)
class Dot:
    """A model in a scatter plot. number: what stands beside it where its name does not fit."""

    name: str
    number: str
    x: float
    y: float
    low: float
    high: float
    main: bool = False


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


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other is at most as large as in both coordinates, by x: the Pareto front."""
    order = sorted(range(len(points)), key=lambda i: points[i])
    kept: list[int] = []
    for i in order:
        if not kept or points[i][1] < points[kept[-1]][1]:
            kept.append(i)
    return kept


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
        _svg(f"{key}-{layout}", layout, width, *_rows(lines, width, unit, bars, hints, tick or _plain), title, words)
        for layout, width in (("wide", WIDE), ("narrow", NARROW))
    )


def _rows(
    lines: Sequence[Line], width: int, unit: str, bars: bool, hints: tuple[str, str], tick: Format
) -> tuple[float, list[str]]:
    wide = width == WIDE
    finite = [v for line in lines for m in line.marks for v in (m.value, m.low, m.high) if abs(v) < _HUGE]
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
    x = _linear(low, high, left, right)
    step = 17.0 if many > 1 else 15.0
    drawn: list[str] = []
    y = 4.0
    for line in lines:
        head = 0.0 if wide else 17.0
        if wide:
            middle = y + 6 + step * len(line.marks) / 2
            drawn.append(_text(left - 12, middle + 4, shorten(line.label, left - 14), anchor="end"))
        else:
            room = width - 6 if beside else width - texts - 6
            drawn.append(_text(left + 3, y + 13, shorten(line.label, room), "halo", "start"))
        top, bottom = y + head + 3, y + head + 9 + step * len(line.marks)
        if line.band > 0:
            start, end = max(left, x(-min(line.band, _HUGE))), min(right, x(min(line.band, _HUGE)))
            drawn.append(_rect(start, top + 2, end - start, bottom - top - 4, "band"))
        for place, m in enumerate(line.marks):
            at = y + head + 6 + step * (place + 0.5)
            if beside:
                drawn.append(_text(width - 2, at + 4, m.text, anchor="end"))
            else:
                drawn.append(_text(width - 2, y + 13, m.text, "halo", "end"))
            drawn += _mark(m, line.label, x, at, left, right, bars)
        y = bottom + (5 if wide and many == 1 else 8)
    grid = []
    for value in ticks(low, high, 6 if wide else 4):
        zero = abs(value) < 1e-12 * (high - low)
        grid.append(_rule(x(value), 2, x(value), y, "zero" if zero else "grid"))
        grid.append(_text(_inside(x(value), tick(0 if zero else value), width), y + 15, tick(0 if zero else value)))
    y += 34
    if any(hints):
        left_hint, right_hint = f"← {hints[0]}", f"{hints[1]} →"
        if x(0) - breadth(left_hint) - 8 > 0:
            drawn.append(_text(x(0) - 8, y, left_hint, "mute", "end"))
        drawn.append(_text(x(0) + 8, y, right_hint, "mute", "start"))
    else:
        drawn.append(_text(right if wide else width - 2, y, unit, "mute", "end"))
    return y + 6, grid + drawn


def _mark(
    m: Mark, label: str, x: Callable[[float], float], at: float, left: float, right: float, bars: bool
) -> list[str]:
    """A point or a bar, its whisker (dashed to the edge where the interval has no bound) and its words."""
    if not abs(m.value) < _HUGE:
        return []
    said = f"{label}: " + f"{m.name} {m.words or m.text}".strip()
    shapes = []
    if bars:
        start, end = sorted((x(0), x(m.value)))
        shapes.append(_rect(start, at - 5.5, max(end - start, 1), 11, f"bar f-{m.tone}"))
    if not (m.low == m.high == m.value):
        known = abs(m.low) < _HUGE and abs(m.high) < _HUGE
        start = x(m.low) if abs(m.low) < _HUGE else left
        end = x(m.high) if abs(m.high) < _HUGE else right
        style = "over" if bars else f"whisker s-{m.tone}"
        shapes.append(_rule(start, at, end, at, style if known else f"{style} open"))
        for edge, value in ((start, m.low), (end, m.high)):
            if abs(value) < _HUGE:
                shapes.append(_rule(edge, at - 3.5, edge, at + 3.5, style))
    if not bars:
        shapes.append(_point(x(m.value), at, m.tone))
    return [f"<g><title>{escape(said)}</title>{''.join(shapes)}</g>"]


def _point(x: float, y: float, tone: str) -> str:
    """Tones differ in shape, too: worse is a triangle, better a square, all others a circle."""
    if tone == "worse":
        return f'<path class="f-worse" d="M{_n(x - 5.5)} {_n(y - 4.5)}h11l-5.5 10z"/>'
    if tone == "better":
        return f'<rect class="f-better" x="{_n(x - 4.5)}" y="{_n(y - 4.5)}" width="9" height="9"/>'
    return f'<circle class="f-{tone}" cx="{_n(x)}" cy="{_n(y)}" r="4.5"/>'


def stacks(
    key: str, title: str, parts: Sequence[tuple[str, str]], bars: Sequence[tuple[str, Sequence[float], str]]
) -> str:
    """Bars of one axis, put together from the same parts: (name, tone) each; a bar has a label, sizes and a text."""
    words = "; ".join(f"{label}: {text}" for label, _, text in bars)
    return "".join(
        _svg(f"{key}-{layout}", layout, width, *_stacks(parts, bars, width), title, words)
        for layout, width in (("wide", WIDE), ("narrow", NARROW))
    )


def _stacks(
    parts: Sequence[tuple[str, str]], bars: Sequence[tuple[str, Sequence[float], str]], width: int
) -> tuple[float, list[str]]:
    wide = width == WIDE
    drawn = []
    x, y = 2.0, 14.0
    for name, tone in parts:
        room = breadth(name) + 30
        if x > 2 and x + room > width:
            x, y = 2.0, y + 18
        drawn += [_rect(x, y - 9, 11, 11, f"f-{tone}"), _text(x + 16, y, name, anchor="start")]
        x += room
    y += 12
    left = max(breadth(label) for label, _, _ in bars) + 14 if wide else 2.0
    right = width - (max(breadth(text) for _, _, text in bars) + 14 if wide else 2.0)
    whole = max((sum(sizes) for _, sizes, _ in bars), default=0) or 1
    for label, sizes, text in bars:
        if wide:
            drawn += [_text(left - 12, y + 17, label, anchor="end"), _text(width - 2, y + 17, text, anchor="end")]
        else:
            drawn += [_text(2, y + 12, label, anchor="start"), _text(width - 2, y + 12, text, anchor="end")]
            y += 16
        x = left
        for (name, tone), value in zip(parts, sizes, strict=True):
            long = value / whole * (right - left)
            if long > 0:
                said = f"<title>{escape(f'{label}, {name}: {100 * value / (sum(sizes) or 1):.1f} %')}</title>"
                drawn.append(f"<g>{said}{_rect(x, y + 2, long, 22, f'seg f-{tone}')}</g>")
            x += long
        y += 32
    return y, drawn


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
    write, write_x = tick or _plain, x_tick or _plain
    shown = [p for s in series for p in s.points if abs(p[1]) < _HUGE and abs(p[0]) < _HUGE]
    ys = [v for p in shown for v in p[1:] if abs(v) < _HUGE] or [0.0]
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
    x, y = _linear(first, last, left + 6 + inner, right - 6 - inner), _linear(low, high, bottom, top)
    drawn = [_text(0, 13, y_label, "mute", "start")]
    for value in marks:
        drawn.append(_rule(left, y(value), right, y(value), "zero" if value == 0 else "grid"))
        drawn.append(_text(left - 6, y(value) + 4, write(value), anchor="end"))
    places = list(enumerate(names)) if names else [(v, write_x(v)) for v in _whole(first, last, 5, diagonal)]
    for value, text in _spaced(places, x, width):
        drawn.append(_text(_inside(x(value), text, width), bottom + 16, text))
        drawn.append(_rule(x(value), bottom, x(value), bottom + 4, "axis"))
    drawn.append(_text((left + right) / 2, bottom + 34, x_label, "mute"))
    if diagonal:
        drawn.append(_rule(x(0), y(0), x(1), y(1), "dash"))
    ends = []
    for s in series:
        points = [p for p in s.points if abs(p[1]) < _HUGE and abs(p[0]) < _HUGE]
        if s.joined and len(points) > 1:
            path = "L".join(f"{_n(x(p[0]))} {_n(y(p[1]))}" for p in points)
            drawn.append(f'<path class="line s-{s.tone}" d="M{path}"/>')
        small = len(points) > 40
        for px, py, plow, phigh in points:
            if abs(plow) < _HUGE and abs(phigh) < _HUGE and plow < phigh:
                drawn.append(_rule(x(px), y(plow), x(px), y(phigh), f"whisker s-{s.tone}"))
            if not small:
                drawn.append(_dot(x(px), y(py), s.tone))
        if points:
            ends.append((y(points[-1][1]), s))
    for at, (_, s) in zip(_apart([e[0] for e in ends], 15, top, bottom), ends, strict=True):
        drawn.append(_text(right + 4, at + 4, s.name, f"t-{s.tone}", "start"))
    words = "; ".join(
        f"{s.name or title}: " + ", ".join(f"{_said(p[0], names, write_x)}: {number(p[1])}" for p in s.points)
        for s in series
    )
    return _svg(key, "small", width, height, drawn, title, words)


def heatmap(
    key: str,
    title: str,
    columns: Sequence[str],
    lines: Sequence[str],
    cells: Mapping[tuple[int, int], Heat],
    *,
    unit: Format,
    axis: str,
) -> str:
    """Cells (column, line) shaded from zero to the largest; narrow: columns run downward."""
    largest = max((c.value for c in cells.values() if c.value < _HUGE), default=0.0) or 1.0
    words = f"From {unit(min((c.value for c in cells.values()), default=0.0))} to {unit(largest)}. " + "; ".join(
        c.words for c in sorted(cells.values(), key=lambda c: -c.value)[:12]
    )
    made = []
    for layout, width in (("wide", WIDE), ("narrow", NARROW)):
        wide = layout == "wide"
        across, down = (columns, lines) if wide else (lines, columns)
        room = min(0.4 * width, max((breadth(n) for n in down), default=0) + 10)
        cell = min(52.0 if wide else 60.0, (width - room - 4) / max(1, len(across)))
        written = all(breadth(c.text) + 3 <= cell for c in cells.values())
        high = (26.0 if written else 18.0) if wide else (22.0 if written else 14.0)
        longest = max((breadth(n) for n in across), default=0)
        upright = not wide and longest + 4 > cell
        drawn = _legend(width, unit(0), unit(largest), axis if wide else "")
        top = 26.0 + (0 if wide else (min(longest, 130.0) + 8 if upright else 18))
        for place, name in enumerate(down):
            at = top + high * (place + 0.5) + 4
            if wide or high >= 13 or place % 5 == 0:
                drawn.append(_text(room - 6, at, shorten(name, room - 6), anchor="end"))
        bottom = top + high * len(down)
        middles = [room + cell * (place + 0.5) for place in range(len(across))]
        if upright:
            for at, name in zip(middles, across, strict=True):
                turned = f'transform="rotate(-90 {_n(at + 4)} {_n(top - 6)})"'
                said = escape(shorten(name, 130))
                drawn.append(f'<text x="{_n(at + 4)}" y="{_n(top - 6)}" class="left" {turned}>{said}</text>')
        else:
            for at, name in _spaced(list(zip(middles, across, strict=True)), lambda v: v, width):
                drawn.append(_text(at, bottom + 16 if wide else top - 6, name))
        strength = "heat" if written else "deep"
        for (column, line), c in cells.items():
            i, j = (column, line) if wide else (line, column)
            x, y = room + cell * i, top + high * j
            shade = f"{max(0.03, min(1.0, c.value / largest)) if c.value < _HUGE else 1:.2f}"
            gap = 1.0 if cell > 6 else 0.4
            said = f"<title>{escape(c.words)}</title>" if wide else ""
            body = (
                f'<rect class="{strength}" fill-opacity="{shade}" x="{_n(x)}" y="{_n(y)}" '
                f'width="{_n(cell - gap)}" height="{_n(high - 1)}"/>'
            )
            body += _text(x + cell / 2, y + high / 2 + 4, c.text) if written else ""
            drawn.append(f"<g>{said}{body}</g>" if said else body)
        made.append(_svg(f"{key}-{layout}", layout, width, bottom + (24 if wide else 6), drawn, title, words))
    return "".join(made)


def _legend(width: int, low: str, high: str, axis: str) -> list[str]:
    """The shades from zero to the largest, at the upper right; `axis` says what runs along the columns."""
    x = width - breadth(high) - 6
    drawn = [_text(width - 2, 13, high, "mute", "end")]
    for shade in (1.0, 0.8, 0.6, 0.4, 0.2, 0.03):
        x -= 16
        drawn.append(f'<rect class="deep" fill-opacity="{shade}" x="{_n(x)}" y="4" width="16" height="10"/>')
    drawn.append(_text(x - 5, 13, low, "mute", "end"))
    return [*drawn, _text(0, 13, axis, "mute", "start")]


def scatter(
    key: str,
    title: str,
    dots: Sequence[Dot],
    *,
    x_label: str,
    y_label: str,
    x_tick: Format,
    y_tick: Format,
    smaller_is_better: bool,
    mark: tuple[float, str] | None = None,
    small: bool = False,
) -> str:
    """Models by size and quality with whiskers, their Pareto front as steps, and names that keep clear of each other.

    mark: a size shown as an upright line. An axis is logarithmic where its largest number is 12 times the smallest.
    """
    words = "; ".join(f"{d.name}: {x_tick(d.x)}, {y_label} {y_tick(d.y)}" for d in dots)
    best = front([(d.x, d.y if smaller_is_better else -d.y) for d in dots])
    words += ". Pareto front: " + ", ".join(dots[i].name for i in best)
    layouts = (("small", SMALL, 270),) if small else (("wide", WIDE, 400), ("narrow", NARROW, 340))
    return "".join(
        _svg(
            f"{key}-{layout}",
            layout,
            width,
            *_scatter(dots, best, width, height, x_label, y_label, x_tick, y_tick, smaller_is_better, mark),
            title,
            words,
        )
        for layout, width, height in layouts
    )


def _scatter(
    dots: Sequence[Dot],
    best: Sequence[int],
    width: int,
    height: int,
    x_label: str,
    y_label: str,
    x_tick: Format,
    y_tick: Format,
    smaller_is_better: bool,
    mark: tuple[float, str] | None,
) -> tuple[float, list[str]]:
    xs = [d.x for d in dots] + ([mark[0]] if mark else [])
    ys = [v for d in dots for v in (d.y, d.low, d.high) if abs(v) < _HUGE]
    floor = [v for v in ys if v > 0]
    logs = bool(floor) and smaller_is_better and min(d.y for d in dots) > 0 and max(ys) > 12 * min(d.y for d in dots)
    if logs:
        ys = [v for v in ys if v > 0.2 * min(d.y for d in dots)]
    y_axis, y_marks = _axis(ys, logs, zero=smaller_is_better, count=5)
    x_axis, x_marks = _axis(xs, max(xs) > 12 * max(1.0, min(xs)), zero=True, count=5 if width == WIDE else 3)
    left, top, bottom = max(breadth(_plain(v)) for v in y_marks) + 12, 30.0, height - 44.0
    right = width - 12.0
    x, y = x_axis(left + 4, right - 4), y_axis(bottom - 4, top + 4)
    drawn = [_text(0, 13, y_label, "mute", "start"), _text(right, height - 6, x_label, "mute", "end")]
    for value in y_marks:
        drawn.append(_rule(left, y(value), right, y(value), "zero" if value == 0 else "grid"))
        drawn.append(_text(left - 6, y(value) + 4, _plain(value), anchor="end"))
    for value, text in _spaced([(v, x_tick(v)) for v in x_marks], x, width):
        drawn.append(_rule(x(value), bottom, x(value), bottom + 5, "axis"))
        drawn.append(_text(_inside(x(value), text, width), bottom + 19, text))
    drawn.append(_rule(left, bottom, right, bottom, "axis"))
    boxes: list[Box] = []
    if mark:
        at, room = x(mark[0]), breadth(mark[1])
        drawn.append(_rule(at, top - 6, at, bottom, "dash"))
        beside = at + 5 if at + 5 + room < right else at - 5 - room
        drawn.append(_text(beside, top + 4, mark[1], "mute", "start"))
        boxes += [(beside, top - 8, beside + room, top + 8), (at - 2, top, at + 2, bottom)]
    if len(best) > 1:
        ends = [(x(dots[i].x), y(dots[i].y)) for i in best]
        path = f"M{_n(ends[0][0])} {_n(ends[0][1])}"
        path += "".join(f"H{_n(px)}V{_n(py)}" for px, py in ends[1:]) + f"H{_n(right)}"
        drawn.append(f'<path class="front" d="{path}"/>')
        for (ax, ay), (bx, by) in pairwise([*ends, (right, ends[-1][1])]):
            boxes += [(ax, ay - 1, bx, ay + 1), (bx - 1, min(ay, by), bx + 1, max(ay, by))]
    for d in dots:
        px, py = x(d.x), y(d.y)
        boxes.append((px - 6, py - 6, px + 6, py + 6))
        if abs(d.low) < _HUGE and abs(d.high) < _HUGE and d.low < d.high:
            start, end = min(bottom, y(d.low)), max(top, y(d.high))
            drawn.append(_rule(px, start, px, end, f"whisker s-{'model' if d.main else 'none'}"))
            boxes.append((px - 2, min(start, end), px + 2, max(start, end)))
    for i, d in enumerate(dots):
        px, py = x(d.x), y(d.y)
        said = f"<title>{escape(f'{d.name}: {x_tick(d.x)}, {y_label} {y_tick(d.y)}')}</title>"
        hollow = "" if i in best or d.main else " hollow"
        drawn.append(f"<g>{said}{_dot(px, py, 'model' if d.main else 'none', 5.5, hollow)}</g>")
        for name in (shorten(d.name, 190 if width == WIDE else 120), d.number):
            box = _free_place(px, py, breadth(name) * (1.12 if d.main else 1), boxes, (left, top - 10, right, bottom))
            if box:
                boxes.append(box)
                if abs((box[0] + box[2]) / 2 - px) > (box[2] - box[0]) / 2 + 14 or abs(box[3] - 4 - py) > 20:
                    edge = min(max(px, box[0]), box[2])
                    drawn.append(_rule(px, py, edge, box[1] if box[1] > py else box[3], "lead"))
                drawn.append(_text(box[0], box[3] - 4, name, "halo main" if d.main else "halo", "start"))
                break
    return height, drawn


def _free_place(px: float, py: float, room: float, taken: Sequence[Box], within: Box) -> Box | None:
    """Where a label of this breadth lies free, near its point first."""
    for away in (9.0, 16.0, 26.0, 40.0, 60.0, 85.0):
        for dx, dy in ((1, 0), (-1, 0), (0.5, -1), (-0.5, -1), (0.5, 1), (-0.5, 1), (1, -1), (1, 1), (-1, -1), (-1, 1)):
            start = px + away if dx == 1 else px - away - room if dx == -1 else px - room / 2 + dx * room / 2
            middle = py + dy * (away + 3)
            box = (start, middle - 8, start + room, middle + 8)
            inside = box[0] >= within[0] and box[1] >= within[1] and box[2] <= within[2] and box[3] <= within[3]
            if inside and not any(_overlap(box, other) for other in taken):
                return box
    return None


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _axis(
    values: Sequence[float], logs: bool, zero: bool, count: int
) -> tuple[Callable[[float, float], Callable[[float], float]], list[float]]:
    """A scale to be stretched between two coordinates, and its ticks."""
    finite = [v for v in values if abs(v) < _HUGE] or [0.0]
    low, high = min(finite), max(finite)
    if logs:
        low, high = low / 1.3, high * 1.3
        start, end = math.log10(low), math.log10(high)
        return (
            lambda a, b: lambda v: _linear(start, end, a, b)(math.log10(max(v, low))),
            log_ticks(low, high) or [low, high],
        )
    if zero:
        low, high = min(0.0, low), max(0.0, high)
    if low == high:
        low, high = low - 0.5, high + 0.5
    pad = 0.06 * (high - low)
    low, high = low if zero and low == 0 else low - pad, high + pad
    return lambda a, b: _linear(low, high, a, b), ticks(low, high, count)


def breadth(text: str) -> float:
    """About how many pixels a text takes in a picture; a little more than most fonts need."""
    total = 0.0
    for sign in text:
        if unicodedata.combining(sign):
            continue
        if unicodedata.east_asian_width(sign) in "WF":
            total += 1.05
        elif sign in "iljtfrI.,:;'|!()[] /":
            total += 0.4
        elif sign in "mwMW%@∞→←":
            total += 0.95
        else:
            total += 0.72 if sign.isupper() else 0.62
    return total * FONT


def shorten(text: str, room: float) -> str:
    """The text, or as much of its start and end as fits."""
    if breadth(text) <= room:
        return text
    text = text[:200] + text[-200:] if len(text) > 400 else text
    keep = len(text) - 1
    while keep > 1 and breadth(text[: keep // 2] + "…" + text[len(text) - (keep - keep // 2) :]) > room:
        keep -= 1
    return text[: keep // 2] + "…" + text[len(text) - (keep - keep // 2) :]


def _spaced(
    places: Sequence[tuple[float, str]], x: Callable[[float], float], width: float
) -> Sequence[tuple[float, str]]:
    """Every place, or every second, third, fifth ... : as many as have room for their names."""

    def clear(stride: int) -> bool:
        spans = [(_inside(x(v), text, width), breadth(text) / 2) for v, text in places[::stride]]
        return all(a + half + 5 <= b - other for (a, half), (b, other) in pairwise(spans))

    return places[:: next((s for s in (1, 2, 3, 4, 5, 10, 20, 50, 100) if clear(s)), len(places) or 1)]


def _whole(first: float, last: float, count: int, fractions: bool) -> list[float]:
    """Ticks; of whole numbers only, unless fractions are meant."""
    return [v for v in ticks(first, last, count) if fractions or v == round(v)]


def _said(x: float, names: Sequence[str] | None, write: Format) -> str:
    return names[int(x)] if names else write(x)


def _apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places, moved so that neighbours are `gap` from each other."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    over = max([0.0, *(moved[i] - high for i in order[-1:])])
    return [max(low, m - over) for m in moved]


def _linear(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda v: start + (min(max(v, -_HUGE), _HUGE) - low) / (high - low) * (end - start)


def _inside(x: float, text: str, width: float) -> float:
    """The middle of a text at x, moved so that none of it is cut off."""
    half = breadth(text) / 2
    return min(max(x, half), width - half)


def _plain(value: float) -> str:
    return f"{value:.10g}".replace("-", MINUS)


def _n(value: float) -> str:
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text


def _rect(x: float, y: float, width: float, height: float, style: str) -> str:
    return f'<rect class="{style}" x="{_n(x)}" y="{_n(y)}" width="{_n(max(0, width))}" height="{_n(max(0, height))}"/>'


def _rule(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"/>'


def _dot(x: float, y: float, tone: str, radius: float = 3, style: str = "") -> str:
    return f'<circle class="f-{tone}{style}" cx="{_n(x)}" cy="{_n(y)}" r="{radius}"/>'


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "middle") -> str:
    """Anchors are classes too, so that the most common one costs nothing."""
    classes = " ".join(c for c in (style, "" if anchor == "middle" else "left" if anchor == "start" else "right") if c)
    named = f' class="{classes}"' if classes else ""
    return f'<text{named} x="{_n(x)}" y="{_n(y)}">{escape(text)}</text>'


def _svg(key: str, layout: str, width: float, height: float, drawn: Iterable[str], title: str, words: str) -> str:
    return (
        f'<svg class="{layout}" viewBox="0 0 {_n(width)} {_n(height)}" width="{_n(width)}" height="{_n(height)}" '
        f'role="img" aria-labelledby="{key}-t {key}-d"><title id="{key}-t">{escape(title)}</title>'
        f'<desc id="{key}-d">{escape(words[:4000])}</desc>{"".join(drawn)}</svg>\n'
    )
