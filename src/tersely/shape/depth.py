"""Whole blocks taken out of a model.

What is written is an ordinary checkpoint of the same family: blocks are counted anew, lists of the config that have an
entry for each block lose those of the blocks that go.

Shapes: B sequences, L tokens, D coordinates of the residual stream, S states (what comes to each block, and what the
last one gives), T tokens that are looked at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tersely.calibrate import MicroBatch
from tersely.checkpoint import Checkpoint
from tersely.errors import UsageError
from tersely.graph import Graph
from tersely.methods.drop import Blocks
from tersely.plan.recipe import Drop
from tersely.rewriting import stored_in, units_of
from tersely.shape.config import key_of
from tersely.shape.setup import Setup, Written
from tersely.stream import stream
from tersely.writer import Writer

CHOICE = "choice"
"""The unit in which a writer keeps what was chosen."""
_STATES_BYTES = 256 << 20
"""Of the states that are compared."""
_HIDDEN_BYTES = 512 << 20
"""Of the hidden states of all models whose losses are measured together."""


@dataclass(frozen=True)
class _Stack:
    """A list of blocks, and how many of them go."""

    name: str
    first: int
    """Where its blocks begin among all blocks of the model."""
    blocks: int
    candidates: tuple[int, ...]
    count: int


def planned(headers: Checkpoint, graph: Graph, step: Drop) -> Checkpoint:
    """The headers of what `drop` will write, whichever blocks it chooses. UsageError: what cannot go, and why."""
    gone = {stack.name: frozenset(stack.candidates[-stack.count :]) for stack in stacks_of(graph, step)}
    specs = {}
    for name in headers:
        renamed = name if name in graph.extra else _renamed(graph, name, gone)
        if renamed is not None:
            specs[renamed] = replace(headers.spec(name), name=renamed)
    return headers.with_headers(_config(headers, graph, gone), specs)


def stacks_of(graph: Graph, step: Drop) -> list[_Stack]:
    """How many blocks of each list go, and of which."""
    match = re.fullmatch(r"blocks(?:\s+(\d+)(?:-(\d+))?)?", step.where.strip())
    if match is None:
        raise UsageError(f"where = {step.where!r}: {step.method.name} removes blocks; write `blocks` or `blocks 4-12`")
    names = list(dict.fromkeys(unit.rpartition(".")[0] for unit in graph.units))
    if match[1] and len(names) > 1:
        raise UsageError(f"where = {step.where!r}: this model has {len(names)} lists of blocks; write `blocks`")
    if len(names) > 1 and not step.method.similarity:
        raise UsageError(f"{step.method.name} takes models with one list of blocks; use block_similarity")
    if graph.family.auto_class != "CausalLM" and not step.method.similarity:
        raise UsageError(f"{step.method.name} measures next-token losses, which a {graph.model_type} model has not")
    first, last = int(match[1] or 0), int(match[2] or match[1] or len(graph.units) - 1)
    if not first <= last < len(graph.units):
        raise UsageError(f"where = {step.where!r}: the model has blocks 0 to {len(graph.units) - 1}")
    found, begin = [], 0
    for name in names:
        units = [unit for unit in graph.units if unit.rpartition(".")[0] == name]
        allowed = tuple(b for b in range(len(units)) if first <= begin + b <= last and _like(graph, units, b))
        count = round(len(units) * step.ratio)
        if not count:
            least = 0.5 / len(units)
            raise UsageError(f"ratio={step.ratio:g} removes none of {len(units)} blocks; from {least:.3g} on it does")
        if count > len(allowed) or count >= len(units):
            raise UsageError(
                f"ratio={step.ratio:g} would remove {count} of {len(units)} blocks, of which {len(allowed)} may go "
                "(at least one must stay, and so must those that are unlike the others)"
            )
        found.append(_Stack(name, begin, len(units), allowed, count))
        begin += len(units)
    return found


def drop(checkpoint: Checkpoint, graph: Graph, step: Drop, writer: Writer, setup: Setup) -> Written:
    """Write the units of the shorter model."""
    stacks = stacks_of(graph, step)
    if not writer.done(CHOICE):
        batches = setup.batches(graph)
        alike = _similarities(checkpoint, graph, batches, setup) if step.method.similarity else None
        asked = 0

        def losses(sets: Sequence[frozenset[int]]) -> list[float]:
            nonlocal asked
            setup.say(f"losses without blocks, {asked + len(sets)} so far", 0.5)
            asked += len(sets)
            named = [frozenset(graph.units[b] for b in own) for own in sets]
            return _losses(checkpoint, graph, batches, named, setup)

        chosen = {}
        for stack in stacks:
            own = None if alike is None else _states_of(alike, stack)
            blocks = Blocks(stack.candidates, own, losses)
            chosen[stack.name] = sorted(step.method(blocks, stack.count))
        writer.put(CHOICE, {}, {"gone": chosen, "similarity": None if alike is None else alike.tolist()})
    chosen = writer.facts(CHOICE)["gone"]
    gone = {stack: frozenset(own) for stack, own in chosen.items()}
    files = {}
    for file, weights in units_of(graph).items():
        names = {new: w.name for w in weights if (new := _renamed(graph, w.name, gone)) is not None}
        if names:
            files[file] = names
    for file, names in files.items():
        if not writer.done(file):
            writer.put(file, stored_in(checkpoint, names), {})
    named = "; ".join(f"{stack}: {', '.join(map(str, own))}" for stack, own in chosen.items())
    alike = writer.facts(CHOICE)["similarity"]
    influence = {} if alike is None else {"blocks": [1 - alike[2 * b][2 * b + 1] for b in range(len(graph.units))]}
    config = _config(checkpoint, graph, gone)
    return Written(list(files), config, influence, [f"blocks that went: {named}"])


def _like(graph: Graph, units: Sequence[str], block: int) -> bool:
    """Whether a block has what the others have, so that any of them may stand in its place."""
    made = [frozenset((w.path, w.leaf) for w in graph.unit(unit)) for unit in units]
    usual = max(set(made), key=made.count)
    return made[block] == usual


def _renamed(graph: Graph, name: str, gone: Mapping[str, frozenset[int]]) -> str | None:
    """The stored name when blocks are counted anew; None in a block that goes."""
    weight = graph.weight(name)
    if weight.block is None:
        return name
    own = gone[weight.stack]
    if weight.block in own:
        return None
    new = weight.block - sum(b < weight.block for b in own)
    head = name.removesuffix(weight.parameter)
    return head.removesuffix(f"{weight.block}.") + f"{new}." + weight.parameter


def _config(headers: Checkpoint, graph: Graph, gone: Mapping[str, frozenset[int]]) -> dict[str, Any]:
    """The config without some blocks."""
    config = dict(headers.config)
    counts = {stack: graph.sizes[stack] for stack in gone}
    keys = {stack: key_of(graph.family, stack, config) for stack in gone}
    for stack, own in gone.items():
        key = keys[stack]
        assert key is not None, f"the number of blocks of {stack} has a key of its own"
        config[key] = counts[stack] - len(own)
    if len(gone) == 1:
        (stack, own), (blocks,) = next(iter(gone.items())), counts.values()
        for key, value in _listed(headers, blocks).items():
            config[key] = [each for b, each in enumerate(value) if b not in own]
        for key in graph.family.numbered_blocks:
            if config.get(key):
                config[key] = [b - sum(g < b for g in own) for b in config[key] if b not in own]
        for key in graph.family.every_block:
            if config.get(key, 1) != 1:
                raise UsageError(f"blocks: config.json has {key} = {config[key]}, a pattern that breaks if one goes")
    return config


def _listed(headers: Checkpoint, blocks: int) -> dict[str, list[Any]]:
    """What the config lists for each block, be it that transformers works it out."""
    import transformers

    config = dict(headers.config)
    whole = transformers.AutoConfig.for_model(config.pop("model_type"), **config).to_dict()
    return {
        key: value
        for key, value in whole.items()
        if isinstance(value, list) and len(value) == blocks and key not in ("architectures",)
        if key in headers.config or key == "layer_types"
    }


def _similarities(checkpoint: Checkpoint, graph: Graph, batches: Sequence[MicroBatch], setup: Setup) -> Tensor:
    """Mean cosine of all pairs of states, (S, S) float64: what came to each block of the model, and what it gave.

    First tokens of sequences are left out: nothing comes before them, and their size is another.
    """
    tokens = sum(batch.ids_BL.numel() for batch in batches)
    each = graph.sizes["residual"] * 4 * 2 * len(graph.units)
    every = max(1, -(-tokens * each // _STATES_BYTES))
    states: list[Tensor] = []
    for number, stop in enumerate(
        stream(
            checkpoint,
            graph,
            batches,
            measured={},
            replaced=lambda _: {},
            dtype=setup.dtype,
            device=setup.device,
            suspend=False,
        )
    ):
        setup.say(f"{stop.unit}, states", number / len(graph.units))
        for side in (0, 1):
            seen = [_tokens(batch, pair[side], every) for batch, pair in zip(batches, stop.passed, strict=True)]
            states.append(torch.nn.functional.normalize(torch.cat(seen).float(), dim=-1).cpu())
    alike = torch.ones((len(states), len(states)), dtype=torch.float64)
    for i, one in enumerate(states):
        for j in range(i + 1, len(states)):
            if len(one) == len(states[j]):
                alike[i, j] = alike[j, i] = (one * states[j]).sum(-1).double().mean()
    return alike


def _tokens(batch: MicroBatch, hidden_BLD: Tensor, every: int) -> Tensor:
    keep_BL = torch.ones_like(batch.ids_BL, dtype=torch.bool) if batch.keep_BL is None else batch.keep_BL.clone()
    keep_BL[:, :1] = keep_BL.shape[1] == 1
    kept = (
        hidden_BLD[keep_BL.to(hidden_BLD.device)] if hidden_BLD.shape[:2] == keep_BL.shape else hidden_BLD.flatten(0, 1)
    )
    return kept[::every]


def _states_of(alike_SS: Tensor, stack: _Stack) -> Tensor:
    """Those of one list of blocks: what comes to each, and what the last gives."""
    sides = [2 * (stack.first + b) for b in range(stack.blocks)] + [2 * (stack.first + stack.blocks) - 1]
    index = torch.tensor(sides)
    return alike_SS[index[:, None], index]


def _losses(
    checkpoint: Checkpoint,
    graph: Graph,
    batches: Sequence[MicroBatch],
    sets: Sequence[frozenset[str]],
    setup: Setup,
) -> list[float]:
    """The loss, nats a token, of the model without each set of blocks; as many models at once as memory takes."""
    tokens = sum(batch.ids_BL.numel() for batch in batches)
    together = max(1, _HIDDEN_BYTES // max(1, 2 * tokens * graph.sizes["residual"] * setup.dtype.itemsize))
    losses: list[float] = []
    for begin in range(0, len(sets), together):
        own = sets[begin : begin + together]
        found: list[tuple[float, int]] = []
        order = [(batch, skipped) for skipped in own for batch in batches]

        def add(logits_BLV: Tensor, order: Any = order, found: list[tuple[float, int]] = found) -> None:
            found.append(_loss(order[len(found)][0], logits_BLV))

        for _ in stream(
            checkpoint,
            graph,
            [batch for batch, _ in order],
            measured={},
            replaced=lambda _: {},
            dtype=setup.dtype,
            device=setup.device,
            suspend=False,
            skipped=[skipped for _, skipped in order],
            logits=add,
        ):
            pass
        for number in range(len(own)):
            mine = found[number * len(batches) : (number + 1) * len(batches)]
            losses.append(sum(loss for loss, _ in mine) / max(1, sum(count for _, count in mine)))
    return losses


def _loss(batch: MicroBatch, logits_BLV: Tensor) -> tuple[float, int]:
    """Sum of -log p of the predicted tokens, and how many they are."""
    total, count = 0.0, 0
    for row, (ids_L, logits_LV) in enumerate(zip(batch.ids_BL, logits_BLV, strict=True)):
        length = len(ids_L) if batch.keep_BL is None else int(batch.keep_BL[row].sum())
        target_L = ids_L[1:length].to(logits_LV.device)
        total += float(cross_entropy(logits_LV[: length - 1].float(), target_L, reduction="sum"))
        count += length - 1
    return total, count
