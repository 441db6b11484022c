"""Bits for each weight from a mean: the more its outputs suffer, the more it gets (ShiftAddLLM, arXiv 2406.05981)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from tersely.calibrate import micro_batches
from tersely.encoding import Source
from tersely.errors import UsageError
from tersely.job import Job
from tersely.methods.encode.shiftaddllm import allocate, importance
from tersely.plan.cost import micro_batch_tokens
from tersely.plan.recipe import Step
from tersely.stream import SURVEY, stream

_GRAM = frozenset({"gram"})


def allocated(job: Job, say: Callable[[str, float], None]) -> Mapping[str, Step]:
    """The steps of a job; where one asks for mean bits, with bits of its own for each weight.

    Importances are measured on the model as it is given, in a pass of its own over the calibration text. The bits to
    choose from are the two whole numbers on either side of the mean, and one more below and above.
    """
    asking = {name: step for name, step in job.steps.items() if step.average_bits}
    if not asking or job.data is None:
        return job.steps
    importances = _importances(job, asking, say)
    sizes = {name: job.graph.weight(name).rows * job.graph.weight(name).columns for name in asking}
    steps = dict(job.steps)
    for step in dict.fromkeys(asking.values()):
        own = {name: importances[name] for name in asking if asking[name] == step}
        bits = allocate(own, {name: sizes[name] for name in own}, step.average_bits, choices(step))
        steps |= {name: step.with_bits(bits[name]) for name in own}
    return steps


def choices(step: Step) -> list[int]:
    """The bits that a step with a mean chooses from: those near it that its method has."""
    found = []
    for bits in range(math.floor(step.average_bits) - 1, math.ceil(step.average_bits) + 2):
        try:
            step.with_bits(bits)
        except UsageError:
            continue
        found.append(bits)
    return found


def _importances(job: Job, steps: Mapping[str, Step], say: Callable[[str, float], None]) -> dict[str, float]:
    assert job.data is not None
    source = Source(job.checkpoint)
    plain = not job.graph.has_experts
    batches = micro_batches(
        job.data,
        tokens=micro_batch_tokens(job.graph, job.dtype),
        pad=plain and job.graph.family.auto_class == "CausalLM",
    )
    wanted = {
        unit: dict.fromkeys((w.stage for w in job.graph.unit(unit) if w.name in steps), _GRAM)
        for unit in job.graph.units
        if any(w.name in steps for w in job.graph.unit(unit))
    }
    found: dict[str, float] = {}
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
            say(f"{stop.unit} importance", 0.0)
            for weight in job.graph.unit(stop.unit):
                if weight.name in steps:
                    stats = stop.statistics.get(weight.statistics)
                    gram_II = None if stats is None else stats.gram_II
                    value_OI = source.value(weight, None, job.device)
                    found[weight.name] = 0.0 if gram_II is None else importance(value_OI.float(), gram_II)
    missing = next((name for name in steps if name not in found), None)
    if missing is not None:
        raise UsageError(f"average_bits: {missing} lies outside the blocks; give it a step with bits of its own")
    return found
