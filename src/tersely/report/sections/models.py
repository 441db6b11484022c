"""Several models: size against quality, and everything side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from tersely.plan.cost import size
from tersely.report.cells import MOST_PICTURES, Cell, Figure, Table, measured, short, times_smaller
from tersely.report.charts import Dot, number, scatter
from tersely.report.dossier import Dossier
from tersely.report.sections.speed import pairs, threads
from tersely.report.sections.tasks import scale
from tersely.results import Estimate, Evaluation, TaskResult


def model_section(dossiers: Sequence[Dossier]) -> dict[str, Any]:
    """Size against quality, and everything side by side. Only what was measured on the same data is compared."""
    main = dossiers[0].evaluation
    text = main.text if main else None
    numbers = {id(d): str(i + 1) for i, d in enumerate(dossiers)}
    comparable: list[Dossier] = []
    unlike: list[Dossier] = []
    for d in dossiers:
        if d.evaluation and d.evaluation.text and d.evaluation.text.divergence:
            (comparable if text and _same_text(main, d.evaluation) else unlike).append(d)
    figures = []
    sized = [d for d in comparable if _bytes(d)]
    if len(sized) > 1:
        dots = [_dot(d, numbers[id(d)], _kl(d), 1, d is dossiers[0]) for d in sized]
        bases = {(d.report.bytes_before) for d in sized if d.report}
        mark = (float(bases.pop()), "the original") if len(bases) == 1 else None
        title = "Size and KL divergence"
        svg = scatter(
            "pareto-kl",
            title,
            dots,
            x_label="bytes of the weights",
            y_label="KL divergence, nats a token",
            x_tick=size,
            y_tick=number,
            smaller_is_better=True,
            mark=mark,
        )
        note = "Down and left is better. The stepped line is the Pareto front: no model shown is both smaller and "
        note += "closer to the base. Whiskers: 95 % intervals."
        figures.append(Figure(title, note, Markup(svg)))
    small: list[Figure] = []
    for task in _shared_tasks(dossiers)[:MOST_PICTURES]:
        found = [(d, t) for d in dossiers for t in [_task(d, task)] if t is not None and _bytes(d)]
        factor, unit = scale(task)
        title = f"Size and {short(task.title or task.name, 60)}"
        dots = [_dot(d, numbers[id(d)], t.value, factor, d is dossiers[0]) for d, t in found]
        svg = scatter(
            f"pareto-task-{len(small)}",
            title,
            dots,
            x_label="bytes of the weights",
            y_label=short(f"{task.metric}{',' + unit if unit else ''}", 40),
            x_tick=size,
            y_tick=number,
            smaller_is_better=not task.higher_is_better,
            small=True,
        )
        small.append(Figure(title, "", Markup(svg)))
    body = []
    for d in dossiers:
        e = d.evaluation
        moved = e.text.divergence if e and e.text else None
        alike = d in comparable
        speed = next(iter(pairs(d)), (None, None))[0]
        decode = (
            min((p for p in speed.points if p.phase == "decode"), key=lambda p: (p.batch, p.length), default=None)
            if speed
            else None
        )
        outcomes = [c.outcome for c in e.comparisons] if e else []
        body.append(
            (
                Cell(f"{numbers[id(d)]}. {short(d.name or '(no name)', 80)}", short(d.format or "", 40), wraps=True),
                Cell(
                    size(_bytes(d)) if _bytes(d) else "", times_smaller(d.report) if d.report else "", order=_bytes(d)
                ),
                Cell(f"{d.report.bits:.2f}" if d.report and d.report.parameters else ""),
                measured(moved.kl) if moved and alike else Cell("other data" if moved else ""),
                measured(moved.loss_difference, sign=True) if moved and alike else Cell(""),
                measured(moved.top1_agreement, 100, " %") if moved and alike else Cell(""),
                Cell(
                    f"{outcomes.count('worse')} / {outcomes.count('better')} / {outcomes.count('no difference shown')}"
                    if outcomes
                    else ""
                ),
                Cell(
                    number(decode.tokens_per_second, 4) if decode else "",
                    f"{speed.engine}, {threads(speed.setting)}, {short(speed.format, 40)}" if speed and decode else "",
                    wraps=True,
                ),
                Cell(size(speed.memory_peak) if speed else ""),
            )
        )
    headers = (
        "model",
        "weights",
        "bits",
        "KL, nats",
        "loss against base",
        "same top token",
        "worse / better / neither",
        "decode, tokens/s",
        "peak memory",
    )
    tasks = _shared_tasks(dossiers)
    scores = [
        (
            Cell(f"{numbers[id(d)]}. {short(d.name or '(no name)', 80)}"),
            *(measured(t.value, *scale(t)) if (t := _task(d, task)) else Cell("") for task in tasks),
        )
        for d in dossiers
    ]
    return {
        "count": len(dossiers),
        "figures": figures,
        "small": small,
        "table": Table("Models", headers, tuple(body), sortable=True, broad=True),
        "tasks": Table(
            "Tasks", ("model", *(short(t.title or t.name, 60) for t in tasks)), tuple(scores), sortable=True, broad=True
        )
        if tasks
        else None,
        "unlike": [short(d.name or "(no name)", 80) for d in unlike],
        "unmeasured": [short(d.name or "(no name)", 80) for d in dossiers if not (d.evaluation and d.evaluation.text)],
    }


def _same_text(one: Evaluation | None, other: Evaluation) -> bool:
    """Whether KLs may be compared: the same tokens, the same base."""
    if one is None or one.text is None or other.text is None:
        return False
    bases = [(e.base.fingerprint or e.base.name) if e.base else "" for e in (one, other)]
    return one.text.sha256 == other.text.sha256 and one.text.tokens == other.text.tokens and bases[0] == bases[1]


def _kl(dossier: Dossier) -> Estimate:
    assert dossier.evaluation is not None
    assert dossier.evaluation.text is not None
    assert dossier.evaluation.text.divergence is not None
    return dossier.evaluation.text.divergence.kl


def _bytes(dossier: Dossier) -> int:
    if dossier.report:
        return dossier.report.bytes_after
    if dossier.evaluation:
        return dossier.evaluation.model.bytes
    return dossier.speeds[0].disk if dossier.speeds else 0


def _dot(dossier: Dossier, place: str, estimate: Estimate, factor: float, main: bool) -> Dot:
    e = estimate
    name = short(dossier.name or "(no name)", 80)
    return Dot(name, place, float(_bytes(dossier)), e.value * factor, e.low * factor, e.high * factor, main)


def _task(dossier: Dossier, wanted: TaskResult) -> TaskResult | None:
    tasks = dossier.evaluation.tasks if dossier.evaluation else ()
    key = (wanted.name, wanted.metric, wanted.sha256)
    return next((t for t in tasks if (t.name, t.metric, t.sha256) == key), None)


def _shared_tasks(dossiers: Sequence[Dossier]) -> list[TaskResult]:
    """Tasks that the main model and another did on the same items."""
    tasks = dossiers[0].evaluation.tasks if dossiers[0].evaluation else ()
    return [t for t in tasks if any(_task(d, t) for d in dossiers[1:])]
