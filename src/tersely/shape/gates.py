"""Gates: a number for each neuron, head, expert or hidden coordinate, which multiplies what it adds to the model.

Gates act on weights, so that a model with gates is an ordinary model of full size:

    neurons   columns of the weight that reads them (down)
    heads     columns of the weight that reads them (o); a key/value head and all its query heads have one gate
    experts   what the last weight of an expert writes
    hidden    what is written to the residual stream: rows of o and down, columns of the embedding, biases

A structure with a gate of zero can be cut. Neurons and heads: exactly. Hidden coordinates: exactly, where every norm's
gain is multiplied by sqrt(d / d') and its epsilon by d / d' (d coordinates, d' kept), since an RMSNorm divides by a
mean over them. Experts: wherever the router would not have chosen it.

Shapes: G structures of a place.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tersely.bases import axes
from tersely.errors import UsageError
from tersely.graph import Graph, Weight
from tersely.shape.structures import Place


@dataclass(frozen=True)
class Touch:
    """What the structures of a place have of one weight."""

    place: Place
    axis: int | None
    """Stored dimension along which they lie; None: the weight belongs to one expert."""
    gated: bool
    """Their gates multiply it."""


def check_gates(graph: Graph, places: Collection[Place]) -> None:
    """UsageError where a structure cannot be cut without a change in the others, so that no gate stands for it."""
    kinds = {place.kind for place in places}
    if "hidden" in kinds and graph.family.norm == "layer":
        raise UsageError(
            f"hidden: the norms of a {graph.model_type} model subtract the mean over all coordinates, so that no gate "
            "stands for cutting one; gate neurons|heads"
        )
    norm = next((w for w in graph.weights if w.kind == "norm" and {"q", "k"} & set(w.reads.spaces)), None)
    if "heads" in kinds and norm is not None:
        raise UsageError(f"heads: {norm.name} divides by the size of all heads together; gate neurons")


def touches(graph: Graph, places: Iterable[Place]) -> dict[str, tuple[Touch, ...]]:
    """Stored name -> what these places have of that weight; weights of which they have nothing are left out."""
    stream = {s for s, own in graph.coordinates.items() if own == graph.coordinates["residual"]}
    found: dict[str, tuple[Touch, ...]] = {}
    for place in places:
        for w in graph.unit(place.unit) if place.unit else graph.weights:
            adds = w.role != "norm" and not stream & set(w.reads.spaces) and bool(stream & set(w.writes.spaces))
            own = []
            if place.kind == "experts" and w.expert is not None:
                own.append(Touch(place, None, adds))
            elif place.holds(w):
                for dim, axis, reads in axes(w):
                    if set(axis.spaces) & set(place.spaces):
                        read = reads and w.kind == "linear" and place.read in axis.spaces
                        on = {"hidden": adds and not reads, "experts": False, "heads": read, "neurons": read}
                        own.append(Touch(place, dim, on[place.kind]))
            if own:
                found[w.name] = (*found.get(w.name, ()), *own)
    return found


def gated(weight: Weight, value: Tensor, own: Collection[Touch], gates: Mapping[Place, Tensor]) -> Tensor:
    """A stored tensor times the gates that act on it, (G,) each; gradients flow to both."""
    for touch in own:
        if not touch.gated:
            continue
        gate_G = gates[touch.place].to(value.device, value.dtype)
        if touch.axis is None:
            value = value * gate_G[weight.expert]
        else:
            shape = [-1 if dim == touch.axis else 1 for dim in range(value.dim())]
            value = value * gate_G.repeat_interleave(value.shape[touch.axis] // len(gate_G)).view(shape)
    return value


def masked(graph: Graph, tensors: Mapping[str, Tensor], gates: Mapping[Place, Tensor]) -> dict[str, Tensor]:
    """Those of the stored tensors that change when these gates are put into a model: full size, their own dtype."""
    return {
        name: gated(graph.weight(name), tensors[name].float(), own, gates).to(tensors[name].dtype)
        for name, own in touches(graph, gates).items()
        if name in tensors and any(touch.gated for touch in own)
    }


def expected_parameters(graph: Graph, own: Mapping[str, Collection[Touch]], open_: Mapping[Place, Tensor]) -> Tensor:
    """How many parameters of the touched weights are left, where each structure is with the chance that is given.

        sum over weights of size * product over its axes of (mean over structures of chance),   chances (G,)

    which for Llama is, of each block, P_hidden (4 d_head P_heads + 3 P_neurons) in sums of chances, and embeddings
    and norms with P_hidden. Exact for chances that are independent of one another.
    """
    total = torch.zeros(())
    for name, parts in own.items():
        weight = graph.weight(name)
        size = torch.tensor(float(math.prod(weight.spec.shape)))
        for touch in parts:
            chance_G = open_[touch.place].cpu()
            size = size * (chance_G.mean() if touch.axis is not None else chance_G[weight.expert])
        total = total + size
    return total
