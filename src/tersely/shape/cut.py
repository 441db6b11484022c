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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tersely.calibrate import MicroBatch, Sequences, micro_batches
from tersely.checkpoint import Checkpoint, TensorSpec
from tersely.encoding import Source
from tersely.errors import UsageError
from tersely.families import Sizes as Expressions
from tersely.graph import Graph, Weight
from tersely.measure import Statistics
from tersely.plan.cost import SUSPEND_BYTES, micro_batch_tokens, suspended_bytes
from tersely.plan.recipe import Cut
from tersely.rebase import selected, stored_axes
from tersely.rotation import stored_in, units_of
from tersely.shape.config import Written, key_of, resized
from tersely.shape.refit import refitted
from tersely.shape.scoring import Scored, normalized_energy, score
from tersely.shape.structures import Place, kinds_of, places_of
from tersely.stream import Value, stream
from tersely.writer import Writer

Say = Callable[[str, float], None]
CHOICE = "choice"
"""The unit in which a writer keeps what was chosen."""
MOMENTS = "second_moments"
"""What a method needs that scores the residual stream in its principal directions."""


@dataclass(frozen=True)
class Sizes:
    """What a cut leaves."""

    kept: Mapping[str, int]
    """Size of the family's table -> its new value."""
    config: dict[str, Any]

    def count(self, place: Place) -> int:
        """Structures that a place keeps."""
        space = {"heads": "kv_heads", "hidden": "residual", "experts": "experts", "neurons": place.read}[place.kind]
        return self.kept[space]


def places_of_step(graph: Graph, step: Cut) -> list[Place]:
    """Everywhere that a step cuts. UsageError: it names structures that the model, or the method, does not have."""
    kinds = kinds_of(step.where)
    for kind in kinds:
        if kind not in step.method.kinds:
            raise UsageError(f"{step.method.name} chooses {', '.join(sorted(step.method.kinds))}, not {kind}")
    return [place for kind in kinds for place in places_of(graph, kind)]


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


