"""Heat maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from tersely.report.charts import svg
from tersely.report.charts.labels import breadth, shorten, spaced
from tersely.report.charts.scales import HUGE, Format
from tersely.report.charts.svg import NARROW, WIDE


@dataclass(frozen=True)
class Heat:
    """A cell of a heat map: its number, as it is printed in the cell, and in words."""

    value: float
    text: str
    words: str


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
    largest = max((c.value for c in cells.values() if c.value < HUGE), default=0.0) or 1.0
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
                drawn.append(svg.text(room - 6, at, shorten(name, room - 6), anchor="end"))
        bottom = top + high * len(down)
        middles = [room + cell * (place + 0.5) for place in range(len(across))]
        if upright:
            for at, name in zip(middles, across, strict=True):
                turned = f'transform="rotate(-90 {svg.px(at + 4)} {svg.px(top - 6)})"'
                said = escape(shorten(name, 130))
                drawn.append(f'<text x="{svg.px(at + 4)}" y="{svg.px(top - 6)}" class="left" {turned}>{said}</text>')
        else:
            for at, name in spaced(list(zip(middles, across, strict=True)), lambda v: v, width):
                drawn.append(svg.text(at, bottom + 16 if wide else top - 6, name))
        strength = "heat" if written else "deep"
        for (column, line), c in cells.items():
            i, j = (column, line) if wide else (line, column)
            x, y = room + cell * i, top + high * j
            shade = f"{max(0.03, min(1.0, c.value / largest)) if c.value < HUGE else 1:.2f}"
            gap = 1.0 if cell > 6 else 0.4
            said = f"<title>{escape(c.words)}</title>" if wide else ""
            body = (
                f'<rect class="{strength}" fill-opacity="{shade}" x="{svg.px(x)}" y="{svg.px(y)}" '
                f'width="{svg.px(cell - gap)}" height="{svg.px(high - 1)}"/>'
            )
            body += svg.text(x + cell / 2, y + high / 2 + 4, c.text) if written else ""
            drawn.append(f"<g>{said}{body}</g>" if said else body)
        made.append(svg.picture(f"{key}-{layout}", layout, width, bottom + (24 if wide else 6), drawn, title, words))
    return "".join(made)


def _legend(width: int, low: str, high: str, axis: str) -> list[str]:
    """The shades from zero to the largest, at the upper right; `axis` says what runs along the columns."""
    x = width - breadth(high) - 6
    drawn = [svg.text(width - 2, 13, high, "mute", "end")]
    for shade in (1.0, 0.8, 0.6, 0.4, 0.2, 0.03):
        x -= 16
        drawn.append(f'<rect class="deep" fill-opacity="{shade}" x="{svg.px(x)}" y="4" width="16" height="10"/>')
    drawn.append(svg.text(x - 5, 13, low, "mute", "end"))
    return [*drawn, svg.text(0, 13, axis, "mute", "start")]
