"""Texts in pictures: how broad they are, and where they have room."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from itertools import pairwise

FONT = 12
"""Pixels of all text in pictures, as in style.css."""


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


def spaced(
    places: Sequence[tuple[float, str]], x: Callable[[float], float], width: float
) -> Sequence[tuple[float, str]]:
    """Every place, or every second, third, fifth ... : as many as have room for their names."""

    def clear(stride: int) -> bool:
        spans = [(fitted(x(v), text, width), breadth(text) / 2) for v, text in places[::stride]]
        return all(a + half + 5 <= b - other for (a, half), (b, other) in pairwise(spans))

    return places[:: next((s for s in (1, 2, 3, 4, 5, 10, 20, 50, 100) if clear(s)), len(places) or 1)]


def apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places, moved so that neighbours are `gap` from each other."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    over = max([0.0, *(moved[i] - high for i in order[-1:])])
    return [max(low, m - over) for m in moved]


def fitted(x: float, text: str, width: float) -> float:
    """The middle of a text at x, moved so that none of it is cut off."""
    half = breadth(text) / 2
    return min(max(x, half), width - half)
