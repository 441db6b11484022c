"""Scatter plots of size and quality."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from tersely.report.charts import svg
from tersely.report.charts.labels import breadth, fitted, shorten, spaced
from tersely.report.charts.scales import HUGE, Format, linear, log_ticks, plain, ticks
from tersely.report.charts.svg import NARROW, SMALL, WIDE

Box = tuple[float, float, float, float]


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


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other is at most as large as in both coordinates, by x: the Pareto front."""
    order = sorted(range(len(points)), key=lambda i: points[i])
    kept: list[int] = []
    for i in order:
        if not kept or points[i][1] < points[kept[-1]][1]:
            kept.append(i)
    return kept


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
        svg.picture(
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
    ys = [v for d in dots for v in (d.y, d.low, d.high) if abs(v) < HUGE]
    floor = [v for v in ys if v > 0]
    logs = bool(floor) and smaller_is_better and min(d.y for d in dots) > 0 and max(ys) > 12 * min(d.y for d in dots)
    if logs:
        ys = [v for v in ys if v > 0.2 * min(d.y for d in dots)]
    y_axis, y_marks = _axis(ys, logs, zero=smaller_is_better, count=5)
    x_axis, x_marks = _axis(xs, max(xs) > 12 * max(1.0, min(xs)), zero=True, count=5 if width == WIDE else 3)
    left, top, bottom = max(breadth(plain(v)) for v in y_marks) + 12, 30.0, height - 44.0
    right = width - 12.0
    x, y = x_axis(left + 4, right - 4), y_axis(bottom - 4, top + 4)
    drawn = [svg.text(0, 13, y_label, "mute", "start"), svg.text(right, height - 6, x_label, "mute", "end")]
    for value in y_marks:
        drawn.append(svg.rule(left, y(value), right, y(value), "zero" if value == 0 else "grid"))
        drawn.append(svg.text(left - 6, y(value) + 4, plain(value), anchor="end"))
    for value, text in spaced([(v, x_tick(v)) for v in x_marks], x, width):
        drawn.append(svg.rule(x(value), bottom, x(value), bottom + 5, "axis"))
        drawn.append(svg.text(fitted(x(value), text, width), bottom + 19, text))
    drawn.append(svg.rule(left, bottom, right, bottom, "axis"))
    boxes: list[Box] = []
    if mark:
        at, room = x(mark[0]), breadth(mark[1])
        drawn.append(svg.rule(at, top - 6, at, bottom, "dash"))
        beside = at + 5 if at + 5 + room < right else at - 5 - room
        drawn.append(svg.text(beside, top + 4, mark[1], "mute", "start"))
        boxes += [(beside, top - 8, beside + room, top + 8), (at - 2, top, at + 2, bottom)]
    if len(best) > 1:
        ends = [(x(dots[i].x), y(dots[i].y)) for i in best]
        path = f"M{svg.px(ends[0][0])} {svg.px(ends[0][1])}"
        path += "".join(f"H{svg.px(px)}V{svg.px(py)}" for px, py in ends[1:]) + f"H{svg.px(right)}"
        drawn.append(f'<path class="front" d="{path}"/>')
        for (ax, ay), (bx, by) in pairwise([*ends, (right, ends[-1][1])]):
            boxes += [(ax, ay - 1, bx, ay + 1), (bx - 1, min(ay, by), bx + 1, max(ay, by))]
    for d in dots:
        px, py = x(d.x), y(d.y)
        boxes.append((px - 6, py - 6, px + 6, py + 6))
        if abs(d.low) < HUGE and abs(d.high) < HUGE and d.low < d.high:
            start, end = min(bottom, y(d.low)), max(top, y(d.high))
            drawn.append(svg.rule(px, start, px, end, f"whisker s-{'model' if d.main else 'none'}"))
            boxes.append((px - 2, min(start, end), px + 2, max(start, end)))
    for i, d in enumerate(dots):
        px, py = x(d.x), y(d.y)
        said = f"<title>{escape(f'{d.name}: {x_tick(d.x)}, {y_label} {y_tick(d.y)}')}</title>"
        hollow = "" if i in best or d.main else " hollow"
        drawn.append(f"<g>{said}{svg.dot(px, py, 'model' if d.main else 'none', 5.5, hollow)}</g>")
        for name in (shorten(d.name, 190 if width == WIDE else 120), d.number):
            box = _free_place(px, py, breadth(name) * (1.12 if d.main else 1), boxes, (left, top - 10, right, bottom))
            if box:
                boxes.append(box)
                if abs((box[0] + box[2]) / 2 - px) > (box[2] - box[0]) / 2 + 14 or abs(box[3] - 4 - py) > 20:
                    edge = min(max(px, box[0]), box[2])
                    drawn.append(svg.rule(px, py, edge, box[1] if box[1] > py else box[3], "lead"))
                drawn.append(svg.text(box[0], box[3] - 4, name, "halo main" if d.main else "halo", "start"))
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
    finite = [v for v in values if abs(v) < HUGE] or [0.0]
    low, high = min(finite), max(finite)
    if logs:
        low, high = low / 1.3, high * 1.3
        start, end = math.log10(low), math.log10(high)
        return (
            lambda a, b: lambda v: linear(start, end, a, b)(math.log10(max(v, low))),
            log_ticks(low, high) or [low, high],
        )
    if zero:
        low, high = min(0.0, low), max(0.0, high)
    if low == high:
        low, high = low - 0.5, high + 0.5
    pad = 0.06 * (high - low)
    low, high = low if zero and low == 0 else low - pad, high + pad
    return lambda a, b: linear(low, high, a, b), ticks(low, high, count)
