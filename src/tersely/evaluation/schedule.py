"""In which order sites are measured, on how much text, and for how long: what a budget of time allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from time import monotonic

from tersely.calibrate import Sequences
from tersely.evaluation.passes import Batch, Work, in_batches
from tersely.evaluation.swapping import Differences, Swap
from tersely.results import Estimate

Progress = Callable[[str, float], None]
"""Called with what is being done and the share that is done, 0 to 1."""
_ENOUGH = 16
"""Documents that blocks are measured on, if the time allows, before the time goes into weights."""
_PILOT_TOKENS = 2048
_ROUNDS = 6
# Of the budget: what is planned, when nothing new is begun, and when what is begun is given up.
_PLANNED, _FULL, _OVER = 0.9, 0.97, 1.05


@dataclass(frozen=True)
class Pace:
    """Seconds a token takes: a record, what follows the blocks with the KL, and one block."""

    record: float
    head: float
    block: float


@dataclass(frozen=True, eq=False)
class Plan:
    """Micro-batches in the order in which they are measured; a round is a sample without regard to length."""

    rounds: tuple[tuple[Batch, ...], ...]
    pace: Pace | None


@dataclass(eq=False)
class Clock:
    """Time that has passed of the budget, and what is reported of the work."""

    start: float
    budget: float | None
    progress: Progress | None
    total: float = 1.0
    spent: float = 0.0
    share: float = 0.0

    @property
    def elapsed(self) -> float:
        return monotonic() - self.start

    def left(self, share: float = 1.0) -> float:
        """Seconds until this share of the budget is used; without one, inf."""
        return math.inf if self.budget is None else share * self.budget - self.elapsed

    def say(self, what: str, amount: float = 0.0) -> None:
        """Report that work is being done, after so much more of it."""
        self.spent += amount
        share = self.spent / self.total if self.budget is None else self.elapsed / self.budget
        self.share = max(self.share, min(0.99, share))
        if self.progress is not None:
            self.progress(what, 1.0 if what == "finished" else self.share)


def start_clock(budget: float | None, progress: Progress | None) -> Clock:
    """A clock that starts now. budget: seconds for everything."""
    return Clock(monotonic(), budget, progress)


def plan_rounds(
    work: Work,
    found: Differences,
    data: Sequences,
    order: Sequence[int],
    short: Batch,
    tokens_per_batch: int,
    clock: Clock,
) -> Plan:
    """How many sequences, in which rounds: all without a budget, else what a pilot says."""
    if clock.budget is None:
        return Plan((in_batches(data, order, tokens_per_batch),), None)
    pace = _pilot(work, data, order, short, tokens_per_batch, clock)
    if "count" not in work.done:
        sites = pace.record + _seconds(work, pace, found.sites)
        room = max(0.0, clock.left(_PLANNED))
        everything = room / (sites + _seconds(work, pace, found.weights))
        count = tokens = 0
        while count < len(order):
            tokens += len(data.ids[order[count]])
            if count and tokens > (max(everything, room / sites) if count < _ENOUGH else everything):
                break
            count += 1
        work.done["count"] = str(count).encode()
    chosen = order[: int(work.done["count"])]
    wanted = sum(len(data.ids[i]) for i in chosen) / _ROUNDS
    rounds: list[list[int]] = []
    tokens = 0
    for i in chosen:
        if not rounds or tokens >= wanted:
            rounds.append([])
            tokens = 0
        rounds[-1].append(i)
        tokens += len(data.ids[i])
    return Plan(tuple(in_batches(data, each, tokens_per_batch) for each in rounds), pace)


def _pilot(
    work: Work, data: Sequences, order: Sequence[int], short: Batch, tokens_per_batch: int, clock: Clock
) -> Pace:
    """Time a few sequences, within a tenth of the time that is left."""
    pace = _timed(work, short)
    each = pace.record + 2 * pace.head + pace.block * len(work.networks.blocks)
    room = min(_PILOT_TOKENS, tokens_per_batch, 0.1 * clock.left() / each)
    count = 0
    while count < len(order) and (room := room - len(data.ids[order[count]])) >= 0:
        count += 1
    return _timed(work, in_batches(data, order[:count], tokens_per_batch)[0]) if count else pace


def _timed(work: Work, batch: Batch) -> Pace:
    count = len(work.networks.blocks)
    fresh = Work(work.networks, {}, replays=work.replays)
    times = [monotonic()]
    fresh.record(batch)
    times.append(monotonic())
    for first in (count, count // 2):
        fresh.divergences((), batch, first)
        times.append(monotonic())
    record, head, half = (max(after - before, 1e-9) / batch.tokens for before, after in pairwise(times))
    return Pace(record, head, max(0.0, half - head) / max(1, count - count // 2))


def _seconds(work: Work, pace: Pace, swaps: Iterable[Swap]) -> float:
    """What a token of these sites takes, without its record."""
    count = len(work.networks.blocks)
    return sum(pace.head + pace.block * (count - swap.first * work.replays) for swap in swaps)


def _amount(work: Work, swaps: Iterable[Swap]) -> float:
    """The same in passes of a token through a block, for reports of progress."""
    return _seconds(work, Pace(0.0, 1.0, 1.0), swaps)


def measure_sites(
    work: Work, found: Differences, plan: Plan, clock: Clock, weights: int | None
) -> tuple[tuple[Batch, ...], Pace | None]:
    """Measure the sites on the planned micro-batches, or on as many as the time allows; then how long a token took.

    Where not even the first micro-batch can be finished, some sites lack it.
    """
    taken: list[Batch] = []
    per_record = 2 * len(work.networks.blocks) + 2
    per_token = per_record + _amount(work, (*found.sites, *found.weights[:weights]))
    clock.total = sum(batch.tokens for batches in plan.rounds for batch in batches) * per_token
    resumed = bool(found.sites) and work.has(found.sites[0], plan.rounds[0][:1])
    begin = monotonic()
    for batches in plan.rounds:
        tokens = sum(batch.tokens for batch in batches)
        if taken and clock.left(_FULL) * sum(batch.tokens for batch in taken) < (monotonic() - begin) * tokens:
            break
        for batch in batches:
            work.whole(batch)
            clock.say("both models", batch.tokens * per_record)
            for swap in found.sites:
                if clock.left(_OVER) < 0 and not work.has(swap, [batch]):
                    return tuple(taken or [batch]), plan.pace
                work.measure(swap, batch)
                clock.say(swap.name, batch.tokens * _amount(work, [swap]))
            taken.append(batch)
    pace = plan.pace
    if pace is not None and not resumed:
        tokens = sum(batch.tokens for batch in taken)
        planned = tokens * (pace.record + _seconds(work, pace, found.sites))
        off = (monotonic() - begin) / planned
        pace = Pace(pace.record * off, pace.head * off, pace.block * off)
    return tuple(taken), pace


def dearest(weights: Sequence[Swap], sites: Sequence[Swap], costs: Mapping[str, Estimate]) -> list[Swap]:
    """Weights of the block that costs most first; in a block, the one that was changed most."""
    blocks = {site.block: costs[site.name].value for site in sites if site.level == "block" and site.name in costs}
    return sorted(weights, key=lambda swap: (-blocks.get(swap.block, -math.inf), swap.first, -swap.change))


def measure_weights(
    work: Work, swaps: Sequence[Swap], batches: Sequence[Batch], pace: Pace | None, clock: Clock
) -> None:
    """Measure weights on all micro-batches, block by block, as far as the time goes."""
    tokens = sum(batch.tokens for batch in batches)
    clock.total = clock.spent + tokens * _amount(work, swaps)
    groups = [list(swaps)] if pace is None else [list(group) for _, group in groupby(swaps, key=lambda s: s.block)]
    for group in groups:
        again = sum(batch.tokens for batch in batches if batch.key("") not in work.kept)
        cut = False
        if pace is not None:
            room = clock.left(_FULL) - pace.record * again
            fit = 0
            while fit < len(group) and (room := room - tokens * _seconds(work, pace, [group[fit]])) >= 0:
                fit += 1
            cut, group = fit < len(group), group[:fit]
        # A record that has to be made again serves all sites of the group.
        pairs = (
            [(swap, batch) for batch in batches for swap in group]
            if again
            else [(swap, batch) for swap in group for batch in batches]
        )
        for swap, batch in pairs:
            if clock.left(_OVER) < 0:
                return
            work.measure(swap, batch)
            clock.say(swap.name, batch.tokens * _amount(work, [swap]))
        if cut:
            return
