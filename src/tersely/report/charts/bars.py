"""Bars that are put together from parts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tersely.report.charts import svg
from tersely.report.charts.labels import breadth
from tersely.report.charts.svg import NARROW, WIDE


def stacks(
    key: str, title: str, parts: Sequence[tuple[str, str]], bars: Sequence[tuple[str, Sequence[float], str]]
) -> str:
    """Bars of one axis, put together from the same parts: (name, tone) each; a bar has a label, sizes and a text."""
    words = "; ".join(f"{label}: {text}" for label, _, text in bars)
    return "".join(
        svg.picture(f"{key}-{layout}", layout, width, *_stacks(parts, bars, width), title, words)
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
        drawn += [svg.rect(x, y - 9, 11, 11, f"f-{tone}"), svg.text(x + 16, y, name, anchor="start")]
        x += room
    y += 12
    left = max(breadth(label) for label, _, _ in bars) + 14 if wide else 2.0
    right = width - (max(breadth(text) for _, _, text in bars) + 14 if wide else 2.0)
    whole = max((sum(sizes) for _, sizes, _ in bars), default=0) or 1
    for label, sizes, text in bars:
        if wide:
            drawn += [svg.text(left - 12, y + 17, label, anchor="end"), svg.text(width - 2, y + 17, text, anchor="end")]
        else:
            drawn += [svg.text(2, y + 12, label, anchor="start"), svg.text(width - 2, y + 12, text, anchor="end")]
            y += 16
        x = left
        for (name, tone), value in zip(parts, sizes, strict=True):
            long = value / whole * (right - left)
            if long > 0:
                said = f"<title>{escape(f'{label}, {name}: {100 * value / (sum(sizes) or 1):.1f} %')}</title>"
                drawn.append(f"<g>{said}{svg.rect(x, y + 2, long, 22, f'seg f-{tone}')}</g>")
            x += long
        y += 32
    return y, drawn
