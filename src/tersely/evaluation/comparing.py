"""Two stored runs side by side: like with like, and what is unlike said so."""

from __future__ import annotations

import math
from dataclasses import replace

from tersely.errors import DataError, UsageError
from tersely.results.run import Contrast, Figure, Run, RunComparison, figures

_NORMAL = 1.959964
"""Of the standard normal distribution, 97.5 %."""


def compare_runs(first: Run, second: Run) -> RunComparison:
    """Set two runs of one kind side by side, number by number; differences are second minus first.

    Numbers are compared where their conditions are equal: the same text and tokens, the same items of a task, the
    same base (by fingerprint) for what is measured against one, the same hardware and threads for speeds. Others
    stand beside each other with a remark and without a difference.

    Raises UsageError: runs of different kinds; DataError: a run that this version cannot read.
    """
    for run in (first, second):
        if run.result is None:
            raise DataError(f"run {run.id} cannot be read: {run.unreadable}")
    if first.kind != second.kind:
        raise UsageError(
            f"run {first.id} is of the kind {first.kind} and run {second.id} of the kind {second.kind}; "
            "compare runs of one kind"
        )
    assert first.result is not None
    assert second.result is not None
    before = {figure.name: figure for figure in figures(first.result)}
    after = {figure.name: figure for figure in figures(second.result)}
    contrasts = [_contrast(name, before.get(name), after.get(name), first.id, second.id) for name in before | after]
    contrasts.sort(key=lambda contrast: _is_detail(contrast))
    return RunComparison(first, second, tuple(contrasts), _notes(first, second, contrasts))


def _contrast(name: str, before: Figure | None, after: Figure | None, first: int, second: int) -> Contrast:
    either = before or after
    assert either is not None
    if before is None or after is None:
        return Contrast(name, either.unit, before, after, None, f"only in run {second if before is None else first}")
    remark = _unlike(before, after)
    return Contrast(name, before.unit, before, after, None if remark else _difference(before, after), remark)


def _unlike(before: Figure, after: Figure) -> str:
    """What two numbers were not measured alike on; "" where nothing speaks against comparing them."""
    if before.unit != after.unit:
        return f"not comparable: in {before.unit} and in {after.unit}"
    then, now = before.conditions, after.conditions
    names = list({**then, **now})
    unknown = [name for name in names if not then.get(name) or not now.get(name)]
    other = [name for name in names if name not in unknown and then[name] != now[name]]
    if other:
        return f"not comparable: other {' and '.join(other)}"
    return f"not comparable: {' and '.join(unknown)} not known" if unknown else ""


def _difference(before: Figure, after: Figure) -> Figure:
    value = after.value - before.value
    nothing_known = replace(after, value=value, stderr=None, low=None, high=None)
    if before.stderr is None or after.stderr is None:
        return nothing_known
    stderr = math.hypot(before.stderr, after.stderr)
    return replace(nothing_known, stderr=stderr, low=value - _NORMAL * stderr, high=value + _NORMAL * stderr)


def _is_detail(contrast: Contrast) -> bool:
    return all(figure.detail for figure in (contrast.first, contrast.second) if figure is not None)


def _notes(first: Run, second: Run, contrasts: list[Contrast]) -> tuple[str, ...]:
    notes = []
    if first.fingerprint and first.fingerprint == second.fingerprint:
        notes.append("both runs measured the same model")
    if not any(contrast.difference for contrast in contrasts):
        notes.append("the runs have no number that may be compared: measure both models on the same data")
    elif any(contrast.difference and contrast.difference.stderr for contrast in contrasts):
        advice = f"; tersely evaluate {second.model} --against {first.model} pairs them" * (first.kind == "evaluation")
        notes.append(
            "intervals of differences are those of independent samples, wider than need be on the same items, and not "
            f"corrected for many comparisons{advice}"
        )
    return tuple(notes)
