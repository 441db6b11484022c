"""Width cut out of a model: fewer neurons, heads, hidden coordinates or experts, the same number in every block.

What is written is an ordinary checkpoint of the same family with a smaller config. Structures are scored on the model
as it lies in the checkpoint; then, with `refit`, the calibration text runs through the model once more, and what reads
a cut space makes up for it, block after block on the activations that earlier cuts leave.

A norm over fewer coordinates of the residual stream sees another size. With S the mean over tokens of the share of the
energy that the K kept of D coordinates have, its gain is multiplied by sqrt(S D / K), so that what it gives stays as
large as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tersely.bases import selected, stored_axes
from tersely.checkpoint import Checkpoint, TensorSpec
from tersely.encoding import Source
from tersely.graph import Graph, Weight
from tersely.measure import Statistics
from tersely.plan.cost import waits_inside
from tersely.plan.recipe import Cut
from tersely.rewriting import units_of
from tersely.shape.refit import refitted
from tersely.shape.scoring import Scored, normalized_energy, score
from tersely.shape.setup import Setup, Written
from tersely.shape.sizes import Sizes, places_of_step, planned_sizes
from tersely.shape.structures import Place
from tersely.stream import Value, stream
from tersely.writer import Writer

CHOICE = "choice"
"""The unit in which a writer keeps what was chosen."""


def planned(headers: Checkpoint, graph: Graph, step: Cut) -> Checkpoint:
    """The headers of what `cut` will write. UsageError: what cannot be cut so, and why."""
    places, sizes = places_of_step(graph, step), planned_sizes(graph, headers.config, step)
    first = {place: torch.arange(sizes.count(place)) for place in places}
    specs: dict[str, TensorSpec] = {}
    for name in headers:
        spec = headers.spec(name)
        if name in graph.extra:
            specs[name] = spec
            continue
        weight = graph.weight(name)
        renamed = _renamed(weight, first)
        if renamed is not None:
            counts = {
                s: len(k) * own for place, k in first.items() if place.holds(weight) for s, own in place.spaces.items()
            }
            shape = tuple(
                sum(counts.get(s, graph.size(s) or old) for s in axis.spaces) if set(axis.spaces) & set(counts) else old
                for old, axis in zip(spec.shape, stored_axes(weight), strict=True)
            )
            specs[renamed] = replace(spec, name=renamed, shape=shape, nbytes=math.prod(shape) * spec.dtype.itemsize)
    return headers.with_headers(sizes.config, specs)


def cut(
    checkpoint: Checkpoint,
    graph: Graph,
    step: Cut,
    writer: Writer,
    setup: Setup,
    scores: Sequence[Tensor] | None = None,
) -> Written:
    """Write the units of the smaller model. scores: of all places, where they are known already.

    A writer that has a part of them is continued: what was chosen stays, and the text runs once more.
    """
    sizes, places = planned_sizes(graph, checkpoint.config, step), places_of_step(graph, step)
    if not writer.done(CHOICE):
        scored = score(checkpoint, graph, places, step.method, setup, scores)
        writer.put(CHOICE, {}, _choice(checkpoint, graph, places, scored, sizes))
    facts = writer.facts(CHOICE)
    kept = {place: torch.tensor(own) for place, own in zip(places, facts["kept"], strict=True)}
    heads = sizes.kept.get("heads", graph.sizes.get("heads", 1))
    work = _Work(Source(checkpoint), graph, kept, facts["gains"], heads)
    files = units_of(graph)
    if step.refit and setup.data and not all(map(writer.done, files)):
        for unit in work.refit(setup):
            work.write(writer, {file: own for file, own in files.items() if own[0].unit == unit})
    work.write(writer, files)
    notes = [note for file in files for note in writer.facts(file)["notes"]]
    names = {place: f"{place.unit} {place.read}".strip() for place in places}
    found: dict[str, list[float]] = {}
    for place, own in zip(places, facts["scores"], strict=True):
        at = names[place] + ("" if place.expert is None else f" of expert {place.expert}")
        found[f"{place.kind}: {at}"] = own
    return Written(list(files), sizes.config, found, [*_told(sizes, places), *notes])


def _told(sizes: Sizes, places: Sequence[Place]) -> list[str]:
    """Sizes before and after."""
    counts = {(place.kind, place.read): (place.count, sizes.count(place)) for place in places}
    names = {
        "neurons": "neurons ({})",
        "heads": "key/value heads ({})",
        "hidden": "hidden coordinates",
        "experts": "experts",
    }
    return [f"{names[kind].format(read)}: {kept} of {count} kept" for (kind, read), (count, kept) in counts.items()]


class _Work:
    """A cut on its way: what is kept where, and what has been refitted of the unit at hand."""

    def __init__(
        self,
        source: Source,
        graph: Graph,
        kept: Mapping[Place, Tensor],
        gains: Mapping[str, float],
        heads: int,
    ) -> None:
        self.source, self.graph, self.kept, self.gains, self.heads = source, graph, kept, gains, heads
        self.refitted: dict[str, Tensor] = {}
        """Stored name -> the weight with its kept inputs only."""
        self.notes: list[str] = []

    def write(self, writer: Writer, files: Mapping[str, Sequence[Weight]]) -> None:
        """Put what is not written yet, refitted weights first: they are held until then."""
        undone = [(file, weights) for file, weights in files.items() if not writer.done(file)]
        for file, weights in sorted(undone, key=lambda each: all(w.name not in self.refitted for w in each[1])):
            tensors = {}
            for weight in weights:
                if (name := _renamed(weight, self.kept)) is not None:
                    tensors[name] = self._cut(weight)
            writer.put(file, tensors, {"notes": list(self.notes)})
            self.notes.clear()
            for weight in weights:
                self.refitted.pop(weight.name, None)
                self.source.changed.pop(weight.name, None)

    def refit(self, setup: Setup) -> Iterator[str]:
        """Run the text through the model and refit what reads a cut space; yields each unit when it has been."""
        asked = {
            unit: {stage: needs for stage in self.graph.stages(unit) if (needs := self._needs(unit, stage))}
            for unit in ("", *self.graph.units)
        }
        measured = {unit: stages for unit, stages in asked.items() if stages}
        steps, done = sum(map(len, measured.values())), 0
        batches = setup.batches(self.graph)
        for stop in stream(
            self.source.checkpoint,
            self.graph,
            batches,
            measured=measured,
            replaced=lambda _: {},
            dtype=setup.dtype,
            device=setup.device,
            suspend=waits_inside(self.graph, batches, setup.dtype),
        ):
            if stop.stage is None:
                yield stop.unit
                continue
            setup.say(f"{stop.unit or 'head'} {stop.stage}, least squares", done / steps)
            done += 1
            for weight, value in self._refitted(stop.unit, stop.stage, stop.statistics):
                stop.replace(weight, Value(value))
            if not stop.unit:
                yield ""

    def _cut(self, weight: Weight) -> Tensor:
        compact = self.refitted.get(weight.name)
        tensor = self.source[weight.name] if compact is None else compact
        index = {
            space: own
            for place, kept in self.kept.items()
            if place.holds(weight)
            for space, own in place.index(kept).items()
        }
        if index:
            tensor = selected(self.graph, weight, tensor, index, self.heads, read=compact is None)
        if weight.name in self.gains:
            offset = self.graph.family.norm_offset if weight.kind == "norm" else 0.0
            tensor = ((tensor.float() + offset) * self.gains[weight.name] - offset).to(tensor.dtype)
        return tensor

    def _readers(self, unit: str, stage: str) -> list[tuple[Weight, Tensor]]:
        """Weights of a stage that read a cut space, and the inputs that they keep."""
        found = []
        for weight in self.graph.unit(unit):
            if weight.kind == "linear" and weight.stage == stage:
                space = weight.reads.spaces[0]
                for place, kept in self.kept.items():
                    if place.kind != "experts" and space in place.spaces and place.holds(weight):
                        found.append((weight, place.index(kept)[space].index_K))
        return found

    def _needs(self, unit: str, stage: str) -> frozenset[str]:
        readers = self._readers(unit, stage)
        if not readers:
            return frozenset()
        return frozenset({"gram", "mean"} if any(self._bias(w) for w, _ in readers) else {"gram"})

    def _bias(self, weight: Weight) -> Weight | None:
        return next((w for w in self.graph.unit(weight.unit) if w.kind == "bias" and w.path == weight.path), None)

    def _wide(self, weight: Weight) -> bool:
        """Whether a weight reads the residual stream."""
        coordinates = self.graph.coordinates
        return weight.kind == "linear" and coordinates[weight.reads.spaces[0]] == coordinates["residual"]

    def _refitted(self, unit: str, stage: str, statistics: Mapping[str, Statistics]) -> Iterator[tuple[Weight, Tensor]]:
        """Refit the weights of a stage; what runs in their place, at full width.

        The residual stream runs as it is: what reads it is cut only when it is written."""
        for weight, kept_K in self._readers(unit, stage):
            stored, bias = self.source[weight.name], self._bias(weight)
            offset = self.source[bias.name] if bias is not None else None
            value_OI = stored.t() if weight.transposed else stored
            found = refitted(value_OI, offset, statistics.get(weight.statistics), kept_K)
            if found.note:
                self.notes.append(f"{weight.name.removesuffix('.weight')}: {found.note}")
            new_OK, runs = found.weight_OK, not self._wide(weight)
            self.refitted[weight.name] = (new_OK.t() if weight.transposed else new_OK).contiguous()
            if runs:
                yield weight, torch.zeros_like(value_OI).index_copy_(1, kept_K.to(value_OI.device), new_OK)
            if bias is not None and found.bias_O is not None and offset is not None:
                self.source.changed[bias.name] = found.bias_O.cpu().to(offset.dtype)
                if runs:
                    yield bias, self.source.changed[bias.name]


def _renamed(weight: Weight, kept: Mapping[Place, Tensor]) -> str | None:
    """The stored name after a cut: experts that stay are counted anew; None for one that goes."""
    for place, own in kept.items():
        if place.kind == "experts" and place.unit == weight.unit and weight.expert is not None:
            if weight.expert not in own:
                return None
            new = int((own == weight.expert).nonzero())
            path = weight.parameter.replace(f".{weight.expert}.", f".{new}.", 1)
            return weight.name.removesuffix(weight.parameter) + path
    return weight.name


def _choice(
    checkpoint: Checkpoint, graph: Graph, places: Sequence[Place], scored: Scored, sizes: Sizes
) -> dict[str, Any]:
    """What each place keeps, ascending, and what gains of norms are multiplied by."""
    kept = []
    for place, scores in zip(places, scored.scores, strict=True):
        order = torch.argsort(scores, descending=True, stable=True)
        kept.append(sorted(order[: sizes.count(place)].tolist()))
    gains: dict[str, float] = {}
    for place, own in zip(places, kept, strict=True):
        if place.kind == "hidden":
            if scored.moments:
                gains = _gains(checkpoint, graph, scored.moments, torch.tensor(own), place.count)
            for name, factor in _constants(graph, place.count / len(own)).items():
                gains[name] = gains.get(name, 1.0) * factor
    return {"kept": kept, "gains": gains, "scores": [scores.tolist() for scores in scored.scores]}


def _constants(graph: Graph, wider: float) -> dict[str, float]:
    """Stored name -> what makes up for constants that a model's own code takes from the size of the residual stream,
    which was `wider` times as large."""
    family, factors = graph.family, dict[str, float]()
    for weight in graph.unit(""):
        if weight.kind == "lookup" and weight.reads.spaces == ("tokens",) and family.embedding_power:
            factors[weight.name] = wider**family.embedding_power
        elif weight.kind == "norm" and weight.leaf == "weight" and weight.writes.spaces[0] == graph.head_space:
            power = family.tied_head_power - family.embedding_power if graph.tied else 0.0
            if power:
                factors[weight.name] = wider**power
    return factors


def _gains(
    checkpoint: Checkpoint,
    graph: Graph,
    moments: Mapping[tuple[str, str], tuple[Tensor, Tensor]],
    kept_K: Tensor,
    size: int,
) -> dict[str, float]:
    """Stored name of each norm of the residual stream -> what its gain is multiplied by.

    Where nothing that a norm gives is measured, the share of the energy is the mean of the others'."""
    wide = graph.coordinates["residual"]
    norms = [w for w in graph.weights if w.kind == "norm" and graph.coordinates[w.reads.spaces[0]] == wide]
    shares = {}
    for norm in norms:
        if (found := moments.get((norm.unit, norm.writes.spaces[0]))) is not None:
            energy_N = normalized_energy(checkpoint, graph, norm, *found)
            shares[norm.name] = float(energy_N[kept_K].sum() / energy_N.sum())
    usual = sum(shares.values()) / len(shares) if shares else len(kept_K) / size
    return {norm.name: (shares.get(norm.name, usual) * size / len(kept_K)) ** 0.5 for norm in norms}
