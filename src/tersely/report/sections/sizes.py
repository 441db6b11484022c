"""Bytes, bits and memory before and after."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from tersely.plan.cost import size
from tersely.report.cells import Cell, Figure, Table, counted, of_base, share_of, short, times_smaller
from tersely.report.charts import stacks
from tersely.report.dossier import Dossier
from tersely.report.sections.speed import pairs, threads
from tersely.results import Report

_TONES = {"attention": "c0", "mlp": "c1", "expert": "c2", "router": "c3", "embedding": "c4", "head": "c5"}


def size_section(dossier: Dossier) -> dict[str, Any]:
    report, evaluation = dossier.report, dossier.evaluation
    body: list[tuple[Cell, ...]] = []

    def line(label: str, before: str, after: str, change: str) -> None:
        body.append((Cell(label), Cell(before), Cell(after, change)))

    figure = None
    if report:
        if report.shapes:
            fewer = f"{report.parameters / report.parameters_after:.2f} times fewer"
            line("parameters", counted(report.parameters), counted(report.parameters_after), fewer)
        line("weights", size(report.bytes_before), size(report.bytes_after), times_smaller(report))
        before, after = sum(r.bytes_before for r in report.rows), sum(r.bytes_after for r in report.rows)
        own = sum(r.parameters for r in report.rows)
        if report.rows and before and after:
            line("compressed matrices", size(before), size(after), f"{before / after:.2f} times smaller")
            if not report.shapes:
                line("kept as they were", size(report.bytes_before - before), size(report.bytes_after - after), "")
        if report.parameters:
            was = 8 * report.bytes_before / report.parameters
            line("bits a weight, all", f"{was:.2f}", f"{report.bits:.2f}", "")
        if own:
            line("bits a weight, compressed matrices", f"{8 * before / own:.2f}", f"{8 * after / own:.2f}", "")
            share = share_of(own, report.parameters_after)
            line("weights compressed", "", share, f"{counted(own)} of {counted(report.parameters_after)}")
        figure = _size_figure(report)
    elif evaluation:
        base = evaluation.base
        change = of_base(evaluation.model.bytes, base.bytes) if base else ""
        line("weights", size(base.bytes) if base else "", size(evaluation.model.bytes), change)
    for speed, other in pairs(dossier)[:1]:
        place = f"{speed.engine}, {threads(speed.setting)}"
        for label, now, then in (
            ("all files on disk", speed.disk, other.disk if other else None),
            (f"memory, loaded ({place})", speed.memory_loaded, other.memory_loaded if other else None),
            (f"memory, peak ({place})", speed.memory_peak, other.memory_peak if other else None),
        ):
            line(label, size(then) if then is not None else "", size(now), of_base(now, then))
    table = Table("Bytes, bits and memory", ("", "before", "after"), tuple(body))
    return {"table": table if body else None, "figure": figure}


def _size_figure(report: Report) -> Figure | None:
    kept = report.bytes_before - sum(r.bytes_before for r in report.rows)
    if report.shapes:
        # What the weights were before a cut is not told by part.
        return None
    kept_after = report.bytes_after - sum(r.bytes_after for r in report.rows)
    roles = sorted(
        {r.role for r in report.rows}, key=lambda role: ([*_TONES].index(role) if role in _TONES else 99, role)
    )
    parts = [(short(role, 24), _TONES.get(role, "c6")) for role in roles] + [("not compressed", "kept")]

    def sizes(attribute: str, rest: int) -> list[float]:
        return [float(sum(getattr(r, attribute) for r in report.rows if r.role == role)) for role in roles] + [
            float(max(0, rest))
        ]

    bars = [
        ("before", sizes("bytes_before", kept), size(report.bytes_before)),
        ("after", sizes("bytes_after", kept_after), size(report.bytes_after)),
    ]
    return Figure("Bytes of the weights, by part", "", Markup(stacks("bytes", "Bytes by part", parts, bars)))
