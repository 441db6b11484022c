"""Measuring and scoring structures on calibration text, the model as it lies in the checkpoint.

Shapes: G structures, D coordinates that a space has for each, N coordinates of a space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tersely.checkpoint import Checkpoint
from tersely.graph import Graph, Weight
from tersely.measure import Statistics
from tersely.methods.cut import Importance, Structures
from tersely.shape.setup import Setup
from tersely.shape.structures import Place, members, reader
from tersely.stream import SURVEY, stream
from tersely.stream.gradients import gradients
from tersely.stream.sums import Gradient

Key = tuple[str, str]
"""Unit and name of the activations (Weight.statistics)."""


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores of the structures of every place, and the energy of what norms give."""

    scores: Sequence[Tensor]
    """(G,) float64 each, in the order of the places."""
    moments: Mapping[Key, tuple[Tensor, Tensor]]
    """Of what norms give, mean and mean square of each coordinate, (N,); empty unless `hidden` is cut."""


def score(
    checkpoint: Checkpoint,
    graph: Graph,
    places: Sequence[Place],
    method: Importance,
    setup: Setup,
    given: Sequence[Tensor] | None = None,
) -> Scored:
    """Score all places with what the method asks to be measured. given: what the training of gates has found, for
    methods that need that."""
    hidden = any(place.kind == "hidden" for place in places)
    needs = method.needs & {"activity", "routed"}
    found: dict[Key, Statistics] = {}
    if setup.data and (needs or hidden):
        found = dict(measured(checkpoint, graph, _asked(graph, places, needs), setup, "what is active"))
    if method.needs & {"gradient", "fisher"}:
        scores = _from_gradients(checkpoint, graph, places, method, setup)
    else:
        read = reader(checkpoint)
        scores = []
        for number, place in enumerate(places):
            structures = _structures(graph, place, found, _Members(graph, place, read, None))
            structures = structures if given is None else replace(structures, gates_G=given[number])
            scores.append(method(structures, setup.seed + number).cpu())
    moments = {
        key: (stats.mean_I.cpu(), (stats.squares_I / stats.tokens).cpu())
        for key, stats in found.items()
        if stats.squares_I is not None and stats.mean_I is not None
    }
    return Scored(_agreed(places, scores), moments)


def measured(
    checkpoint: Checkpoint, graph: Graph, asked: Mapping[str, Mapping[str, frozenset[str]]], setup: Setup, what: str
) -> Iterator[tuple[Key, Statistics]]:
    """Run the text through the model as it lies; statistics of the activations that are asked for: unit ("": the head)
    -> stage -> needs. One unit's are held at a time."""
    head = asked.get("", {})
    for number, stop in enumerate(
        stream(
            checkpoint,
            graph,
            setup.batches(graph),
            measured={"": head} if head else {},
            surveyed={unit: stages for unit, stages in asked.items() if unit and stages},
            replaced=lambda _: {},
            dtype=setup.dtype,
            device=setup.device,
            suspend=False,
        )
    ):
        setup.say(f"{stop.unit or 'head'}, {what}", number / (2 * len(graph.units) + 1))
        if stop.stage == SURVEY or not stop.unit:
            # A head that is the embedding has the embedding's name.
            for name, own in stop.statistics.items():
                yield (stop.unit, name if stop.unit else graph.head_space), own


def normalized_energy(checkpoint: Checkpoint, graph: Graph, norm: Weight, mean_N: Tensor, square_N: Tensor) -> Tensor:
    """Mean square of each coordinate before a norm's gain and bias, (N,) float64, given moments of what it gives."""
    gain_N, bias_N = _affine(checkpoint, graph, norm)
    energy_N = square_N.double() - 2 * bias_N * mean_N.double() + bias_N.square()
    return torch.where(gain_N == 0, 0.0, energy_N / gain_N.square().clamp(min=1e-30))


def normalized_moments(checkpoint: Checkpoint, graph: Graph, unit: str, space: str, stats: Statistics) -> Tensor:
    """Second moments of what a norm gives, its gain and bias taken out, (N, N) float64: mean over tokens."""
    gram_NN, mean_N = stats.gram_II, stats.mean_I
    if gram_NN is None or mean_N is None:
        return torch.zeros((stats.columns, stats.columns), dtype=torch.float64)
    moments_NN, mean_N = gram_NN.double().cpu() / stats.tokens, mean_N.double().cpu()
    name = space.partition("@")[0]
    norm = next((w for w in graph.unit(unit) if w.kind == "norm" and w.writes.spaces[0] == name), None)
    if norm is None:
        return moments_NN
    gain_N, bias_N = _affine(checkpoint, graph, norm)
    across_NN = torch.outer(bias_N, mean_N)
    moments_NN = moments_NN - across_NN - across_NN.t() + torch.outer(bias_N, bias_N)
    inverse_N = torch.where(gain_N == 0, 0.0, 1 / torch.where(gain_N == 0, 1.0, gain_N))
    return moments_NN * inverse_N * inverse_N[:, None]


