"""Weights by their place in the model: errors by block, and every weight in one table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import median
from typing import Any

from markupsafe import Markup

from tersely.plan.cost import size
from tersely.report.cells import MOST_PICTURES, MOST_ROWS, Cell, Figure, Table, bits_a_weight, counted, percent, short
from tersely.report.charts import Heat, heatmap, number
from tersely.report.dossier import Dossier
from tersely.results import Report, Row

_MOST_SITES = 3000


def error_section(report: Report) -> dict[str, Any]:
    """Heat maps of error, and of bits where they differ, for every list of blocks."""
    by_stack: dict[str, dict[str, dict[int, list[Row]]]] = {}
    for row in report.rows:
        stack, path = block_path(row)
        if row.block is not None:
            by_stack.setdefault(stack, {}).setdefault(path, {}).setdefault(row.block, []).append(row)
    on_text = any(row.tokens for row in report.rows)
    of = "the outputs on the calibration text" if on_text else "the weights themselves"
    figures = []
    for place, (stack, paths) in enumerate(sorted(by_stack.items())[:MOST_PICTURES]):
        blocks = sorted({b for found in paths.values() for b in found})
        leaves = _leaves(list(paths))
        many = max(len(own) for found in paths.values() for own in found.values()) > 1
        where = f" in {short(stack, 60)}" if len(by_stack) > 1 else ""
        errors, bits = {}, {}
        for j, (path, found) in enumerate(paths.items()):
            for block, own in found.items():
                at = (blocks.index(block), j)
                weight = sum(r.parameters for r in own) or 1
                mean = sum(r.error * r.parameters for r in own) / weight
                worst = f", worst of {len(own)}: {percent(max(r.error for r in own))}" if len(own) > 1 else ""
                label = f"block {block}, {short(path, 60)}"
                errors[at] = Heat(mean, f"{100 * mean:.1f}", f"{label}: {percent(mean)}{worst}")
                wide = 8 * sum(r.bytes_after for r in own) / weight
                bits[at] = Heat(wide, f"{wide:.1f}", f"{label}: {wide:.2f} bits")
        title = f"Relative error of each weight{where}, %"
        text = f"Of {of}." + (" Experts of a block: mean over their weights." if many else "")
        columns = [str(b) for b in blocks]
        svg = heatmap(f"error-{place}", title, columns, leaves, errors, unit=percent, axis="one column a block")
        figures.append(Figure(title, text, Markup(svg)))
        widths = [h.value for h in bits.values()]
        if max(widths) - min(widths) > 0.25:
            title = f"Bits a weight{where}, scales included"
            svg = heatmap(
                f"bits-{place}",
                title,
                columns,
                leaves,
                bits,
                unit=lambda v: f"{v:.3g} bits",
                axis="one column a block",
            )
            figures.append(Figure(title, "", Markup(svg)))
    body = []
    for role in dict.fromkeys(r.role for r in report.rows):
        own = [r for r in report.rows if r.role == role]
        largest = max(own, key=lambda r: r.error)
        body.append(
            (
                Cell(short(role, 60)),
                Cell(short(", ".join(dict.fromkeys(r.method for r in own)), 80)),
                Cell(f"{len(own):,}"),
                Cell(counted(sum(r.parameters for r in own))),
                Cell(f"{bits_a_weight(own) or 0:.2f}"),
                Cell(percent(median(r.error for r in own))),
                Cell(percent(largest.error), short(largest.name.removesuffix(".weight"), 80), wraps=True),
            )
        )
    headers = ("part", "method", "weights", "parameters", "bits", "median error", "largest error")
    return {"figures": figures, "table": Table("Error by part", headers, tuple(body), left=2)}


def _leaves(paths: Sequence[str]) -> list[str]:
    """The last words of paths, as many as tell them apart."""
    for words in (1, 2, 3):
        ends = [".".join(p.split(".")[-words:]) for p in paths]
        if len(set(ends)) == len(ends):
            return [short(end, 60) for end in ends]
    return [short(p, 60) for p in paths]


def site_section(dossier: Dossier) -> dict[str, Any] | None:
    report = dossier.report
    if report is None or not report.rows:
        return None
    costs = {s.name: s.cost for s in dossier.blame.sites if s.level == "weight"} if dossier.blame else {}
    sparse = any(r.zeros is not None for r in report.rows)
    together = len(report.rows) > MOST_ROWS
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in report.rows:
        key = (row.block, *block_path(row), row.method) if together else (row.name,)
        groups.setdefault(key, []).append(row)
    kept = list(groups.values())
    if len(kept) > _MOST_SITES:
        kept = sorted(kept, key=lambda own: -max(r.error for r in own))[:_MOST_SITES]
    body = []
    for own in kept:
        first, count = own[0], len(own)
        stack, path = block_path(first)
        name = first.name.removesuffix(".weight")
        if count > 1:
            name = f"{stack}.{first.block}.{path} ({count})"
        notes = "; ".join(dict.fromkeys(r.note for r in own if r.note))
        errors = [r.error for r in own]
        after, before, parameters = (
            sum(getattr(r, field) for r in own) for field in ("bytes_after", "bytes_before", "parameters")
        )
        tokens = min(r.tokens for r in own)
        cells = [
            Cell(short(name, 120), short(notes, 200)),
            Cell("" if first.block is None else str(first.block), order=-1 if first.block is None else first.block),
            Cell(short(first.role, 40)),
            Cell(short(first.method, 40)),
            Cell(counted(parameters), order=parameters),
            Cell(size(before), order=before),
            Cell(size(after), order=after),
            Cell(f"{8 * after / parameters:.2f}" if parameters else ""),
            Cell(
                f"{100 * sum(errors) / count:.2f}",
                f"at most {100 * max(errors):.2f}" if count > 1 else "",
                order=max(errors),
            ),
            Cell(f"{tokens:,}" if tokens else "", order=tokens),
        ]
        if costs:
            found = [costs[r.name] for r in own if r.name in costs]
            cells.append(Cell(number(found[0].value), order=found[0].value) if len(found) == 1 else Cell(""))
        if sparse:
            zeros = [r.zeros / r.parameters for r in own if r.zeros is not None]
            share = sum(zeros) / count
            cells.append(Cell(f"{100 * share:.2f}", order=share) if len(zeros) == count else Cell(""))
        body.append(tuple(cells))
    headers = ["weight", "block", "part", "method", "parameters", "before", "after", "bits", "error, %", "tokens"]
    return {
        "table": Table(
            "Compressed weights",
            (*headers, *(("KL cost",) if costs else ()), *(("zeros, %",) if sparse else ())),
            tuple(body),
            sortable=True,
            broad=True,
        ),
        "count": len(report.rows),
        "together": together,
        "left_out": len(groups) - len(kept),
    }


def block_path(row: Row) -> tuple[str, str]:
    """(block list, path in the block) of a weight; ("", whole path) outside the blocks. Experts share a path."""
    path = row.name.removesuffix(".weight")
    if row.block is None:
        return "", path
    stack, found, inside = path.partition(f".{row.block}.")
    if not found:
        return "", path
    return stack, re.sub(r"(?<=\.)\d+(?=\.|$)", "*", inside)
