"""Stored runs as tables for the terminal: a list, one of them, two side by side."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from tersely.plan.cost import size
from tersely.report.terminal import table
from tersely.results import Blame, Evaluation
from tersely.results.run import Contrast, Figure, Run, RunComparison, figures


def runs_table(runs: Iterable[Run]) -> RenderableType:
    """A line for each run."""
    made = table(
        ("run", "started (UTC)", "kind", "model", "against", "found"),
        [
            (str(run.id), _time(run.created), *map(_safe, (run.kind, run.model, run.base or "", _found(run))))
            for run in runs
        ],
        left=6,
    )
    made.columns[0].justify = "right"
    for column in made.columns[:3]:
        column.no_wrap = True
    return made


def run_lines(run: Run) -> RenderableType:
    """What was measured, where, and the numbers that sum it up; all of them are in an export."""
    head = [f"run {run.id}, {run.kind}, {_time(run.created)} UTC", f"model    {_model(run.model, run.fingerprint)}"]
    if run.base is not None:
        head.append(f"against  {_model(run.base, run.base_fingerprint or '')}")
    result = run.result
    if result is None:
        return Text(_printable("\n".join([*head, f"cannot be read: {run.unreadable}"])))
    where = result.setting
    head.append(f"on       {where.hardware} ({where.device}), {where.threads} threads, as {result.model.dtype}")
    head.append("with     " + ", ".join(f"{name} {version}" for name, version in where.versions.items()))
    if isinstance(result, Evaluation):
        head += ["", *(found.sentence for found in result.comparisons)]
    found = figures(result)
    shown = [figure for figure in found if not figure.detail]
    numbers = table(
        ("", "value", "interval", "from"),
        [
            (
                _safe(each.name),
                _number(each.value, each.unit),
                _interval(each),
                "" if each.items is None else f"{each.items:,}",
            )
            for each in shown
        ],
    )
    notes = [f"note: {note}" for note in result.notes]
    if len(found) > len(shown):
        notes.append(f"{len(found) - len(shown)} more numbers are in an export")
    return Group(Text(_printable("\n".join(head)) + "\n"), numbers, *_below(notes))


def comparison_table(comparison: RunComparison) -> RenderableType:
    """Two runs side by side: what sums them up, and the differences of what may be compared."""
    first, second = comparison.first, comparison.second
    head = [f"run {run.id}  {_model(run.model, run.fingerprint)}, {_time(run.created)} UTC" for run in (first, second)]
    shown = [each for each in comparison.contrasts if not _is_detail(each)]
    made = table(
        ("", f"run {first.id}", f"run {second.id}", "difference", "interval", ""),
        [_contrast(each, second.id) for each in shown],
    )
    made.columns[-1].justify = "left"
    notes = [f"note: {note}" for note in comparison.notes]
    if rest := len(comparison.contrasts) - len(shown):
        notes.append(f"{rest} more numbers are in an export of both")
    return Group(Text(_printable("\n".join(head)) + "\n"), made, *_below(notes))


def _contrast(each: Contrast, second: int) -> tuple[str, ...]:
    def value(figure: Figure | None) -> str:
        return "" if figure is None else _number(figure.value, figure.unit)

    remark, difference = each.remark, each.difference
    if difference is not None and difference.low is not None and difference.high is not None:
        better = difference.higher_is_better
        if better is not None and (difference.low > 0 or difference.high < 0):
            remark = f"run {second} {'better' if (difference.low > 0) == better else 'worse'}"
    return (
        _safe(each.name),
        value(each.first),
        value(each.second),
        "" if difference is None else _number(difference.value, difference.unit, signed=True),
        "" if difference is None else _interval(difference, signed=True),
        _safe(remark),
    )


def _is_detail(contrast: Contrast) -> bool:
    return all(figure.detail for figure in (contrast.first, contrast.second) if figure is not None)


def _found(run: Run) -> str:
    """A run in a few words."""
    result = run.result
    if result is None:
        return f"unreadable: {run.unreadable}"
    if isinstance(result, Evaluation):
        words = []
        if result.text is not None:
            words.append(f"loss {result.text.loss.value:.4f}")
            if result.text.divergence is not None:
                words.append(f"KL {result.text.divergence.kl.value:.4f}")
        words += [f"{task.name} {task.value.value:.3g}" for task in result.tasks[:3]]
        if len(result.tasks) > 3:
            words.append(f"{len(result.tasks) - 3} more tasks")
        worse = sum(found.outcome == "worse" for found in result.comparisons)
        verdict = f"; worse on {worse} of {len(result.comparisons)}" if result.comparisons else ""
        return ", ".join(words) + verdict
    if isinstance(result, Blame):
        dearest = max(result.sites, key=lambda site: site.cost.value, default=None)
        most = "" if dearest is None else f", most by {dearest.name} ({dearest.cost.value:.4f})"
        return f"KL {result.kl.value:.4f}{most}"
    fastest = [
        f"{phase} {_number(max(p.tokens_per_second for p in result.points if p.phase == phase), 'tokens/s')}"
        for phase in dict.fromkeys(point.phase for point in result.points)
    ]
    return ", ".join([result.engine, *fastest, f"peak {size(result.memory_peak)}"])


def _model(name: str, fingerprint: str) -> str:
    return f"{name} ({fingerprint[:12]})" if fingerprint else name


def _time(created: str) -> str:
    try:
        time = datetime.fromisoformat(created)
    except ValueError:
        return _safe(created)
    return (time.astimezone(UTC) if time.tzinfo else time).strftime("%Y-%m-%d %H:%M")


def _number(value: float, unit: str, *, signed: bool = False) -> str:
    sign = "-" if value < 0 else "+" if signed and value > 0 else ""
    if unit == "bytes":
        return sign + size(abs(value))
    if unit == "share":
        return f"{sign}{100 * abs(value):.2f}{' points' if signed else ' %'}"
    if unit in ("nats", "bits"):
        shown = f"{abs(value):.4f}"
    else:
        shown = f"{abs(value):,.0f}" if 1000 <= abs(value) < 1e15 else f"{abs(value):.4g}"
    return f"{sign}{shown}" + (f" {_safe(unit)}" if unit else "")


def _interval(figure: Figure, *, signed: bool = False) -> str:
    if figure.low is None or figure.high is None:
        return ""
    low, high = (_number(bound, figure.unit, signed=signed) for bound in (figure.low, figure.high))
    return f"{low.partition(' ')[0]} to {high.partition(' ')[0]}" if figure.unit != "bytes" else f"{low} to {high}"


def _below(lines: Iterable[str]) -> list[Text]:
    text = "\n".join(lines)
    return [Text("\n" + _printable(text))] if text else []


def _safe(text: str) -> str:
    """Names come from elsewhere: no markup and no control characters."""
    return escape(_printable(text).replace("\n", " "))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
