"""A stored measurement, the numbers in it, and two measurements side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isinf, isnan, log
from typing import Literal

from tersely.results.blame import Blame
from tersely.results.estimate import Estimate
from tersely.results.evaluation import Bin, Divergence, Evaluation, Subject, TaskResult, TextResult
from tersely.results.speed import Speed

Kind = Literal["evaluation", "blame", "speed"]
Result = Evaluation | Blame | Speed


@dataclass(frozen=True)
class Run:
    """A measurement as the store holds it. result is None where this version of tersely cannot read it."""

    id: int
    kind: str
    """"evaluation", "blame" or "speed"; anything else was written by another version."""
    created: str
    """Start of the measurement, ISO 8601."""
    model: str
    fingerprint: str
    base: str | None
    base_fingerprint: str | None
    result: Result | None
    unreadable: str = ""
    """Why there is no result."""


@dataclass(frozen=True)
class Figure:
    """A measured number, and what must be the same elsewhere for another number to be comparable with it."""

    name: str
    unit: str
    """"nats", "bits", "share", "tokens/s", "s", "bytes" ..., a metric's name for scores of tasks, or ""."""
    value: float
    stderr: float | None
    """None: not known."""
    low: float | None
    high: float | None
    """The 95 % interval; of speeds, the slowest and the fastest repeat."""
    items: int | None
    """Tokens, questions or repeats that the number comes from."""
    conditions: Mapping[str, str]
    """"text", "items", "base", "hardware" ... -> what it was; "" is unknown, and like nothing."""
    higher_is_better: bool | None = None
    detail: bool = False
    """Not among the numbers that sum a run up."""


@dataclass(frozen=True)
class Contrast:
    """The same number of two runs. difference: second minus first, where the two may be compared.

    stderr of the difference: sqrt(stderr_1^2 + stderr_2^2), as of independent samples. On the same items errors go
    together, so it is rather too large.
    """

    name: str
    unit: str
    first: Figure | None
    second: Figure | None
    difference: Figure | None
    remark: str
    """Why the two must not be compared; "" where they may."""


@dataclass(frozen=True)
class RunComparison:
    """Two runs of a kind, number by number."""

    first: Run
    second: Run
    contrasts: tuple[Contrast, ...]
    notes: tuple[str, ...]


def kind_of(result: Result) -> Kind:
    """The word for what was measured."""
    if isinstance(result, Evaluation):
        return "evaluation"
    return "blame" if isinstance(result, Blame) else "speed"


def base_of(result: Result) -> Subject | None:
    """The model that it was measured against."""
    return None if isinstance(result, Speed) else result.base


def figures(result: Result) -> tuple[Figure, ...]:
    """Every number of a result, the most telling first."""
    if isinstance(result, Evaluation):
        found = _evaluation(result)
    elif isinstance(result, Blame):
        found = _blame(result)
    else:
        found = _speed(result)
    return tuple(sorted((f for f in found if not isnan(f.value)), key=lambda figure: figure.detail))


def _evaluation(result: Evaluation) -> Iterator[Figure]:
    base = {} if result.base is None else _base(result.base)
    text = {} if result.text is None else {"text": result.text.sha256, "tokens": str(result.text.tokens)}
    if result.text is not None:
        yield from _text(result.text, text, base)
    for task in result.tasks:
        yield from _task(task, base)
    tasks = {task.name: {"items": task.sha256, "metric": task.metric} for task in result.tasks}
    for found in result.comparisons:
        asked = text if found.task is None else tasks.get(found.task, {})
        unit = "share" if found.unit == "points" else found.unit
        conditions = {**asked, **base}
        name = f"{found.name}, difference"
        yield _figure(name, unit, found.difference, found.items, conditions, found.higher_is_better, detail=True)
        yield _plain(f"{name}, p", "", found.p, found.items, conditions)
        yield _plain(f"{name}, p adjusted", "", found.p_adjusted, found.items, conditions)
    for number, sample in enumerate(result.samples, start=1):
        conditions = {"prompt": sample.prompt}
        yield _plain(f"sample {number}, repetition", "share", sample.repetition, None, conditions)
        if sample.base_repetition is not None:
            yield _plain(f"sample {number}, base's repetition", "share", sample.base_repetition, None, conditions)


def _text(result: TextResult, text: Mapping[str, str], base: Mapping[str, str]) -> Iterator[Figure]:
    tokens = result.tokens
    yield _figure("loss", "nats", result.loss, tokens, text, False)
    yield _plain("perplexity", "", result.perplexity, tokens, text, False, detail=False)
    # Models with different tokens may be compared in bits per byte, where they predicted the same bytes.
    bits, nbytes = result.bits_per_byte, ""
    if 0 < bits.value < float("inf"):
        nbytes = str(round(tokens * result.loss.value / log(2) / bits.value))
    yield _figure("bits per byte", "bits", bits, tokens, {"text": result.sha256, "bytes": nbytes}, False)
    if result.divergence is not None:
        yield from _divergence(result.divergence, {**text, **base})
    for bins, what in ((result.by_position, "position"), (result.by_frequency, "frequency")):
        for each in bins:
            yield from _bin(each, what, text, base)