def _affine(checkpoint: Checkpoint, graph: Graph, norm: Weight) -> tuple[Tensor, Tensor]:
    """What a norm multiplies by and what it adds, float64."""
    gain_N = checkpoint[norm.name].double() + graph.family.norm_offset
    bias = next((w for w in graph.unit(norm.unit) if w.kind == "bias" and w.path == norm.path), None)
    return gain_N, torch.zeros_like(gain_N) if bias is None else checkpoint[bias.name].double()


def norms_read(graph: Graph, unit: str) -> dict[str, Weight]:
    """Activations in the coordinates of the residual stream that weights of a unit multiply: name -> one of them."""
    wide = graph.coordinates["residual"]
    return {
        w.statistics: w
        for w in graph.unit(unit)
        if w.kind == "linear" and w.expert is None and graph.coordinates.get(w.reads.spaces[0]) == wide
    }


@dataclass(frozen=True)
class _Members:
    """The members of a place, read anew each time that they are gone through."""

    graph: Graph
    place: Place
    read: Callable[[Weight], Iterable[Tensor]]
    gradients: Mapping[str, Gradient] | None

    def __iter__(self):  # type: ignore[no-untyped-def]
        return members(self.graph, self.place, self.read, self.gradients)  # type: ignore[arg-type]


def _asked(graph: Graph, places: Sequence[Place], needs: frozenset[str]) -> dict[str, dict[str, frozenset[str]]]:
    """What is to be measured to score places."""
    asked: dict[str, dict[str, frozenset[str]]] = {}

    def ask(unit: str, stage: str, own: frozenset[str]) -> None:
        stages = asked.setdefault(unit, {})
        stages[stage] = stages.get(stage, frozenset()) | own

    for place in places:
        if place.kind == "hidden":
            for unit in ("", *graph.units):
                for weight in norms_read(graph, unit).values():
                    if unit or weight == graph.head:
                        ask(unit, weight.stage, needs | {"square", "mean"})
            if graph.tied and "head_in" in graph.coordinates:
                ask("", graph.head_space, needs | {"square", "mean"})
        else:
            stage = next(w.stage for w in graph.unit(place.unit) if w.kind == "linear" and place.read in w.reads.spaces)
            ask(place.unit, stage, needs)
    return asked


def _structures(graph: Graph, place: Place, measured: Mapping[Key, Statistics], own: _Members) -> Structures:
    activity = routed = tokens = None
    if place.kind == "hidden":
        wide = [stats for (unit, name), stats in measured.items() if not unit or name in norms_read(graph, unit)]
        found = [stats.activity_I for stats in wide if stats.activity_I is not None]
        activity = torch.stack([each.double().sqrt() for each in found]).sum(0) if found else None
    elif place.kind == "experts":
        each = [measured.get((place.unit, f"{place.read} of expert {e}")) for e in range(place.count)]
        if measured:
            empty = Statistics(1)
            known = [stats or empty for stats in each]
            tokens = torch.tensor([float(stats.tokens) for stats in known])
            routed = torch.tensor([stats.routed for stats in known])
            sums = [0.0 if s.activity_I is None else float(s.activity_I.double().sum().sqrt()) for s in known]
            activity = torch.tensor(sums)
    else:
        name = next(
            w.statistics
            for w in graph.unit(place.unit)
            if w.kind == "linear" and place.read in w.reads.spaces and place.expert in (None, w.expert)
        )
        stats = measured.get((place.unit, name))
        if measured:
            squared = torch.zeros(place.count) if stats is None or stats.activity_I is None else stats.activity_I
            activity = squared.view(place.count, -1).double().sum(1).sqrt()
    return Structures(place.kind, place.count, own, activity, routed, tokens)


def _from_gradients(
    checkpoint: Checkpoint, graph: Graph, places: Sequence[Place], method: Importance, setup: Setup
) -> list[Tensor]:
    """Scores with the gradients of one unit at a time; of what runs through the model, the units' scores are added."""
    read = reader(checkpoint)
    wanted = [w.name for w in graph.weights if any(place.made_of(w) for place in places)]
    scores = [torch.zeros(place.count, dtype=torch.float64) for place in places]
    steep = gradients(
        checkpoint, graph, setup.ids, wanted=wanted, device=setup.device, needs=method.needs & {"gradient", "fisher"}
    )
    for done, (unit, own) in enumerate(steep):
        setup.say(f"{unit or 'head'}, gradients of the loss", done / (len(graph.units) + 1))
        for number, place in enumerate(places):
            if place.unit in ("", unit) and any(place.made_of(graph.weight(name)) for name in own):
                here = place if place.unit else Place(place.kind, unit, place.count, place.spaces, place.read)
                structures = Structures(place.kind, place.count, _Members(graph, here, read, own))
                scores[number] += method(structures, setup.seed + number).double().cpu()
    return scores


def _agreed(places: Sequence[Place], scores: Sequence[Tensor]) -> list[Tensor]:
    """Scores of places that must keep the same structures: the mean of theirs, each as a share of its sum."""
    agreed = list(scores)
    for together in dict.fromkeys(place.together for place in places if place.together):
        own = [n for n, place in enumerate(places) if place.together == together]
        shares = [scores[n] / total if (total := scores[n].sum()) else scores[n] for n in own]
        mean = torch.stack(shares).mean(0)
        for n in own:
            agreed[n] = mean
    return agreed
