"""Bits for each weight from a mean: those that the loss of the model depends on most get more.

ShiftAddLLM (arXiv 2406.05981) takes the importance of a weight from its Gram matrix and lets losses fall as 4^-bits.
Here each weight is encoded in every width that it may get, and what that costs is

    sum over elements of F (w - w_hat)^2,    F = mean over sequences of (d loss / d w)^2

which was far better on a real model (docs/LOG.md has the numbers).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping

from tersely.encoding import Source, applied
from tersely.errors import UsageError
from tersely.fisher import fishers
from tersely.job import Job
from tersely.measure import Statistics
from tersely.plan.cost import calibration_batches
from tersely.plan.recipe import Step
from tersely.stream import SURVEY, stream

Losses = Mapping[str, Mapping[int, float]]
"""Weight -> bits -> what it costs."""


def allocated(job: Job, say: Callable[[str, float], None]) -> Mapping[str, Step]:
    """The steps of a job; where one asks for mean bits, with bits of its own for each weight.

    Losses are measured on the model as it is given, in passes of their own over the calibration text.
    """
    asking = {name: step for name, step in job.steps.items() if step.average_bits}
    if not asking or job.data is None:
        return job.steps
    losses = _losses(job, asking, say)
    sizes = {name: job.graph.weight(name).rows * job.graph.weight(name).columns for name in asking}
    steps = dict(job.steps)
    for step in dict.fromkeys(asking.values()):
        own = {name: losses[name] for name in asking if asking[name] == step}
        bits = allocate(own, {name: sizes[name] for name in own}, step.average_bits)
        steps |= {name: step.with_bits(bits[name]) for name in own}
    return steps


def allocate(losses: Losses, sizes: Mapping[str, int], average: float) -> dict[str, int]:
    """Bits for each weight, so that the sum of losses is small and the mean over all elements not above `average`.

    Every weight starts at the fewest bits that it may get; steps up are taken by what they gain for a bit, as long as
    they fit. A width that gains less than a later one is passed over (the lower convex hull of its losses), which makes
    this the optimum wherever the mean is met exactly. UsageError: an average below the fewest bits of all.
    """
    hulls = {name: _hull(own) for name, own in losses.items()}
    bits = {name: hull[0] for name, hull in hulls.items()}
    left = average * sum(sizes.values()) - sum(bits[name] * sizes[name] for name in bits)
    if left < 0:
        raise UsageError(f"average_bits={average:g} is less than the fewest bits that all weights can have")

    def step(name: str, place: int) -> tuple[float, str, int]:
        low, high = hulls[name][place : place + 2]
        gain = losses[name][low] - losses[name][high]
        return -gain / ((high - low) * sizes[name]), name, place

    steps = [step(name, 0) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, name, place = heapq.heappop(steps)
        low, high = hulls[name][place : place + 2]
        if (high - low) * sizes[name] <= left:
            left -= (high - low) * sizes[name]
            bits[name] = high
            if place + 2 < len(hulls[name]):
                heapq.heappush(steps, step(name, place + 1))
    return bits


def _hull(losses: Mapping[int, float]) -> list[int]:
    """The widths at which each further bit gains less than the one before."""
    hull: list[int] = []
    for bits in sorted(losses):
        hull.append(bits)
        while len(hull) > 2 and _gain(losses, hull[-3], hull[-2]) <= _gain(losses, hull[-2], hull[-1]):
            del hull[-2]
    while len(hull) > 1 and losses[hull[-1]] >= losses[hull[-2]]:
        hull.pop()
    return hull


def _gain(losses: Mapping[int, float], low: int, high: int) -> float:
    return (losses[low] - losses[high]) / (high - low)


def choices(step: Step) -> list[int]:
    """The bits that a step with a mean chooses from: the whole numbers on either side, and the next one above; both
    neighbours of a mean that is a whole number. As far as its method has them."""
    found = []
    low, high = math.floor(step.average_bits), math.ceil(step.average_bits)
    for bits in range(low - (low == high), high + 2):
        try:
            step.with_bits(bits)
        except UsageError:
            continue
        found.append(bits)
    return found


def _losses(job: Job, steps: Mapping[str, Step], say: Callable[[str, float], None]) -> dict[str, dict[int, float]]:
    assert job.data is not None
    source = Source(job.checkpoint)
    batches = calibration_batches(job.data, job.graph, job.dtype)
    needs = frozenset({"gram"}).union(*(step.needs for step in steps.values())) - {"fisher"}
    wanted = {
        unit: dict.fromkeys((w.stage for w in job.graph.unit(unit) if w.name in steps), needs)
        for unit in job.graph.units
        if any(w.name in steps for w in job.graph.unit(unit))
    }
    say("gradients of the loss", 0.0)
    steepness = fishers(job.checkpoint, job.graph, job.data.ids, list(steps), job.device)
    found: dict[str, dict[int, float]] = {}
    for stop in stream(
        job.checkpoint,
        job.graph,
        batches,
        measured={},
        surveyed=wanted,
        replaced=lambda _: {},
        dtype=job.dtype,
        device=job.device,
        suspend=False,
    ):
        if stop.stage == SURVEY:
            say(f"{stop.unit} in every width", len(found) / len(steps))
            for weight in job.graph.unit(stop.unit):
                if weight.name in steps:
                    stats = stop.statistics.get(weight.statistics) or Statistics(weight.columns, job.device)
                    step = steps[weight.name]
                    value_OI = source.value(weight, None, job.device)
                    found[weight.name] = {}
                    for bits in choices(step):
                        decoded_OI = applied(step.with_bits(bits), value_OI, stats).decode()
                        delta_OI = (value_OI.float() - decoded_OI.float()).square_()
                        found[weight.name][bits] = float((steepness[weight.name] * delta_OI).sum())
    missing = next((name for name in steps if name not in found), None)
    if missing is not None:
        raise UsageError(f"average_bits: {missing} lies outside the blocks; give it a step with bits of its own")
    return found
