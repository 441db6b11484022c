"""Whether a difference from the base was shown, comparison by comparison."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from tersely.report.cells import LONGEST_NOTE, Cell, Figure, Table, measured, probability, short, unit_words
from tersely.report.charts import Line, Mark, number, rows
from tersely.results import Comparison, Evaluation


def verdict_section(evaluation: Evaluation | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    comparisons = evaluation.comparisons
    base = short(evaluation.base.name, 60) if evaluation.base else ""
    head = short(evaluation.verdict, LONGEST_NOTE) or ("" if base else "Nothing was compared: no base was given.")
    figures = []
    for unit in ("points", "nats", "bits", "score"):
        own = [c for c in comparisons if c.unit == unit]
        if own:
            factor = 100 if unit == "points" else 1
            made = [Line(short(c.name, 80), (_difference(c, factor),), c.detectable * factor) for c in own]
            sides = {c.higher_is_better for c in own}
            hints = ("", "") if len(sides) > 1 else ("worse", "better") if sides == {True} else ("better", "worse")
            named = {
                "points": "percentage points",
                "nats": "nats a token",
                "bits": "bits a byte",
                "score": "the task's own unit",
            }[unit]
            svg = rows(f"forest-{unit}", f"Differences from the base in {named}", made, unit=named, hints=hints)
            note = "Model minus base with 95 % intervals. Within the grey band lie differences that are smaller than "
            note += "what this sample finds four times in five. Triangle: worse; square: better; circle: none shown."
            figures.append(Figure(f"Difference from the base, {named}", note, Markup(svg)))
    table = Table(
        "All comparisons",
        ("comparison", "model", "base", "difference", "p", "corrected", "detectable", "items", "test"),
        tuple(
            (
                Cell(short(c.name, 80)),
                measured(c.model, 100 if c.unit == "points" else 1),
                measured(c.base, 100 if c.unit == "points" else 1),
                measured(c.difference, 100 if c.unit == "points" else 1, sign=True, unit=unit_words(c.unit)),
                Cell(probability(c.p), order=c.p),
                Cell(probability(c.p_adjusted), order=c.p_adjusted),
                Cell(number(c.detectable * (100 if c.unit == "points" else 1), 2)),
                Cell(f"{c.items:,}"),
                Cell(short(c.test, 80)),
            )
            for c in comparisons
        ),
    )
    return {
        "head": head,
        "base": base,
        "sentences": [(c.outcome, short(c.sentence, LONGEST_NOTE)) for c in comparisons],
        "figures": figures,
        "table": table if comparisons else None,
    }


def _difference(c: Comparison, factor: float) -> Mark:
    shown = measured(c.difference, factor, sign=True)
    tone = {"worse": "worse", "better": "better"}.get(c.outcome, "none")
    d = c.difference
    words = f"{shown.text} ({shown.below})"
    return Mark(d.value * factor, d.low * factor, d.high * factor, shown.text, tone, words=words)
