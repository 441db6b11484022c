"""Several models: size against quality, and everything side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        if d.evaluation and d.evaluation.text and d.evaluation.text.whole:
            (comparable if text and _same_text(main, d.evaluation) else unlike).append(d)
    tasks = _shared_tasks(dossiers)
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
    rows = tuple(_row(d, numbers[id(d)], d in comparable) for d in dossiers)
    return {
        "count": len(dossiers),
        "figures": _divergence_figures(dossiers, comparable, numbers),
        "small": [_task_figure(dossiers, task, place, numbers) for place, task in enumerate(tasks[:MOST_PICTURES])],
        "table": Table("Models", headers, rows, sortable=True, broad=True),
        "tasks": _task_table(dossiers, tasks, numbers) if tasks else None,
        "unlike": [_name(d) for d in unlike],
        "unmeasured": [_name(d) for d in dossiers if not (d.evaluation and d.evaluation.text)],
    }


def _divergence_figures(
    dossiers: Sequence[Dossier], comparable: Sequence[Dossier], numbers: Mapping[int, str]
) -> list[Figure]:
    """Size against KL, where two models or more have both."""
    sized = [d for d in comparable if _bytes(d)]
    if len(sized) < 2:
        return []
    bases = {d.report.bytes_before for d in sized if d.report}
    title = "Size and KL divergence"
    svg = scatter(
        "pareto-kl",
        title,
        [_dot(d, numbers[id(d)], _kl(d), 1, d is dossiers[0]) for d in sized],
        x_label="bytes of the weights",
        y_label="KL divergence, nats a token",
        x_tick=size,
        y_tick=number,
        smaller_is_better=True,
        mark=(float(bases.pop()), "the original") if len(bases) == 1 else None,
    )
    note = "Down and left is better. The stepped line is the Pareto front: no model shown is both smaller and "
    note += "closer to the base. Whiskers: 95 % intervals."
    return [Figure(title, note, Markup(svg))]


def _task_figure(dossiers: Sequence[Dossier], task: TaskResult, place: int, numbers: Mapping[int, str]) -> Figure:
    """Size against the score of a task."""
    found = [(d, t) for d in dossiers for t in [_task(d, task)] if t is not None and _bytes(d)]
    factor, unit = scale(task)
    title = f"Size and {short(task.title or task.name, 60)}"
    svg = scatter(
        f"pareto-task-{place}",
        title,
        [_dot(d, numbers[id(d)], t.value, factor, d is dossiers[0]) for d, t in found],
        x_label="bytes of the weights",
        y_label=short(f"{task.metric}{',' + unit if unit else ''}", 40),
        x_tick=size,
        y_tick=number,
        smaller_is_better=not task.higher_is_better,
        small=True,
    )
    return Figure(title, "", Markup(svg))


def _row(dossier: Dossier, place: str, alike: bool) -> tuple[Cell, ...]:
    """A model in the table of all. alike: whether its divergence may stand beside the others'."""
    d, e, report = dossier, dossier.evaluation, dossier.report
    moved = e.text.whole if e and e.text else None
    speed = next(iter(pairs(d)), (None, None))[0]
    points = [p for p in speed.points if p.phase == "decode"] if speed else []
    decode = min(points, key=lambda p: (p.batch, p.length), default=None)
    outcomes = [c.outcome for c in e.comparisons] if e else []
    counts = " / ".join(str(outcomes.count(o)) for o in ("worse", "better", "no difference shown"))
    how = f"{speed.engine}, {threads(speed.setting)}, {short(speed.format, 40)}" if speed and decode else ""
    return (
        Cell(f"{place}. {_name(d)}", short(d.format or "", 40), wraps=True),
        Cell(size(_bytes(d)) if _bytes(d) else "", times_smaller(report) if report else "", order=_bytes(d)),
        Cell(f"{report.bits:.2f}" if report and report.parameters else ""),
        measured(moved.kl) if moved and alike else Cell("other data" if moved else ""),
        measured(moved.loss_difference, sign=True) if moved and alike else Cell(""),
        measured(moved.top1_agreement, 100, " %") if moved and alike else Cell(""),
        Cell(counts if outcomes else ""),
        Cell(number(decode.tokens_per_second, 4) if decode else "", how, wraps=True),
        Cell(size(speed.memory_peak) if speed else ""),
    )


def _task_table(dossiers: Sequence[Dossier], tasks: Sequence[TaskResult], numbers: Mapping[int, str]) -> Table:
    scores = [
        (
            Cell(f"{numbers[id(d)]}. {_name(d)}"),
            *(measured(t.value, *scale(t)) if (t := _task(d, task)) else Cell("") for task in tasks),
        )
        for d in dossiers
    ]
    headers = ("model", *(short(t.title or t.name, 60) for t in tasks))
    return Table("Tasks", headers, tuple(scores), sortable=True, broad=True)


def _name(dossier: Dossier) -> str:
    return short(dossier.name or "(no name)", 80)


def _same_text(one: Evaluation | None, other: Evaluation) -> bool:
    """Whether KLs may be compared: the same tokens, the same base."""
    if one is None or one.text is None or other.text is None:
        return False
    bases = [(e.base.fingerprint or e.base.name) if e.base else "" for e in (one, other)]
    return one.text.sha256 == other.text.sha256 and one.text.tokens == other.text.tokens and bases[0] == bases[1]


def _kl(dossier: Dossier) -> Estimate:
    assert dossier.evaluation is not None
    assert dossier.evaluation.text is not None
    assert dossier.evaluation.text.whole is not None
    return dossier.evaluation.text.whole.kl


def _bytes(dossier: Dossier) -> int:
    if dossier.report:
        return dossier.report.bytes_after
    if dossier.evaluation:
        return dossier.evaluation.model.bytes
    return dossier.speeds[0].disk if dossier.speeds else 0


def _dot(dossier: Dossier, place: str, estimate: Estimate, factor: float, main: bool) -> Dot:
    e = estimate
    return Dot(_name(dossier), place, float(_bytes(dossier)), e.value * factor, e.low * factor, e.high * factor, main)


def _task(dossier: Dossier, wanted: TaskResult) -> TaskResult | None:
    tasks = dossier.evaluation.tasks if dossier.evaluation else ()
    key = (wanted.name, wanted.metric, wanted.sha256)
    return next((t for t in tasks if (t.name, t.metric, t.sha256) == key), None)


def _shared_tasks(dossiers: Sequence[Dossier]) -> list[TaskResult]:
    """Tasks that the main model and another did on the same items."""
    tasks = dossiers[0].evaluation.tasks if dossiers[0].evaluation else ()
    return [t for t in tasks if any(_task(d, t) for d in dossiers[1:])]
