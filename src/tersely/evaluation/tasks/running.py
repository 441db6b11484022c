"""Ask tasks of models: which items, in what time, and what came of it.

Every model gets the same requests, task by task. Items are drawn at random, evenly over the parts of a task, in an
order that `seed` fixes: a larger sample contains the smaller one, so that what a pilot measured is not lost.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tersely.errors import UsageError
from tersely.evaluation.tasks import harness
from tersely.evaluation.tasks.answers import Answers
from tersely.evaluation.tasks.budget import Asked, spend
from tersely.evaluation.tasks.grading import rouge_l
from tersely.evaluation.tasks.harness import Prepared
from tersely.evaluation.tasks.items import Tokens
from tersely.evaluation.tasks.records import samples, scores_of
from tersely.evaluation.tasks.scores import TaskScores
from tersely.runtime import Loaded

Progress = Callable[[str, float], None]
_SHOT_SEED = 1234
"""The harness's own for the examples before a question."""


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
        asked.append(Asked(task, order, len(order) if limit is None else min(limit, len(order))))
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
        scores.append(scores_of(each.task, each.results, each.seconds))
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


def _chosen(each: Asked) -> dict[str, list[int]]:
    chosen: dict[str, list[int]] = {}
    for name, item in sorted(each.order[: each.count]):
        chosen.setdefault(name, []).append(item)
    return {name: chosen[name] for name in each.task.tasks if name in chosen}


# Asking.


def _ticking(say: Progress, name: str, number: int, tasks: int, models: int) -> Callable[[int, float], None]:
    return lambda model, share: say(name, (number + (model + share) / models) / tasks)


def _within(asked: Sequence[Asked], readers: Sequence[Answers], start: float, budget: float, say: Progress) -> None:
    def ask(each: Asked, count: int) -> None:
        _ask(each, count, readers, lambda _m, _s: say(each.task.name, min(1.0, (time.monotonic() - start) / budget)))

    spend(asked, ask, start, budget)


def _ask(each: Asked, count: int, readers: Sequence[Answers], tick: Callable[[int, float], None]) -> None:
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
        for_each = sum(len(sample["arguments"]) for _, sample in samples(each.task, result)) / count
        rates.append(seconds / requests * for_each if requests else None)
    wall = time.monotonic() - start
    each.seconds += wall
    each.extra = max(0.0, wall - spent) / count
    known = [rate for rate in rates if rate is not None]
    if known:  # a model whose answers were all kept will not have kept all
        each.rate = math.fsum(max(known) if rate is None else rate for rate in rates)


def _harness_run(each: Asked, reader: Answers) -> dict[str, Any]:
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


# What is said of it.


def _cut(each: Asked, readers: Sequence[Answers]) -> list[str]:
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
        for name, record in samples(each.task, result):
            kind = each.task.tasks[name].OUTPUT_TYPE
            asked = "generate_until" if kind == "generate_until" else "loglikelihood"
            cut += any(reader.cut(asked, arguments) for arguments in record["arguments"])
        if cut:
            notes.append(
                f"{each.task.name}: {cut} of {each.count} prompts do not fit the {reader.positions} positions of "
                f"{reader.model.name} and lost their beginning"
            )
    return notes


def _likeness(each: Asked, readers: Sequence[Answers]) -> list[str]:
    """How alike the summaries of two models are: for those who have no reference that they trust."""
    if each.task.metric != "rougeL" or len(readers) != 2:
        return []
    texts = [[record["filtered_resps"][0] for _, record in samples(each.task, result)] for result in each.results]
    alike = math.fsum(rouge_l(one, other) for one, other in zip(*texts, strict=True)) / each.count
    return [
        f"{each.task.name}: the texts of {readers[0].model.name} and {readers[1].model.name} have a ROUGE-L of "
        f"{alike:.3f} with each other"
    ]


def _silent(_what: str, _share: float) -> None:
    """For callers who want no progress."""
