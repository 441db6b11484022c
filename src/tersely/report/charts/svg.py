"""The shapes of a picture as markup in which all text is escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

WIDE, NARROW, SMALL = 800, 358, 384


def picture(key: str, layout: str, width: float, height: float, drawn: Iterable[str], title: str, words: str) -> str:
    return (
        f'<svg class="{layout}" viewBox="0 0 {px(width)} {px(height)}" width="{px(width)}" height="{px(height)}" '
        f'role="img" aria-labelledby="{key}-t {key}-d"><title id="{key}-t">{escape(title)}</title>'
        f'<desc id="{key}-d">{escape(words[:4000])}</desc>{"".join(drawn)}</svg>\n'
    )


def rect(x: float, y: float, width: float, height: float, style: str) -> str:
    return f'<rect class="{style}" x="{px(x)}" y="{px(y)}" width="{px(max(0, width))}" height="{px(max(0, height))}"/>'


def rule(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{px(x1)}" y1="{px(y1)}" x2="{px(x2)}" y2="{px(y2)}"/>'


def dot(x: float, y: float, tone: str, radius: float = 3, style: str = "") -> str:
    return f'<circle class="f-{tone}{style}" cx="{px(x)}" cy="{px(y)}" r="{radius}"/>'


def text(x: float, y: float, text: str, style: str = "", anchor: str = "middle") -> str:
    """Anchors are classes too, so that the most common one costs nothing."""
    classes = " ".join(c for c in (style, "" if anchor == "middle" else "left" if anchor == "start" else "right") if c)
    named = f' class="{classes}"' if classes else ""
    return f'<text{named} x="{px(x)}" y="{px(y)}">{escape(text)}</text>'


def px(value: float) -> str:
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text
