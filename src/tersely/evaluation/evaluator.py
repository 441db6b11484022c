"""One evaluation: a model on a text and on tasks, alone or against a base, within a time that the user gives."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from tersely import __version__
from tersely.calibrate import DOCUMENT_SEPARATOR, documents, read_text
from tersely.errors import UsageError
from tersely.evaluation.divergence import measure_text
from tersely.evaluation.statistics import auc, calibration, mean
from tersely.evaluation.store import Store
from tersely.evaluation.subject import setting, subject
from tersely.evaluation.tasks import TaskScores, check_tasks, run_tasks
from tersely.evaluation.text_result import Measured
from tersely.evaluation.verdict import compare_answers, compare_auc, compare_losses, overall, settle
from tersely.results import Comparison, Evaluation, Part, Sample, Subject, TaskResult
from tersely.runtime import Loaded, load_model, load_tokenizers, max_positions, require_causal, write
from tersely.runtime.policy import stored_policy

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of the evaluation that is done, 0 to 1."""
_PROMPT_TOKENS, _NEW_TOKENS = 24, 48
_WRITING = 0.05
"""Of the time: for samples."""


@dataclass(frozen=True)
class _Shares:
    """When each part is to end, as shares of the whole."""

    text: float
    tasks: float


def evaluate(
    model: str | Path,
    text: str | Path | None = None,
    *,
    against: str | Path | None = None,
    tasks: Sequence[str] = (),
    data: str | Path | None = None,
    context: int | None = None,
    samples: int | None = None,
    writing: int = 3,
    budget: float | None = None,
    tokens_per_batch: int = 4096,
    device: str = "cpu",
    dtype: Literal["auto"] | torch.dtype = "auto",
    seed: int = 0,
    store: Store | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Say of a causal language model what it keeps of a base: on a text, on tasks, with intervals and a verdict.

    text: a file, or some of its documents: `sample.txt[-200:]`. tasks: names that `tersely tasks` lists, of the
    evaluation harness, or YAML files of your own; data: the folder that holds the tasks' data. context: tokens of a
    sequence, by default the model's positions, at most 2048. samples: documents or windows of the text, and items of
    each task (default: all, or with a budget what fits). writing: how many texts both models continue, for the eye.
    budget: seconds for everything, loading included; sample sizes are chosen for it.
    store: the result is added to it, and what is measured is kept there as it comes, so that a killed evaluation
    continues where it was when it is started again with the same arguments.

    Memory: the models, and the logits of one micro-batch (tokens_per_batch x vocabulary) for each.

    Raises UsageError: not a causal language model, nothing to measure, an unknown task, a bad number; DataError: the
    text or a task's data, or models that share no vocabulary; CheckpointError: a model that cannot be loaded or gives
    NaN.
    """
    start = time.monotonic()
    say = progress or _silent
    if text is None and not tasks:
        raise UsageError("nothing to evaluate on: give a text, tasks, or both")
    for name, number in (("budget", budget), ("samples", samples), ("tokens_per_batch", tokens_per_batch)):
        if number is not None and number <= 0:
            raise UsageError(f"{name}={number}: expected more than 0")
    if writing < 0:
        raise UsageError(f"writing={writing}: expected 0 or more")
    folders = [Path(model)] + ([] if against is None else [Path(against)])
    for folder in folders:
        require_causal(folder, "are evaluated")
    content = None if text is None else read_text(text)
    data_folder = None if data is None else Path(data)
    check_tasks(tasks, data_folder)
    say("loading", 0.0)
    models = [
        Loaded(str(folder), load_model(folder, device=device, dtype=dtype), tokenizer, device)
        for folder, tokenizer in zip(folders, load_tokenizers(folders), strict=True)
    ]
    subjects = [_subject(m) for m in models]
    base = subjects[1] if len(models) > 1 else None
    where = setting(device, packages=["compressed-tensors", *(["lm-eval", "datasets"] if tasks else [])])
    key = _key(subjects, content, tasks, context, samples, tokens_per_batch, seed, budget, device)
    kept = None if store is None else store.unfinished(key)
    shares = _shares(content is not None, len(tasks), writing if content else 0)
    comparisons: list[Comparison] = []
    notes: list[str] = []

    def left(share: float) -> float | None:
        """Seconds until this share of the budget is used."""
        return None if budget is None else max(0.0, share * budget - (time.monotonic() - start))

    measured: Measured | None = None
    if content is not None:
        measured = measure_text(
            models,
            content,
            str(text),
            context=context,
            samples=samples,
            tokens_per_batch=tokens_per_batch,
            budget=left(shares.text),
            seed=seed,
            unfinished=kept,
            progress=lambda share: say("predicting the text", shares.text * share),
        )
        notes += measured.notes
        if measured.sizes and base is not None:
            comparisons.append(
                compare_losses(
                    f"loss on {Path(str(text)).name}",
                    measured.totals,
                    measured.base_totals,
                    measured.sizes,
                    unit=measured.unit,
                    seed=seed,
                )
            )
    results: list[TaskResult] = []
    if tasks:
        scored, more = run_tasks(
            models,
            tasks,
            data=data_folder,
            limit=samples,
            budget=left(shares.tasks),
            seed=seed,
            tokens_per_batch=tokens_per_batch,
            answers=None if store is None else [_answers(store, s, device) for s in subjects],
            progress=lambda what, share: say(what, shares.text + (shares.tasks - shares.text) * share),
        )
        notes += more
        if any(stored_policy(model.network.config) is not None for model in models):
            notes.append("tasks are asked with keys and values as they come, not as the checkpoint's cache keeps them")
        for scores in scored:
            results.append(_task_result(scores, seed))
            if base is not None:
                comparisons.append(_compared(scores, seed))
    written: tuple[Sample, ...] = ()
    if content is not None and writing:
        say("writing samples", shares.tasks)
        written = _written(models, content, writing)
    settled = settle(comparisons)
    apart = None if measured is None else measured.result.whole
    result = Evaluation(
        model=subjects[0],
        base=base,
        setting=where,
        seed=seed,
        text=None if measured is None else measured.result,
        tasks=tuple(results),
        verdict="" if base is None else overall(settled, apart),
        comparisons=settled,
        samples=written,
        notes=tuple(notes),
        budget=budget,
        seconds=time.monotonic() - start,
    )
    if store is not None:
        store.add(result)
        assert kept is not None
        kept.clear()
    say("finished", 1.0)
    return result


def _subject(model: Loaded) -> Subject:
    return subject(model.name, dtype=str(model.network.dtype).removeprefix("torch."))


def _shares(text: bool, tasks: int, writing: int) -> _Shares:
    """The text gets as much time as a task."""
    end = 1 - _WRITING if writing else 1.0
    return _Shares(text=end / (1 + tasks) if text else 0.0, tasks=end)


def _key(
    subjects: Sequence[Subject],
    content: str | None,
    tasks: Sequence[str],
    context: int | None,
    samples: int | None,
    tokens_per_batch: int,
    seed: int,
    budget: float | None,
    device: str,
) -> str:
    """Names an evaluation: two with the same key measure the same numbers."""
    facts = {
        "tersely": __version__,
        "torch": torch.__version__,
        "models": [(s.fingerprint, s.dtype) for s in subjects],
        "text": None if content is None else hashlib.sha256(content.encode()).hexdigest(),
        "tasks": list(tasks),
        "numbers": [context, samples, tokens_per_batch, seed, budget],
        "device": device,
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _answers(store: Store, subject: Subject, device: str) -> MutableMapping[str, bytes]:
    """What a model has answered before: kept beyond the evaluation, since bases are asked the same again and again."""
    import transformers

    facts = [subject.fingerprint, subject.dtype, device, torch.__version__, transformers.__version__]
    return store.unfinished("answers " + hashlib.sha256(json.dumps(facts).encode()).hexdigest())


def _task_result(scores: TaskScores, seed: int) -> TaskResult:
    mine, base = scores.scores[0], scores.scores[1] if len(scores.scores) > 1 else None
    lost = gained = None
    if base is not None and scores.kind == "right":
        lost = sum(b > m for m, b in zip(mine, base, strict=True))
        gained = sum(m > b for m, b in zip(mine, base, strict=True))
    parts = []
    for name in dict.fromkeys(scores.parts):
        own = [i for i, part in enumerate(scores.parts) if part == name]
        if len(own) < len(mine):
            parts.append(
                Part(
                    name=name,
                    items=len(own),
                    value=mean([mine[i] for i in own], seed=seed),
                    base=None if base is None else mean([base[i] for i in own], seed=seed),
                )
            )

    calibrations = [
        None
        if scores.choices is None or scores.answers is None
        else calibration(scores.choices[m], scores.answers, seed=seed)
        for m in range(len(scores.scores))
    ]
    estimates = [
        auc(each, scores.labels) if scores.labels is not None else mean(each, seed=seed) for each in scores.scores
    ]
    return TaskResult(
        name=scores.name,
        title=scores.title,
        group=scores.group,
        metric=scores.metric,
        higher_is_better=scores.higher_is_better,
        chance=scores.chance,
        items=len(mine),
        available=scores.available,
        sha256=scores.sha256,
        value=estimates[0],
        base=estimates[1] if len(estimates) > 1 else None,
        lost=lost,
        gained=gained,
        parts=tuple(parts),
        calibration=calibrations[0],
        base_calibration=calibrations[1] if len(calibrations) > 1 else None,
        harness={name: value for name, value in scores.harness[0].items() if math.isfinite(value)},
        seconds=scores.seconds,
    )


def _compared(scores: TaskScores, seed: int) -> Comparison:
    name, (mine, base) = f"{scores.group} ({scores.name})", scores.scores
    if scores.kind == "auc":
        assert scores.labels is not None
        found = compare_auc(name, mine, base, scores.labels)
    else:
        found = compare_answers(name, mine, base, kind=scores.kind, higher_is_better=scores.higher_is_better, seed=seed)
    return replace(found, task=scores.name)


def _written(models: Sequence[Loaded], content: str, count: int) -> tuple[Sample, ...]:
    """How each model continues the beginnings of documents (or of stretches of a long text)."""
    if DOCUMENT_SEPARATOR in content:
        starts = documents(content)[:count]
    else:
        places = [n * len(content) // count for n in range(count)]
        starts = tuple(content[place : place + 2000].partition(" ")[2] if place else content[:2000] for place in places)
    room = min([n for m in models if (n := max_positions(m.network.config)) is not None], default=10**9)
    made = []
    for start in starts:
        encoded = models[0].tokenizer(start, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in encoded["offset_mapping"]][: min(_PROMPT_TOKENS, room // 4)]
        new_tokens = min(_NEW_TOKENS, room // 2)
        if len(ends) < 2:
            continue
        prompt = start[: ends[-1]]
        texts, repeated = [], []
        for model in models:
            ids, new = write(model, prompt, max_new_tokens=new_tokens)
            texts.append(new)
            repeated.append(_repetition(ids))
        sample = Sample(prompt, texts[0], None, repeated[0], None)
        made.append(sample if len(models) == 1 else replace(sample, base=texts[1], base_repetition=repeated[1]))
    return tuple(made)


def _repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of n-grams that stood before."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _silent(_what: str, _share: float) -> None:
    """For callers who want no progress."""
