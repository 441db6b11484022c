"""Smaller shapes: what was cut, and what it was chosen by."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from tersely.report.cells import MOST_PICTURES, Cell, Figure, Table, counted, percent, short
from tersely.report.charts import Heat, heatmap
from tersely.results import Report, Reshaping

_TENTHS = 10


def shape_section(report: Report) -> dict[str, Any] | None:
    """A line for each step that left a smaller shape, and how the scores that it went by lie in each block."""
    if not report.shapes:
        return None
    body = []
    for shape in report.shapes:
        fewer = 1 - shape.parameters_after / shape.parameters_before
        body.append(
            (
                Cell(short(f"{shape.where}: {shape.method}", 60), short("; ".join(shape.notes[:4]), 200), wraps=True),
                Cell(counted(shape.parameters_before)),
                Cell(counted(shape.parameters_after)),
                Cell(percent(fewer)),
            )
        )
    figures = [figure for number, shape in enumerate(report.shapes) for figure in _figures(number, shape)]
    headers = ("cut", "parameters before", "after", "fewer")
    return {"table": Table("Smaller shapes", headers, tuple(body)), "figures": figures[:MOST_PICTURES]}


def _figures(number: int, shape: Reshaping) -> list[Figure]:
    """For each kind of structure, how much of a block's score its best tenth has, the next, and so on."""
    by_kind: dict[str, dict[str, list[float]]] = {}
    for place, scores in shape.scores.items():
        kind, _, where = place.partition(": ")
        if scores and min(scores) >= 0 and sum(scores) > 0:
            by_kind.setdefault(kind, {})[where or "all"] = scores
    figures = []
    for kind, places in by_kind.items():
        if kind == "blocks":
            continue
        cells, parts = {}, min(_TENTHS, *(len(scores) for scores in places.values()))
        for j, (where, scores) in enumerate(places.items()):
            ranked, total = sorted(scores, reverse=True), sum(scores)
            for i in range(parts):
                own = ranked[len(ranked) * i // parts : len(ranked) * (i + 1) // parts]
                said = f"{short(where, 60)}, part {i + 1} of {parts}: {percent(sum(own) / total)} of the score"
                cells[i, j] = Heat(sum(own) / total, f"{100 * sum(own) / total:.0f}", said)
        title = f"Scores of {kind} ({shape.method}), % of each block's"
        text = (
            "Structures in the order of their scores, the highest first, in equal parts. Where the last parts are "
            "nearly empty, little is lost; where all are alike, the choice is close to chance."
        )
        svg = heatmap(
            f"scores-{number}-{kind}",
            title,
            [str(i + 1) for i in range(parts)],
            [short(where, 40) for where in places],
            cells,
            unit=percent,
            axis="one column a part",
        )
        figures.append(Figure(title, text, Markup(svg)))
    if (influence := shape.scores.get("blocks")) is not None:
        cells = {
            (b, 0): Heat(max(0.0, value), f"{value:.2f}", f"block {b}: influence {value:.3g}")
            for b, value in enumerate(influence)
        }
        title = "How much each block changes what passes through it"
        columns = [str(b) for b in range(len(influence))]
        svg = heatmap(
            f"scores-{number}-blocks",
            title,
            columns,
            ["1 - cos"],
            cells,
            unit=lambda v: f"{v:.2g}",
            axis="one column a block",
        )
        figures.append(Figure(title, "1 - mean cosine of what comes to a block and what it gives.", Markup(svg)))
    return figures
