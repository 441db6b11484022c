"""Scores of tasks, their parts and their calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from tersely.report.cells import MOST_PICTURES, Cell, Figure, Table, measured, short
from tersely.report.charts import Series, lines, number
from tersely.results import Evaluation, Part, TaskResult


def task_section(evaluation: Evaluation) -> dict[str, Any]:
    tasks = evaluation.tasks
    compared = any(t.base for t in tasks)
    body = []
    for t in tasks:
        factor, unit = scale(t)
        changed = "" if t.lost is None or t.gained is None else f"{t.lost} / {t.gained}"
        cells = [
            Cell(short(t.title or t.name, 80), short(f"{t.group}; {t.metric}" if t.group else t.metric, 80)),
            Cell(f"{t.items:,}", f"of {t.available:,}" if t.available > t.items else "", order=t.items),
            Cell(f"{number(t.chance * factor)}{unit}" if t.chance is not None else ""),
            measured(t.value, factor, unit),
        ]
        if compared:
            cells += [measured(t.base, factor, unit) if t.base else Cell(""), Cell(changed)]
        body.append(tuple(cells))
    headers = ("task", "items", "chance", "model", *(("base", "lost / gained") if compared else ()))
    parts = [(short(t.title or t.name, 80), len(t.parts), _part_table(t, compared)) for t in tasks if t.parts]
    harness = [
        (short(t.title or t.name, 80), ", ".join(f"{short(k, 60)} = {v:.10g}" for k, v in t.harness.items()))
        for t in tasks
        if t.harness
    ]
    return {
        "table": Table("Scores", headers, tuple(body)),
        "parts": parts,
        "harness": harness,
        "calibration": _calibration([t for t in tasks if t.calibration]),
        "compared": compared,
    }


def scale(task: TaskResult) -> tuple[float, str]:
    """Shares are shown in per cent."""
    values = [e.value for e in (task.value, task.base) if e is not None]
    share = task.higher_is_better and all(0 <= v <= 1 for v in values)
    return (100, " %") if share else (1, "")


def _part_table(task: TaskResult, compared: bool) -> Table:
    factor, unit = scale(task)

    def cells(p: Part) -> tuple[Cell, ...]:
        made = [Cell(short(p.name, 80)), Cell(f"{p.items:,}"), measured(p.value, factor, unit)]
        return tuple([*made, measured(p.base, factor, unit) if p.base else Cell("")] if compared else made)

    headers = ("part", "items", "model", *(("base",) if compared else ()))
    return Table("Parts", headers, tuple(cells(p) for p in task.parts))


def _calibration(tasks: Sequence[TaskResult]) -> dict[str, Any] | None:
    if not tasks:
        return None
    body: list[tuple[Cell, ...]] = []
    figures: list[Figure] = []
    for place, t in enumerate(tasks):
        own, base = t.calibration, t.base_calibration
        assert own is not None
        body.append(
            (
                Cell(short(t.title or t.name, 80)),
                measured(own.brier),
                measured(base.brier) if base else Cell(""),
                measured(own.error, 100, " %"),
                measured(base.error, 100, " %") if base else Cell(""),
            )
        )
        drawn = []
        for label, tone, c in (("model", "model", own), ("base", "base", base)):
            if c:
                points = tuple((b.confidence, b.accuracy, *_wilson(b.accuracy, b.items)) for b in c.bins if b.items)
                drawn.append(Series(label, points, tone))
        title = f"Certainty and truth: {short(t.title or t.name, 60)}"
        if len(figures) < MOST_PICTURES:
            svg = lines(
                f"reliability-{place}",
                title,
                drawn,
                x_label="how sure it was",
                y_label="how often it was right",
                diagonal=True,
            )
            figures.append(Figure(title, "", Markup(svg)))
    headers = ("task", "Brier score", "of the base", "calibration error", "of the base")
    return {"table": Table("Calibration", headers, tuple(body)), "figures": figures}


def _wilson(share: float, items: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927)."""
    z = 1.96
    middle = (share + z * z / (2 * items)) / (1 + z * z / items)
    half = z / (1 + z * z / items) * math.sqrt(share * (1 - share) / items + z * z / (4 * items * items))
    return middle - half, middle + half
