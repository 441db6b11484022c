"""What the harness recorded of a task, item by item -> its scores."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tersely.errors import UsageError
from tersely.evaluation.tasks.harness import Prepared
from tersely.evaluation.tasks.scores import Kind, TaskScores

_RIGHT = frozenset({"acc", "acc_norm", "acc_bytes", "exact_match", "acc_mutual_info"})


def samples(task: Prepared, result: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(task object, the harness's record) of each item, in the order of the data; of several filters the first."""
    found = []
    for name in task.tasks:
        records = result["samples"].get(name, ())
        filters = list(dict.fromkeys(record["filter"] for record in records))
        found += [(name, record) for record in records if record["filter"] == filters[0]]
    return found


def scores_of(task: Prepared, results: Sequence[Mapping[str, Any]], seconds: float) -> TaskScores:
    """What the models scored. results: per model, what the harness gave; seconds: that it all took."""
    recorded = [samples(task, result) for result in results]
    names = [name for name, _ in recorded[0]]
    records = [[record for _, record in per_model] for per_model in recorded]
    prompts = [[record["arguments"] for record in per_model] for per_model in records]
    assert all(other == prompts[0] for other in prompts), "the models were not asked the same"
    metric = task.metric or _metric(records[0][0])
    scores = tuple(tuple(_score(metric, record[metric]) for record in per_model) for per_model in records)
    kind: Kind = task.kind or (
        "right" if metric in _RIGHT and all(score in (0.0, 1.0) for each in scores for score in each) else "score"
    )
    found = [[_choices(task.tasks[name], record) for name, record in per_model] for per_model in recorded]
    answers = [choice[1] for choice in found[0] if choice is not None]
    complete = len(answers) == len(names) and all(choice is not None for per_model in found for choice in per_model)
    chance = task.chance
    if chance is None and complete and kind == "right":
        chance = math.fsum(1 / len(choice[0]) for choice in found[0] if choice is not None) / len(names)
    return TaskScores(
        name=task.name,
        title=task.title,
        group=task.group,
        metric=metric,
        higher_is_better=_higher(task.tasks[names[0]], metric),
        chance=chance,
        kind=kind,
        available=task.available,
        sha256=_sha256(names, records[0]),
        parts=tuple(task.parts[name] for name in names),
        scores=scores,
        labels=tuple(bool(record["doc"]["member"]) for record in records[0]) if kind == "auc" else None,
        choices=tuple(tuple(c[0] for c in per_model if c is not None) for per_model in found) if complete else None,
        answers=tuple(answers) if complete else None,
        harness=tuple(_aggregated(task, result) for result in results),
        seconds=seconds,
    )


def _metric(record: Mapping[str, Any]) -> str:
    """The metric that counts, of a task that comes without one: accuracy where it has it, else its first number."""
    metrics: list[str] = [name for name in record["metrics"] if _readable(name, record[name])]
    if not metrics:
        raise UsageError(f"its metrics {', '.join(record['metrics'])} give no number for an item; choose another task")
    return next((name for name in metrics if name in _RIGHT), metrics[0])


def _readable(metric: str, value: Any) -> bool:
    try:
        _score(metric, value)
    except (TypeError, ValueError, IndexError):
        return False
    return True


def _score(metric: str, value: Any) -> float:
    """An item's score. Perplexities become nats a unit; a class and its prediction, whether they agree."""
    if not isinstance(value, tuple | list):
        return -float(value) if metric == "perplexity" else float(value)
    first, second = value
    if metric in ("word_perplexity", "byte_perplexity"):
        return -float(first) / float(second)
    if metric == "bits_per_byte":
        return -float(first) / float(second) / math.log(2)
    if metric == "brier_score":
        return math.fsum((float(p) - (i == first)) ** 2 for i, p in enumerate(second))
    return float(second) if metric == "auc" else float(first == second)


def _higher(task: Any, metric: str) -> bool:
    return bool(task.higher_is_better().get(metric, True))


def _choices(task: Any, record: Mapping[str, Any]) -> tuple[tuple[float, ...], int] | None:
    """Of a multiple choice: each choice's share of the probability of all, and the index of the right one."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    choices = list(task.doc_to_choice(record["doc"]))
    right = task.doc_to_text(record["doc"]) if task.multiple_input else record["target"]
    if isinstance(right, list) and len(right) == 1:
        (right,) = right
    if isinstance(right, str) and right in choices:
        right = choices.index(right)
    if not isinstance(right, int) or not 0 <= right < len(choices):
        return None
    logs = [float(response[0]) for response in record["filtered_resps"][: len(choices)]]
    shares = [math.exp(log - max(logs)) for log in logs]
    return tuple(share / math.fsum(shares) for share in shares), right


def _aggregated(task: Prepared, result: Mapping[str, Any]) -> dict[str, float]:
    """The harness's numbers for the task as a whole; of several without a group, each under its own name."""
    results = result["results"]
    names = [*task.groups, *(task.tasks if len(task.tasks) == 1 else ())]
    whole = [results[name] for name in names if name in results]
    numbers = _numbers(whole[0]) if whole else {}
    if not numbers:
        for name in task.tasks:
            numbers |= {f"{name}: {metric}": value for metric, value in _numbers(results.get(name, {})).items()}
    return numbers


def _numbers(found: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in found.items()
        if "," in name and isinstance(value, int | float) and not math.isnan(value)
    }


def _sha256(names: Sequence[str], records: Sequence[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for name, record in zip(names, records, strict=True):
        item = [name, record["arguments"], record["target"]]
        digest.update(json.dumps(item, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