def planned_sizes(graph: Graph, config: Mapping[str, Any], step: Cut) -> Sizes:
    """The sizes that are left, and the config that says them."""
    wanted: dict[str, int] = {}
    places = places_of_step(graph, step)
    for kind in kinds_of(step.where):
        own = [place for place in places if place.kind == kind]
        if kind == "neurons":
            counts = {place.read: place.count for place in own}
            keyed = {s: n for s, n in counts.items() if key_of(graph.family, s, config) is not None}
            wanted |= {s: _kept(n, step, "neurons", step.multiple) for s, n in keyed.items()}
            smaller = resized(graph, config, wanted, "", check=False)
            wanted |= {s: Expressions(graph.family, smaller, "").need(s) for s in counts.keys() - keyed.keys()}
        elif kind == "heads":
            groups = _kept(own[0].count, step, "key/value heads", 1)
            headed = {s for place in own for s in place.spaces} | {"heads", "kv_heads"}
            wanted |= {s: n // own[0].count * groups for s, n in graph.sizes.items() if s in headed}
        elif kind == "experts":
            wanted |= dict.fromkeys(("experts", "router"), _kept_experts(graph, step))
        else:
            wanted["residual"] = _kept(own[0].count, step, "hidden coordinates", step.multiple)
    if _one_number(graph, config) and {"residual", "attn"} & {*wanted}:
        if "residual" not in wanted or "attn" not in wanted:
            key = key_of(graph.family, "residual", config)
            raise UsageError(
                f"where = {step.where!r}: a {graph.model_type} config has one number ({key}) for hidden coordinates "
                "and for all heads together; write `hidden|heads`"
            )
        wanted["residual"] = wanted["attn"]
    return Sizes(wanted, resized(graph, config, wanted, f"where = {step.where!r}"))


def _one_number(graph: Graph, config: Mapping[str, Any]) -> bool:
    """Whether the config has one number for the residual stream and for all heads together."""
    keys = {key_of(graph.family, size, config) for size in ("residual", "attn")}
    return len(keys) == 1 and None not in keys


def _kept(count: int, step: Cut, what: str, multiple: int) -> int:
    """How many of `count` stay: the share that was asked for, to the nearest multiple."""
    exact = count * (1 - step.ratio)
    kept = min(count, round(exact / multiple) * multiple)
    of = f"{count} {what}" + (f", in multiples of {multiple}" if multiple > 1 else "")
    if kept < 1:
        raise UsageError(f"ratio={step.ratio:g} leaves none of {of}; at most {1 - multiple / count:.3g} leaves some")
    if kept == count:
        least = 1 - (max(1, math.ceil(count / multiple) - 0.5) * multiple - 1e-9) / count
        raise UsageError(f"ratio={step.ratio:g} removes none of {of}; from about {max(least, 0):.3g} on it does")
    return kept


def _kept_experts(graph: Graph, step: Cut) -> int:
    count, active = graph.sizes["experts"], graph.sizes.get("active", 1)
    if graph.sizes.get("expert_groups", 1) > 1:
        raise UsageError(
            f"experts: they lie in {graph.sizes['expert_groups']} groups, of which the router chooses first; all must "
            "have the same number, which tersely does not cut"
        )
    kept = _kept(count, step, "experts", 1)
    if kept < active:
        raise UsageError(f"ratio={step.ratio:g} leaves {kept} of {count} experts, and {active} are used for each token")
    return kept


def cut(
    checkpoint: Checkpoint,
    graph: Graph,
    step: Cut,
    data: Sequences | None,
    writer: Writer,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    say: Say,
    given: Sequence[Tensor] | None = None,
) -> Written:
    """Write the units of the smaller model. given: scores of all places, where they are known already.

    A writer that has a part of them is continued: what was chosen stays, and the text runs once more.
    """
    sizes, places = planned_sizes(graph, checkpoint.config, step), places_of_step(graph, step)
    plain = not graph.has_experts and graph.family.auto_class == "CausalLM"
    batches = micro_batches(data, tokens=micro_batch_tokens(graph, dtype), pad=plain) if data else ()
    if not writer.done(CHOICE):
        scored = score(
            checkpoint,
            graph,
            places,
            step.method,
            batches,
            data.ids if data else (),
            dtype=dtype,
            device=device,
            seed=seed,
            say=say,
            given=given,
        )
        writer.put(CHOICE, {}, _choice(checkpoint, graph, places, scored, sizes))
    facts = writer.facts(CHOICE)
    kept = {place: torch.tensor(own) for place, own in zip(places, facts["kept"], strict=True)}
    heads = sizes.kept.get("heads", graph.sizes.get("heads", 1))
    work = _Work(Source(checkpoint), graph, kept, facts["gains"], heads)
    files = units_of(graph)
    if step.refit and batches and not all(map(writer.done, files)):
        padded = sum(batch.ids_BL.numel() for batch in batches)
        suspend = plain and suspended_bytes(graph, padded, dtype) <= SUSPEND_BYTES
        for unit in work.refit(batches, dtype=dtype, device=device, suspend=suspend, say=say):
            for file, weights in files.items():
                if weights[0].unit == unit and not writer.done(file):
                    writer.put(file, *work.written(weights))
            work.source.changed.clear()
    for file, weights in files.items():
        if not writer.done(file):
            writer.put(file, *work.written(weights))
    notes = [note for file in files for note in writer.facts(file)["notes"]]
    if graph.extra:
        files["extra"] = ()
        writer.put("extra", stored_in(checkpoint, {name: name for name in graph.extra}), {})
    names = {place: f"{place.unit} {place.read}".strip() for place in places}
    scores: dict[str, list[float]] = {}
    for place, own in zip(places, facts["scores"], strict=True):
        at = names[place] + ("" if place.expert is None else f" of expert {place.expert}")
        scores[f"{place.kind}: {at}"] = own
    return Written(list(files), sizes.config, scores, [*_told(sizes, places), *notes])


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
        self.notes: list[str] = []

    def written(self, weights: Sequence[Weight]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights as they are written, and what the user should know by now."""
        tensors = {}
        for weight in weights:
            if (name := _renamed(weight, self.kept)) is not None:
                tensors[name] = self._cut(weight, self.source[weight.name])
        facts = {"notes": list(self.notes)}
        self.notes.clear()
        return tensors, facts

    def refit(
        self,
        batches: Sequence[MicroBatch],
        *,
        dtype: torch.dtype,
        device: torch.device,
        suspend: bool,
        say: Say,
    ) -> Iterator[str]:
        """Run the text through the model and refit what reads a cut space; yields each unit when it has been."""
        asked = {
            unit: {stage: needs for stage in self.graph.stages(unit) if (needs := self._needs(unit, stage))}
            for unit in ("", *self.graph.units)
        }
        measured = {unit: stages for unit, stages in asked.items() if stages}
        steps, done = sum(map(len, measured.values())), 0
        for stop in stream(
            self.source.checkpoint,
            self.graph,
            batches,
            measured=measured,
            replaced=lambda _: {},
            dtype=dtype,
            device=device,
            suspend=suspend,
        ):
            if stop.stage is None:
                yield stop.unit
                continue
            say(f"{stop.unit or 'head'} {stop.stage}, least squares", done / steps)
            done += 1
            for weight, value in self._refitted(stop.unit, stop.stage, stop.statistics):
                # The residual stream runs at its full width: what reads it is cut when it is written.
                if not self._wide(weight):
                    stop.replace(weight, Value(value))
            if not stop.unit:
                yield ""

    def _cut(self, weight: Weight, tensor: Tensor) -> Tensor:
        index = {
            space: own
            for place, kept in self.kept.items()
            if place.holds(weight)
            for space, own in place.index(kept).items()
        }
        own = selected(self.graph, weight, tensor, index, self.heads) if index else tensor
        if weight.name in self.gains:
            offset = self.graph.family.norm_offset if weight.kind == "norm" else 0.0
            own = ((own.float() + offset) * self.gains[weight.name] - offset).to(own.dtype)
        return own

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

    def _refitted(self, unit: str, stage: str, statistics: Mapping[str, Statistics]) -> list[tuple[Weight, Tensor]]:
        """Refit the weights of a stage in the source; what runs in their place, at full width."""
        changed = []
        for weight, kept_K in self._readers(unit, stage):
            stored, bias = self.source[weight.name], self._bias(weight)
            offset = self.source[bias.name] if bias is not None else None
            value_OI = stored.t() if weight.transposed else stored
            found = refitted(value_OI, offset, statistics.get(weight.statistics), kept_K)
            if found.note:
                self.notes.append(f"{weight.name.removesuffix('.weight')}: {found.note}")
            new_OI = found.weight_OI
            self.source.changed[weight.name] = (new_OI.t() if weight.transposed else new_OI).contiguous()
            changed.append((weight, new_OI))
            if bias is not None and found.bias_O is not None and offset is not None:
                self.source.changed[bias.name] = found.bias_O.cpu().to(offset.dtype)
                if not self._wide(weight):
                    changed.append((bias, self.source.changed[bias.name]))
        return changed


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