def _divergence(found: Divergence, asked: Mapping[str, str]) -> Iterator[Figure]:
    tokens = found.tokens
    conditions = {**asked, "compared tokens": str(tokens), "vocabulary": f"{found.vocabulary} {found.shared}"}
    yield _figure("loss added", "nats", found.loss_difference, tokens, conditions, False)
    yield _figure("KL", "nats", found.kl, tokens, conditions, False)
    yield _figure("top-1 agreement", "share", found.top1_agreement, tokens, conditions, True)
    yield _figure("top-5 agreement", "share", found.top5_agreement, tokens, conditions, True)
    yield _figure("base's loss", "nats", found.base_loss, tokens, conditions, None, detail=True)
    yield _figure("right tokens lost", "share", found.lost, tokens, conditions, False, detail=True)
    yield _figure("right tokens gained", "share", found.gained, tokens, conditions, True, detail=True)
    for quantile, value in found.kl_quantiles.items():
        yield _plain(f"KL, quantile {quantile}", "nats", value, tokens, conditions, False)
    for rank, value in found.rank.items():
        yield _plain(f"base's token at rank {rank}", "share", value, tokens, conditions)
    yield _plain("mean reciprocal rank", "", found.mean_reciprocal_rank, tokens, conditions, True)
    if found.outside is not None:
        yield _figure("outside the shared tokens", "share", found.outside, tokens, conditions, None, detail=True)


def _bin(found: Bin, what: str, text: Mapping[str, str], base: Mapping[str, str]) -> Iterator[Figure]:
    where = f"{what} {found.first} to {found.last}"
    yield _figure(f"loss, {where}", "nats", found.loss, found.tokens, text, False, detail=True)
    if found.base_loss is not None:
        yield _figure(
            f"base's loss, {where}", "nats", found.base_loss, found.tokens, {**text, **base}, None, detail=True
        )
    if found.kl is not None:
        yield _figure(f"KL, {where}", "nats", found.kl, found.tokens, {**text, **base}, False, detail=True)


def _task(task: TaskResult, base: Mapping[str, str]) -> Iterator[Figure]:
    asked = {"items": task.sha256, "metric": task.metric}
    against = {**asked, **base}
    better = task.higher_is_better
    yield _figure(task.name, task.metric, task.value, task.items, asked, better)
    if task.base is not None:
        yield _figure(f"{task.name}, base", task.metric, task.base, task.items, against, None, detail=True)
    for word, count in (("lost", task.lost), ("gained", task.gained)):
        if count is not None:
            yield _plain(f"{task.name}, {word}", "items", count, task.items, against, word == "gained")
    for part in task.parts:
        name = f"{task.name}/{part.name}"
        yield _figure(name, task.metric, part.value, part.items, asked, better, detail=True)
        if part.base is not None:
            yield _figure(f"{name}, base", task.metric, part.base, part.items, against, None, detail=True)
    for whose, found in (("", task.calibration), ("base's ", task.base_calibration)):
        if found is not None:
            asked_of, falls = (against, None) if whose else (asked, False)
            name = f"{task.name}, {whose}"
            yield _figure(f"{name}Brier score", "", found.brier, task.items, asked_of, falls, detail=True)
            yield _figure(f"{name}calibration error", "share", found.error, task.items, asked_of, falls, detail=True)
    for name, value in task.harness.items():
        yield _plain(f"{task.name}, harness {name}", "", value, task.items, asked)


def _blame(result: Blame) -> Iterator[Figure]:
    text = {"text": result.sha256, "tokens": str(result.tokens), **_base(result.base)}
    sites = {**text, "direction": result.direction}
    yield _figure("KL", "nats", result.kl, result.tokens, text, False)
    for number, site in enumerate(result.sites):
        name = f"{site.name} ({site.role})"
        yield _figure(f"cost of {name}", "nats", site.cost, result.tokens, sites, False, detail=number >= 10)
        if site.bits is not None:
            yield _plain(f"bits of {name}", "bits", site.bits, site.parameters, {}, False)
    for depth in result.depth:
        yield _plain(f"error behind {depth.name}", "share", depth.error, result.tokens, text, False)
        yield _plain(f"cosine behind {depth.name}", "", depth.cosine, result.tokens, text, True)


def _speed(result: Speed) -> Iterator[Figure]:
    machine = {
        "hardware": f"{result.setting.hardware}, {result.setting.device}",
        "threads": str(result.setting.threads),
    }
    for point in result.points:
        new = f", {point.tokens} new" if point.phase == "decode" else ""
        name = f"{point.phase}, {point.batch} x {point.length} tokens{new}"
        slowest, fastest = (
            point.tokens_per_second * point.seconds / max(s, 1e-12) for s in (point.slowest, point.fastest)
        )
        yield Figure(name, "tokens/s", point.tokens_per_second, None, slowest, fastest, point.repeats, machine, True)
    yield _plain("first token", "s", result.first_token, None, machine, False, detail=False)
    yield _plain("loading", "s", result.load, None, machine, False, detail=False)
    yield _plain("memory, loaded", "bytes", result.memory_loaded, None, machine, False, detail=False)
    yield _plain("memory, peak", "bytes", result.memory_peak, None, machine, False, detail=False)
    yield _plain("disk", "bytes", result.disk, None, {}, False, detail=False)


def _base(subject: Subject) -> dict[str, str]:
    return {"base": subject.fingerprint, "base's dtype": subject.dtype}


def _figure(
    name: str,
    unit: str,
    estimate: Estimate,
    items: int | None,
    conditions: Mapping[str, str],
    higher_is_better: bool | None,
    *,
    detail: bool = False,
) -> Figure:
    stderr, low, high = (None if isinf(each) else each for each in (estimate.stderr, estimate.low, estimate.high))
    return Figure(name, unit, estimate.value, stderr, low, high, items, dict(conditions), higher_is_better, detail)


def _plain(
    name: str,
    unit: str,
    value: float,
    items: int | None,
    conditions: Mapping[str, str],
    higher_is_better: bool | None = None,
    *,
    detail: bool = True,
) -> Figure:
    return Figure(name, unit, value, None, None, None, items, dict(conditions), higher_is_better, detail)
