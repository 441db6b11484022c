"""What differs between a model and its base, and how it is put from one into the other for a pass.

D = hidden size, N = blocks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tersely.graph import Graph, Piece, Weight

Direction = Literal["restore", "spoil"]


@dataclass(frozen=True, eq=False)
class Swap:
    """A site that can be swapped. first: the first block that its swap touches, N for what follows the blocks."""

    name: str
    level: Literal["block", "weight"]
    block: int | None
    role: str
    parameters: int
    bits: float | None
    first: int
    regions: tuple[tuple[Tensor, Tensor], ...]
    """Memory of the network that runs, and what is put there for a pass; empty for a block, which is swapped whole."""
    change: float
    """|w_model - w_base|^2 / |w_base|^2."""


@dataclass(frozen=True, eq=False)
class Networks:
    """The network in which sites are swapped, the other one where they come from, and the blocks of both."""

    running: Any
    other: Any
    base_runs: bool
    blocks: tuple[nn.Module, ...]
    other_blocks: tuple[nn.Module, ...]
    """Empty, as `blocks`, where the models' blocks do not correspond."""
    device: str


@dataclass(frozen=True, eq=False)
class Differences:
    """What differs between two models. sites: blocks, and weights outside them; weights: those inside."""

    networks: Networks
    sites: tuple[Swap, ...]
    weights: tuple[Swap, ...]
    notes: tuple[str, ...]


def differences(
    graph: Graph, networks: Sequence[Any], folders: Sequence[Path], direction: Direction, device: str
) -> Differences:
    """Find every place that holds other numbers in the model than in the base."""
    base_runs = direction == "spoil"
    states = [_state(network) for network in networks]
    blocks, notes = _blocks(graph, networks, folders)
    rows = _stored(folders[0])
    sites: list[Swap] = []
    weights: list[Swap] = []
    misshapen: list[str] = []
    folded: list[str] = []
    for n, unit in enumerate(graph.units if blocks[0] else ()):
        places = _places(graph, unit, states)
        bad = [place for place in places if not _alike(place)]
        changed = [place for place in places if _alike(place) and not _equal(place)]
        misshapen += [_shapes(place) for place in bad]
        if {"norm", "linear"} <= {weight.kind for weight, _, _ in changed}:
            folded.append(str(n))
        linear = [weight for weight in graph.unit(unit) if weight.kind == "linear"]
        # What an MLP has inside does not show outside it; heads do, in the rotary angles that blocks are given.
        if (bad or changed) and all(weight.role in ("mlp", "expert", "router") for weight, _, _ in bad):
            parameters = sum(map(_numel, linear))
            sites.append(Swap(unit, "block", n, "block", parameters, _bits(linear, rows), n, (), 0.0))
        weights += [_swap(place, n, n, rows, base_runs) for place in changed]
    outside = _outside(graph, networks, states)
    tied = _shared(outside, base_runs)
    for place in outside:
        if not _alike(place):
            misshapen.append(_shapes(place))
        elif place[0].name in tied:
            notes.append(
                f"{place[0].name} cannot be swapped alone: one of the models has its head and its embedding in one "
                "tensor, the other has not"
            )
        elif not _equal(place):
            spaces = {*place[0].reads.spaces, *place[0].writes.spaces}
            behind = place[0].role == "head" or (place[0].role != "embedding" and graph.head_space in spaces)
            first = len(blocks[0]) if behind else 0
            sites.append(_swap(place, None, first, rows, base_runs))
    if misshapen:
        more = f" and {len(misshapen) - 5} more" if len(misshapen) > 5 else ""
        notes.append(f"not swapped, their shapes differ (model, base): {'; '.join(misshapen[:5])}{more}")
    if folded:
        notes.append(
            f"norms differ as well in {named('block', folded)}: if scales were moved between weights, a weight "
            "swapped alone means little there; the blocks as a whole hold"
        )
    if not sites and not weights and not notes:
        notes.append("the weights of both models are equal: nothing costs anything")
    running, other = networks[::-1] if base_runs else networks
    ours, theirs = blocks[::-1] if base_runs else blocks
    return Differences(
        Networks(running, other, base_runs, ours, theirs, device), tuple(sites), tuple(weights), tuple(notes)
    )


def named(what: str, names: Sequence[str]) -> str:
    return f"{what} {names[0]}" if len(names) == 1 else f"{what}s {', '.join(names)}"


_Place = tuple[Weight, Tensor, Tensor | None]
"""A weight, where the base has it in memory, and where the model has it (None: nowhere)."""


def _state(network: Any) -> dict[str, Tensor]:
    named = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach() for name, tensor in named}


def _blocks(
    graph: Graph, networks: Sequence[Any], folders: Sequence[Path]
) -> tuple[tuple[tuple[nn.Module, ...], tuple[nn.Module, ...]], list[str]]:
    """The blocks of model and base, in order; none, and why, where they do not correspond."""
    stack = graph.units[0].rpartition(".")[0]
    stacks: list[Any] = []
    for network, folder in zip(networks, folders, strict=True):
        try:
            stacks.append(network.get_submodule(stack))
        except AttributeError:
            return ((), ()), [f"{folder} has no {stack}: its blocks do not correspond to the base's, and are left out"]
    counts = [len(blocks) for blocks in stacks]
    if counts[0] != counts[1]:
        return ((), ()), [
            f"{folders[0]} has {counts[0]} blocks and {folders[1]} has {counts[1]}: they do not correspond, and are "
            "left out"
        ]
    widths = [network.get_input_embeddings().weight.shape[1] for network in networks]
    if widths[0] != widths[1]:
        return ((), ()), [
            f"{folders[0]} has hidden states of {widths[0]} numbers and {folders[1]} of {widths[1]}: no block of one "
            "fits into the other"
        ]
    return (tuple(stacks[0]), tuple(stacks[1])), []


