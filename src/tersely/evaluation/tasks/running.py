"""Ask tasks of models: which items, in what time, and what came of it.

Every model gets the same requests, task by task. Items are drawn at random, evenly over the parts of a task, in an
order that `seed` fixes: a larger sample contains the smaller one, so that what a pilot measured is not lost.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tersely.errors import UsageError
from tersely.evaluation.tasks import harness
from tersely.evaluation.tasks.answers import Answers
from tersely.evaluation.tasks.grading import rouge_l
from tersely.evaluation.tasks.harness import Prepared
from tersely.evaluation.tasks.scores import Kind, TaskScores
from tersely.evaluation.tasks.sources import Tokens
from tersely.runtime import Loaded

Progress = Callable[[str, float], None]
_SHOT_SEED = 1234
"""The harness's own for the examples before a question."""
_FEWEST = 20
"""Items that a task should have, where the budget allows."""
_FIRST, _GROWTH = 2, 4
"""Items of a pilot's first round, and how many times larger a round may be than the one before."""
_PILOT_SHARE = 0.15
_SAFE = 0.95
_RIGHT = frozenset({"acc", "acc_norm", "acc_bytes", "exact_match", "acc_mutual_info"})


@dataclass(eq=False)
class _Asked:
    """A task while it is asked.

    order: (task object, item), as drawn; most: of them to ask; count: asked so far. rate: seconds that all models
    together run for an item, None while all answers were known; extra: seconds the harness takes for one, each time.
    """

    task: Prepared
    order: list[tuple[str, int]]
    most: int
    results: list[dict[str, Any]] = field(default_factory=list)
    count: int = 0
    rate: float | None = None
    extra: float = 0.0
    seconds: float = 0.0

    def time(self, count: int) -> float:
        """Seconds to ask `count` items, those included that are answered; what is not known takes none."""
        return (self.rate or 0.0) * max(0, count - self.count) + self.extra * count

    def reach(self, seconds: float) -> int:
        """How many items such a time leads to: at most four times as many as now, since rates change."""
        if self.rate is None:
            return min(self.most, max(_FIRST, self.count + self.count // 2))
        count = int((seconds + self.rate * self.count) / max(self.rate + self.extra, 1e-9))
        return min(self.most, count, max(_FEWEST, _GROWTH * self.count))


def check_tasks(names: Sequence[str], data: Path | None) -> None:
    """See that all tasks can be asked: known, their data in place and readable. Loads no model.

    Raises UsageError: the harness is not installed, an unknown task (with the nearest names), or one named twice;
    DataError: data that are missing (with their place) or not what they should be.
    """
    if not names:
        return
    harness.require_harness()
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise UsageError(f"{', '.join(twice)}: named twice; name each task once")
    for name in names:
        harness.check(name, data)


def run_tasks(
    models: Sequence[Loaded],
    names: Sequence[str],
    *,
    data: Path | None,
    limit: int | None = None,
    budget: float | None = None,
    seed: int = 0,
    tokens_per_batch: int = 4096,
    answers: Sequence[MutableMapping[str, bytes]] | None = None,
    progress: Progress | None = None,
) -> tuple[list[TaskScores], list[str]]:
    """Ask models the same items of tasks; gives the scores, and notes on what was left out, cut short or truncated.

    names: of tersely's own tasks, paths of task files, or names of the harness. limit: items of each task, spread over
    its parts. budget: seconds for everything here; a pilot measures what an item of each task costs, then all tasks
    get the same time, and what a small one leaves goes to the others. answers: for each model, requests -> responses
    that are known; filled as the work goes on. progress: what is done, and the share that is done.

    Raises what `check_tasks` raises; CheckpointError: a model that gives NaN, or whose tokenizer is not its own.
    """
    start = time.monotonic()
    for what, number in (("limit", limit), ("budget", budget), ("tokens_per_batch", tokens_per_batch)):
        if number is not None and number <= 0:
            raise UsageError(f"{what}={number}: expected more than 0")
    if answers is not None and len(answers) != len(models):
        raise UsageError(f"{len(answers)} stores of answers for {len(models)} models; give one for each")
    check_tasks(names, data)
    readers = [
        Answers(model, tokens_per_batch=tokens_per_batch, answers=kept, seed=seed, errors=sys.stderr)
        for model, kept in zip(models, answers or [{} for _ in models], strict=True)
    ]
    tokens = Tokens(models[0].tokenizer, min(reader.positions for reader in readers))
    asked = []
    for name in names:
        task = harness.prepare(name, data, tokens)
        order = _order(task, seed)
        asked.append(_Asked(task, order, len(order) if limit is None else min(limit, len(order))))
    say = progress or _silent
    if budget is None:
        for number, each in enumerate(asked):
            _ask(each, each.most, readers, _ticking(say, each.task.name, number, len(asked), len(readers)))
    else:
        _within(asked, readers, start, budget, say)
    scores: list[TaskScores] = []
    notes: list[str] = []
    for each in asked:
        notes += each.task.notes
        made = _scores(each)
        scores.append(made)
        if each.count < each.most:
            notes.append(f"{each.task.name}: {each.count} of {each.most} items, as many as the time allowed")
        notes += _cut(each, readers)
        notes += _likeness(each, readers)
    return scores, notes


# Which items.


def _order(task: Prepared, seed: int) -> list[tuple[str, int]]:
    """All items: one of each part in turn, parts and the items of each shuffled."""
    draw = random.Random(f"{seed} {task.name}")
    left: list[list[tuple[str, int]]] = []
    for name, size in task.sizes.items():
        for stratum in _strata(task, name, size):
            items = [(name, i) for i in stratum]
            draw.shuffle(items)
            left.append(items)
    draw.shuffle(left)
    order = []
    while left:
        order += [items.pop() for items in left]
        left = [items for items in left if items]
    return order


def _strata(task: Prepared, name: str, size: int) -> list[list[int]]:
    """Of an auc task members and others, so that samples have as many of each."""
    if task.kind != "auc":
        return [list(range(size))]
    members = task.tasks[name].eval_docs["member"]
    return [[i for i in range(size) if members[i] == label] for label in (0, 1)]


def _chosen(each: _Asked) -> dict[str, list[int]]:
    chosen: dict[str, list[int]] = {}
    for name, item in sorted(each.order[: each.count]):
        chosen.setdefault(name, []).append(item)
    return {name: chosen[name] for name in each.task.tasks if name in chosen}


# Asking.


def _ticking(say: Progress, name: str, number: int, tasks: int, models: int) -> Callable[[int, float], None]:
    return lambda model, share: say(name, (number + (model + share) / models) / tasks)


def _within(asked: Sequence[_Asked], readers: Sequence[Answers], start: float, budget: float, say: Progress) -> None:
    """Ask as many items of each task as the time allows: after a pilot, the same time for each (water-filling)."""

    def ask(each: _Asked, count: int) -> None:
        _ask(each, count, readers, lambda _m, _s: say(each.task.name, min(1.0, (time.monotonic() - start) / budget)))

    pilot = _PILOT_SHARE * budget / len(asked)
    for each in asked:
        begin = time.monotonic()
        while each.count < each.most:
            count = min(each.most, max(_FIRST, _GROWTH * each.count))
            if each.count and time.monotonic() - begin + each.time(count) > pilot:
                break
            ask(each, count)
    for number, each in enumerate(asked):
        left = _SAFE * budget - (time.monotonic() - start)
        end = time.monotonic() + _shares(asked[number:], left)[0]
        while (count := each.reach(end - time.monotonic())) >= min(each.most, 1 + int(1.1 * each.count)) > each.count:
            ask(each, count)


def _shares(tasks: Sequence[_Asked], seconds: float) -> list[float]:
    """The same time for each, but no more than it can use, and enough for the fewest items where there is as much."""
    full = [each.time(each.most) for each in tasks]
    least = [each.time(max(each.count, min(_FEWEST, each.most))) for each in tasks]
    if math.fsum(least) > seconds:
        least = [0.0] * len(tasks)
    low, high = 0.0, max(0.0, seconds)
    for _ in range(50):
        level = (low + high) / 2
        given = math.fsum(min(max(level, need), most) for need, most in zip(least, full, strict=True))
        low, high = (level, high) if given <= seconds else (low, level)
    return [min(max(low, need), most) for need, most in zip(least, full, strict=True)]


def _ask(each: _Asked, count: int, readers: Sequence[Answers], tick: Callable[[int, float], None]) -> None:
    """Ask all models the first `count` items in order; learn what an item costs from those that were new."""
    start = time.monotonic()
    each.count = count
    each.results = []
    rates: list[float | None] = []
    spent = 0.0
    for number, reader in enumerate(readers):
        seconds, requests = reader.seconds, reader.asked
        reader.tick = partial(tick, number)
        result = _harness_run(each, reader)
        reader.tick = None
        each.results.append(result)
        seconds, requests = reader.seconds - seconds, reader.asked - requests
        spent += seconds
        for_each = sum(len(sample["arguments"]) for _, sample in _samples(each, result)) / count
        rates.append(seconds / requests * for_each if requests else None)
    wall = time.monotonic() - start
    each.seconds += wall
    each.extra = max(0.0, wall - spent) / count
    known = [rate for rate in rates if rate is not None]
    if known:  # a model whose answers were all kept will not have kept all
        each.rate = math.fsum(max(known) if rate is None else rate for rate in rates)


def _harness_run(each: _Asked, reader: Answers) -> dict[str, Any]:
    """Let the harness make the requests, grade the answers and aggregate the grades."""
    with harness.silence():
        from lm_eval.api.metrics import acc_all_stderr, mean_stderr, stderr_for_metric
        from lm_eval.evaluator import evaluate

        chosen = _chosen(each)
        tasks = {name: each.task.tasks[name] for name in chosen}
        plain = True
        for task in tasks.values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_SHOT_SEED)
            # Other standard errors than these two the harness finds by resampling, in many processes, for minutes.
            errors = [stderr_for_metric(metric, 1) for metric in task.aggregation().values()]
            plain = plain and all(error in (None, mean_stderr, acc_all_stderr) for error in errors)
        results: dict[str, Any] = evaluate(
            lm=reader,
            task_dict={"tasks": tasks, "groups": each.task.groups},
            samples={name: items for name, items in chosen.items() if len(items) < each.task.sizes[name]},
            bootstrap_iters=1 if plain else 0,
            log_samples=True,
        )
    return results


# What came of it.


def _samples(each: _Asked, result: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(task object, the harness's record) of each item, in the order of the data; of several filters the first."""
    found = []
    for name in each.task.tasks:
        records = result["samples"].get(name, ())
        filters = list(dict.fromkeys(record["filter"] for record in records))
        found += [(name, record) for record in records if record["filter"] == filters[0]]
    return found


def _scores(each: _Asked) -> TaskScores:
    task = each.task
    samples = [_samples(each, result) for result in each.results]
    names = [name for name, _ in samples[0]]
    records = [[record for _, record in per_model] for per_model in samples]
    prompts = [[record["arguments"] for record in per_model] for per_model in records]
    assert all(other == prompts[0] for other in prompts), "the models were not asked the same"
    metric = task.metric or _metric(records[0][0])
    scores = tuple(tuple(_score(metric, record[metric]) for record in per_model) for per_model in records)
    kind: Kind = task.kind or (
        "right" if metric in _RIGHT and all(score in (0.0, 1.0) for each in scores for score in each) else "score"
    )
    found = [[_choices(task.tasks[name], record) for name, record in per_model] for per_model in samples]
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
        harness=tuple(_aggregated(each, result) for result in each.results),
        seconds=each.seconds,
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


def _aggregated(each: _Asked, result: Mapping[str, Any]) -> dict[str, float]:
    """The harness's numbers for the task as a whole; of several without a group, each under its own name."""
    results = result["results"]
    names = [*each.task.groups, *(each.task.tasks if len(each.task.tasks) == 1 else ())]
    whole = [results[name] for name in names if name in results]
    numbers = _numbers(whole[0]) if whole else {}
    if not numbers:
        for name in each.task.tasks:
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


def _cut(each: _Asked, readers: Sequence[Answers]) -> list[str]:
    notes = []
    for reader, result in zip(readers, each.results, strict=True):
        writing = [t.config.generation_kwargs for t in each.task.tasks.values() if t.OUTPUT_TYPE == "generate_until"]
        short = [reader.length(settings) for settings in writing]
        if any(new < wanted for new, wanted in short):
            notes.append(
                f"{each.task.name}: {reader.model.name} wrote at most {min(new for new, _ in short)} tokens, half of "
                "its positions"
            )
        cut = 0
        for name, record in _samples(each, result):
            kind = each.task.tasks[name].OUTPUT_TYPE
            asked = "generate_until" if kind == "generate_until" else "loglikelihood"
            cut += any(reader.cut(asked, arguments) for arguments in record["arguments"])
        if cut:
            notes.append(
                f"{each.task.name}: {cut} of {each.count} prompts do not fit the {reader.positions} positions of "
                f"{reader.model.name} and lost their beginning"
            )
    return notes


def _likeness(each: _Asked, readers: Sequence[Answers]) -> list[str]:
    """How alike the summaries of two models are: for those who have no reference that they trust."""
    if each.task.metric != "rougeL" or len(readers) != 2:
        return []
    texts = [[record["filtered_resps"][0] for _, record in _samples(each, result)] for result in each.results]
    alike = math.fsum(rouge_l(one, other) for one, other in zip(*texts, strict=True)) / each.count
    return [
        f"{each.task.name}: the texts of {readers[0].model.name} and {readers[1].model.name} have a ROUGE-L of "
        f"{alike:.3f} with each other"
    ]


def _silent(_what: str, _share: float) -> None:
    """For callers who want no progress."""
