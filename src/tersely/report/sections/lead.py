"""What stands first: in words, and in a few numbers."""

from __future__ import annotations

from statistics import median

from tersely.plan.cost import size
from tersely.report.cells import bits_a_weight, counted, measured, of_base, percent, short, times_smaller
from tersely.report.charts import number
from tersely.report.dossier import Dossier
from tersely.report.sections.record import steps_of
from tersely.report.sections.speed import pairs, same_point, threads


def lead(dossier: Dossier) -> str:
    report = dossier.report
    if report is None:
        return "This folder was not written by tersely, or its report.json is missing: only what was measured is known."
    parts = []
    for step in steps_of(report):
        bits = f" {step['bits']} bits" if "bits" in step else ""
        group = step.get("group")
        grouped = f", groups of {group}" if group else ", one scale a row" if group == 0 else ""
        inputs = f", inputs {step['activations']}" if step.get("activations") else ""
        parts.append(f"{step.get('method', '?')}{bits}{grouped}{inputs} ({step.get('where', '?')})")
    what = "; ".join(parts[:4]) + ("; …" if len(parts) > 4 else "")
    return f"{report.source or 'a model without a name'}, compressed: {what or 'no steps'}."


def first_facts(dossier: Dossier) -> list[tuple[str, str, str]]:
    """(what, number, smaller text) of what a person looks for first."""
    report, evaluation = dossier.report, dossier.evaluation
    made: list[tuple[str, str, str]] = []
    if report:
        made.append(("weights", size(report.bytes_after), f"of {size(report.bytes_before)}: {times_smaller(report)}"))
        if report.shapes:
            fewer = f"of {counted(report.parameters)}: {report.parameters / report.parameters_after:.2f} times fewer"
            made.append(("parameters", counted(report.parameters_after), fewer))
        packed = bits_a_weight(report.rows)
        inner = f"{packed:.2f} in the compressed matrices" if packed else "no matrix was compressed"
        if report.parameters and (packed or not report.shapes):
            made.append(("bits a weight", f"{report.bits:.2f}", inner))
        if report.rows and evaluation is None:
            largest = max(report.rows, key=lambda r: r.error)
            where = short(largest.name.removesuffix(".weight"), 60)
            middle = percent(median(r.error for r in report.rows))
            made.append(("median error of a weight", middle, f"at most {percent(largest.error)}: {where}"))
    elif evaluation:
        made.append(("weights", size(evaluation.model.bytes), f"{counted(evaluation.model.parameters)} parameters"))
    text = evaluation.text if evaluation else None
    if text and (d := text.whole):
        for label, estimate, factor, unit, sign in (
            ("KL divergence, nats a token", d.kl, 1, "", False),
            ("loss against the base, nats", d.loss_difference, 1, "", True),
            ("same top token", d.top1_agreement, 100, " %", False),
        ):
            shown = measured(estimate, factor, unit, sign=sign)
            made.append((label, shown.text, shown.below))
    elif text:
        shown = measured(text.loss)
        made.append(("loss, nats a token", shown.text, shown.below))
        made.append(("perplexity", number(text.perplexity), f"on {short(text.text, 60)}"))
    for c in evaluation.comparisons if evaluation else ():
        if c.unit == "bits":
            shown = measured(c.difference, sign=True)
            made.append(("loss against the base, bits a byte", shown.text, shown.below))
    for speed, base in pairs(dossier)[:1]:
        points = [p for p in speed.points if p.phase == "decode"] or list(speed.points)
        if points:
            p = min(points, key=lambda p: (p.batch, p.length))
            other = same_point(base, p)
            against = f"{of_base(p.tokens_per_second, other.tokens_per_second)}; " if other else ""
            what = f"{against}batch {p.batch}, {speed.engine}, {threads(speed.setting)}, {speed.format}"
            made.append((f"{p.phase}, tokens a second", number(p.tokens_per_second), what))
        beside = f"of {size(base.memory_peak)}; {speed.engine}" if base else speed.engine
        made.append(("peak memory", size(speed.memory_peak), beside))
    return made