def _places(graph: Graph, unit: str, states: Sequence[Mapping[str, Tensor]]) -> list[_Place]:
    model, base = states
    found: list[_Place] = []
    for parameter, pieces in graph.parameters(unit).items():
        name = f"{unit}.{parameter}" if unit else parameter
        here, there = base[name], model.get(name)
        for piece in pieces:
            if there is None:
                # Libraries that compress mixtures of experts may have unstacked them.
                alone = f"{unit}.{piece.weight.parameter}" if unit else piece.weight.parameter
                found.append((piece.weight, _region(here, piece), model.get(alone)))
            elif here.shape != there.shape:
                found.append((piece.weight, here, there))
            else:
                found.append((piece.weight, _region(here, piece), _region(there, piece)))
    return found


def _region(tensor: Tensor, piece: Piece) -> Tensor:
    """What a stored tensor fills of a parameter."""
    slot = tensor if piece.index is None else tensor[piece.index]
    return slot if slot.ndim == 0 else slot[piece.start : piece.start + piece.rows]


def _outside(graph: Graph, networks: Sequence[Any], states: Sequence[Mapping[str, Tensor]]) -> list[_Place]:
    """The weights outside the blocks; a head of its own that only one of the models has counts, too."""
    found = _places(graph, "", states)
    heads = [network.get_output_embeddings().weight.detach() for network in networks]
    apart = [
        head.data_ptr() != network.get_input_embeddings().weight.data_ptr()
        for head, network in zip(heads, networks, strict=True)
    ]
    if graph.head is None and any(apart):
        own = apart.index(True)
        name = next(name for name, tensor in states[own].items() if tensor.data_ptr() == heads[own].data_ptr())
        embedding = next(weight for weight in graph.weights if weight.role == "embedding")
        found.append((replace(embedding, name=name, role="head", kind="linear"), heads[1], heads[0]))
    return found


def _shared(places: Sequence[_Place], base_runs: bool) -> set[str]:
    """Names of those that are one tensor in the network that runs, and several in the other."""
    alike = [
        (weight.name, *((base, model) if base_runs else (model, base)))
        for weight, base, model in places
        if model is not None
    ]
    return {
        name
        for name, running, other in alike
        for other_name, its_running, its_other in alike
        if name != other_name
        and running.data_ptr() == its_running.data_ptr()
        and other.data_ptr() != its_other.data_ptr()
    }


def _alike(place: _Place) -> bool:
    return place[2] is not None and place[1].shape == place[2].shape


def _equal(place: _Place) -> bool:
    _, base, model = place
    return model is not None and torch.equal(base, model.to(base.dtype))


def _shapes(place: _Place) -> str:
    weight, base, model = place
    return f"{weight.name} {'none' if model is None else list(model.shape)}, {list(base.shape)}"


def _swap(
    place: _Place, block: int | None, first: int, rows: Mapping[str, tuple[int, int]] | None, base_runs: bool
) -> Swap:
    weight, base, model = place
    assert model is not None
    change = (model.float() - base.float()).square().sum() / base.float().square().sum().clamp(min=1e-30)
    stored = None if rows is None else rows.get(weight.name)
    return Swap(
        name=weight.name,
        level="weight",
        block=block,
        role=weight.role,
        parameters=_numel(weight),
        bits=None if stored is None else 8 * stored[0] / stored[1],
        first=first,
        regions=((base, model) if base_runs else (model, base),),
        change=float(change),
    )


def _bits(weights: Sequence[Weight], rows: Mapping[str, tuple[int, int]] | None) -> float | None:
    """Stored bits a weight of several together; those without a row were kept as they are in the base."""
    if rows is None or not any(weight.name in rows for weight in weights):
        return None
    stored = [rows.get(weight.name, (weight.spec.nbytes, _numel(weight))) for weight in weights]
    return 8 * sum(nbytes for nbytes, _ in stored) / sum(count for _, count in stored)


def _stored(folder: Path) -> Mapping[str, tuple[int, int]] | None:
    """Name -> bytes and weights, of the weights that the folder's report.json lists; None where there is none."""
    try:
        rows = json.loads((folder / "report.json").read_text(encoding="utf-8"))["rows"]
        found = {str(row["name"]): (int(row["bytes_after"]), int(row["parameters"])) for row in rows}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return {name: (nbytes, count) for name, (nbytes, count) in found.items() if nbytes >= 0 and count > 0} or None


def _numel(weight: Weight) -> int:
    return prod(weight.spec.shape)


@contextmanager
def watched(blocks: Sequence[nn.Module], see: Callable[[int, Any], None]) -> Iterator[None]:
    """Show the output of each block as it comes."""

    def hook(n: int) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _inputs, output: see(n, output)

    handles = [block.register_forward_hook(hook(n)) for n, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def instead(forwards: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Let blocks do something else than they do."""
    own = [(block, block.__dict__.get("forward")) for block, _ in forwards]
    try:
        for block, forward in forwards:
            block.forward = forward
        yield
    finally:
        for block, before in own:
            if before is not None:
                block.forward = before
            else:
                block.__dict__.pop("forward", None)


@contextmanager
def replaced(regions: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Put other numbers into memory, and those that were there back."""
    saved: list[Tensor] = []
    with torch.no_grad():
        try:
            for place, value in regions:
                saved.append(place.clone())
                place.copy_(value)
            yield
        finally:
            for (place, _), before in zip(regions, saved, strict=False):
                place.copy_(before)
