"""Encoding block by block while the calibration text runs through the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tersely.bases import Diagonal
from tersely.codecs import Encoded
from tersely.codecs.entrance import Entrance
from tersely.codecs.low_rank import factors_of
from tersely.encoding import Result, Source, encode
from tersely.encoding import result as encoded_result
from tersely.graph import Graph, Weight
from tersely.hadamard import hadamard
from tersely.job import Job
from tersely.measure import Statistics
from tersely.methods import TuneBlock
from tersely.methods.tune import tune_block
from tersely.plan.assignment import spaces
from tersely.plan.cost import calibration_batches, waits_inside
from tersely.plan.recipe import Change
from tersely.rebase import rebase
from tersely.rotation import places, tie
from tersely.stream import SURVEY, Measured, Recorded, Value, stream

Finished = Callable[[str], Mapping[str, Value] | None]
"""What a finished block runs with, by its unit; None where it is still to do."""


def calibrated(
    job: Job,
    units: Iterable[str],
    finished: Finished,
    fishers: Mapping[str, Tensor],
    say: Callable[[str, float], None],
) -> Iterator[tuple[str, Mapping[str, Result], Source]]:
    """Run the calibration text through the model, once; yields each unit that something is measured for when it is
    encoded: the results of its weights, and the tensors that its others have by then."""
    assert job.data is not None
    graph, source = job.graph, Source(job.checkpoint)
    rounds = [t.method for t in job.recipe.tunings if isinstance(t.method, TuneBlock)]
    # A step of learned rounding takes whole micro-batches: they hold as many sequences as its batch has.
    longest = max(len(ids_L) for ids_L in job.data.ids)
    most = min((method.batch * longest for method in rounds), default=None)
    batches = calibration_batches(job.data, graph, job.dtype, most)
    suspend = waits_inside(graph, batches, job.dtype)
    changes = [change for change in job.recipe.changes if change.needs]
    undone = [unit for unit in units if finished(unit) is None]
    measured = {unit: stages for unit in undone if (stages := _stages(job, unit))}
    tuned = {t: {w.name for w in graph.select(t.where)} for t in job.recipe.tunings if not t.whole}
    recorded = {w.unit for names in tuned.values() for w in map(graph.weight, names) if w.unit in undone}
    surveyed = {unit: stages for unit in undone if (stages := _surveyed(graph, changes, unit))}
    if not measured and not surveyed and not recorded:
        return
    tables = {weight.name: (part, own) for weight, part, own in encoded_tables(job, source)}
    results: dict[str, Result] = {}
    parts: dict[str, Encoded] = {}
    known: dict[str, Statistics] = {}

    def encoded(unit: str, stage: str | None, statistics: Mapping[str, Statistics]) -> Iterator[tuple[Weight, Value]]:
        """Encode what a stage has measured, or (stage None) what needs no data."""
        weights = [
            w
            for w in graph.unit(unit)
            if w.name in job.steps and (w.stage == stage if job.steps[w.name].needs else stage is None)
        ]
        for weight, part, result in encode(source, weights, job.steps, statistics, job.format, job.device, fishers):
            results[weight.name] = result
            if unit in recorded:
                parts[weight.name] = part
                known.update(statistics)
            yield weight, running(part, result.entrance)

    def tune(block: Recorded) -> Iterator[tuple[Weight, Value]]:
        """Tune what is encoded of a block towards what the block gives in the source."""
        for tuning, names in tuned.items():
            method = tuning.method
            assert isinstance(method, TuneBlock)
            own = {name: part for name, part in parts.items() if name in names}
            values = {name: source.value(graph.weight(name), job.steps[name], job.device).float() for name in own}
            rows = sum(len(each.index) for each in batches) / len(batches)
            batch, held_out = max(1, round(method.batch / rows)), math.ceil(method.held_out / rows)
            settings = replace(method, batch=batch, held_out=held_out)
            found = tune_block(block.forward, block.inputs, block.targets, values, own, settings, seed=job.recipe.seed)
            for name, part in found.best.items():
                weight, before = graph.weight(name), results[name]
                stats = known.get(weight.statistics) or Statistics(weight.columns, job.device)
                again = encoded_result(weight, job.steps[name], values[name], part, stats, job.format)
                gained = f"{method.name}: the block's error {found.before:.3g}, then {found.after:.3g}"
                note = "; ".join(filter(None, [before.row.note, gained]))
                results[name] = replace(again, row=replace(again.row, note=note))
                parts[name] = part
                yield weight, running(part, again.entrance)

    def replaced(unit: str) -> Mapping[str, Value]:
        """A finished block runs with what was written; of a new one, the weights that need no data come first."""
        results.clear()
        parts.clear()
        known.clear()
        source.changed.clear()
        if (before := finished(unit)) is not None:
            return before
        turned = [w for w in graph.unit(unit) if w.name in job.steps and job.steps[w.name].hadamard]
        values = {w.name: Value(source.value(w, job.steps[w.name], job.device)) for w in turned}
        if unit not in surveyed:
            values |= {weight.name: value for weight, value in encoded(unit, None, {})}
        return values

    def transformed(weight: Weight, x: Tensor) -> Tensor:
        step = job.steps.get(weight.name)
        return hadamard(x, step.hadamard) if step is not None and step.hadamard else x

    steps = sum(map(len, measured.values())) + len(surveyed) + len(recorded)
    done = 0
    for stop in stream(
        job.checkpoint,
        graph,
        batches,
        measured=measured,
        surveyed=surveyed,
        transformed=transformed,
        replaced=replaced,
        tables={name: running(part, own.entrance) for name, (part, own) in tables.items()},
        recorded=recorded,
        dtype=job.dtype,
        device=job.device,
        suspend=suspend,
    ):
        if stop.stage is not None:
            say(f"{stop.unit or 'head'} {stop.stage}", done / steps)
            done += 1
            if stop.stage == SURVEY:
                for name in _changed(job, source, changes, stop.unit, stop.statistics):
                    weight = graph.weight(name)
                    linear = weight.kind == "linear"
                    value = source.value(weight, job.steps.get(name), job.device) if linear else source[name]
                    stop.replace(weight, Value(value))
                for weight, ran in encoded(stop.unit, None, {}):
                    stop.replace(weight, ran)
            elif stop.recorded is not None:
                for weight, ran in tune(stop.recorded):
                    stop.replace(weight, ran)
            else:
                for weight, ran in encoded(stop.unit, stop.stage, stop.statistics):
                    stop.replace(weight, ran)
        if (stop.stage is None or not stop.unit) and (stop.unit in {*measured, *surveyed, *recorded}):
            outside = {} if stop.unit else {name: own for name, (_, own) in tables.items()}
            yield stop.unit, results | outside, source


def encoded_tables(job: Job, source: Source) -> Iterator[tuple[Weight, Encoded, Result]]:
    """Encode the embeddings that a step selects, by how often the calibration text reads each of their rows."""
    weights = [w for w in job.graph.unit("") if w.kind == "lookup" and w.name in job.steps]
    known: dict[str, Statistics] = {}
    if weights and job.data is not None:
        ids_T = torch.cat([torch.as_tensor(ids_L).flatten() for ids_L in job.data.ids])
        for weight in weights:
            reads_O = torch.bincount(ids_T, minlength=weight.rows).float().to(job.device)
            known[weight.statistics] = Statistics(weight.columns, job.device, tokens=len(ids_T), reads_O=reads_O)
    return encode(source, weights, job.steps, known, job.format, job.device, {})


def running(encoded: Encoded, entrance: Entrance) -> Value:
    """An encoded weight as it runs."""
    factors = factors_of(encoded.parts)
    if not entrance.activations:
        return Value(encoded.decode(), factors=factors)
    return Value(encoded.decode(), entrance.rounded, encoded.full(), factors)


def _stages(job: Job, unit: str) -> Measured:
    """Stage -> what its weights need, in the order in which they run."""
    needs: dict[str, frozenset[str]] = {}
    for weight in job.graph.unit(unit):
        if weight.name in job.steps and (own := job.steps[weight.name].needs - {"fisher"}):
            needs[weight.stage] = needs.get(weight.stage, frozenset()) | own
    return {stage: needs[stage] for stage in job.graph.stages(unit) if stage in needs}


def _surveyed(graph: Graph, changes: Iterable[Change], unit: str) -> Measured:
    """Stage -> what the changes of basis need of the spaces of a block."""
    needs: dict[str, frozenset[str]] = {}
    for change in changes:
        for space in spaces(change, graph):
            for weight in graph.unit(unit):
                if weight.kind == "linear" and space in weight.reads.spaces:
                    needs[weight.stage] = needs.get(weight.stage, frozenset()) | change.needs
    return needs


def _changed(
    job: Job, source: Source, changes: Iterable[Change], unit: str, statistics: Mapping[str, Statistics]
) -> list[str]:
    """Change the bases of a block in `source`; the names of the tensors that are others now."""
    graph, names = job.graph, dict[str, None]()
    known = dict(statistics)
    for change in changes:
        for space in spaces(change, graph):
            for place, expert in places(graph, space, change):
                if place != unit:
                    continue
                readers = [
                    w
                    for w in graph.unit(unit)
                    if w.kind == "linear" and space in w.reads.spaces and expert in (None, w.expert)
                ]
                # What experts share, their router sees all of.
                shared = [w for w in readers if w.expert is None] or readers
                stats = known.get(shared[0].statistics)
                if stats is None:
                    continue
                basis = change.method([source.value(w, None, job.device) for w in readers], stats, job.recipe.seed)
                assert isinstance(basis, Diagonal)
                tied = tie(graph, space, basis)
                changed = rebase(graph, source, space, Diagonal(tied.scale_N.cpu()), unit=unit, expert=expert)
                source.changed |= changed
                names |= dict.fromkeys(changed)
                for name in {w.statistics for w in readers} & known.keys():
                    known[name] = known[name].rescaled(_spread(graph, tied.scale_N, known[name].columns))
    return list(names)


def _spread(graph: Graph, scale_N: Tensor, columns: int) -> Tensor:
    """The scale of each input, where heads share one."""
    if len(scale_N) == columns:
        return scale_N
    heads = graph.sizes["kv_heads"]
    return scale_N.view(heads, -1).repeat_interleave(columns // len(scale_N), 0).reshape(columns)
