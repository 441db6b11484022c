"""A trimmed vocabulary: what stays, and how much of the text fewer or more rows would have held."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from tersely.plan.cost import size
from tersely.report.cells import Cell, Figure, Table, percent, short
from tersely.report.charts import Series, lines
from tersely.results import Report


def vocabulary_section(report: Report) -> dict[str, Any] | None:
    """Rows before and after, and the curve of rows against the share of the corpus; None where nothing was trimmed."""
    facts = report.vocabulary
    if facts is None:
        return None
    saved = (facts.rows_before - facts.rows_after) * facts.bytes_a_row
    body = [
        (Cell("rows"), Cell(f"{facts.rows_before:,}"), Cell(f"{facts.rows_after:,}")),
        (Cell("of them whatever is counted"), Cell(""), Cell(f"{facts.mandatory:,}")),
        (Cell("of them not counted"), Cell(""), Cell(f"{facts.uncounted:,}")),
        (Cell("bytes saved"), Cell(""), Cell(size(saved))),
    ]
    if facts.coverage is not None:
        body.append((Cell("counted tokens that stay"), Cell(""), Cell(percent(facts.coverage))))
    body += [
        (Cell(short(f"{name} went: {why}", 200), wraps=True), Cell(""), Cell("")) for name, why in facts.removed.items()
    ]
    figures = []
    if len(facts.curve_rows) > 1:
        points = tuple(
            (float(rows), share, share, share)
            for rows, share in zip(facts.curve_rows, facts.curve_coverage, strict=True)
        )
        held = facts.coverage or 0.0
        chosen = ((float(facts.rows_after), held, held, held),)
        svg = lines(
            "vocabulary",
            "Rows against the share of the corpus",
            [Series("all choices", points, tone="base"), Series("this one", chosen)],
            x_label="rows of the embedding",
            y_label="share of the counted tokens",
            tick=percent,
            x_tick=lambda value: f"{value:,.0f}",
        )
        text = "Tokens in the order of what each row adds, those that a token is merged from counted with it."
        figures.append(Figure("How many rows the corpus needs", text, Markup(svg)))
    return {"table": Table("Vocabulary", ("", "before", "after"), tuple(body)), "figures": figures}
