"""Gradients of the loss by the stored weights, with the weights of one block in memory at a time.

    loss = mean over a sequence's predicted tokens of -log p(token)

Shapes: O outputs, I inputs of a weight, L tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tersely.checkpoint import Checkpoint
from tersely.errors import UsageError
from tersely.graph import Graph, Weight
from tersely.stream.backward import Run
from tersely.stream.sums import Gradient, Sums

STORED_BYTES = 512_000_000
"""Of what comes to the blocks, for the sequences that go through the model together (one sequence at least)."""
LOGITS_BYTES = 64_000_000
"""Of the logits that are computed together."""
BOTH = frozenset({"gradient", "fisher"})
_EXPERTS_A_TOKEN = 8
"""At most, in what is estimated."""


def gradients(
    checkpoint: Checkpoint,
    graph: Graph,
    sequences: Sequence[Tensor],
    *,
    wanted: Collection[str],
    device: torch.device,
    needs: Collection[str] = BOTH,
    dtype: torch.dtype = torch.float32,
    stored_bytes: int = STORED_BYTES,
    logits_bytes: int = LOGITS_BYTES,
) -> Iterator[tuple[str, Mapping[str, Gradient]]]:
    """The gradients of the loss by the wanted weights (stored names), unit by unit, on the device.

    sequences: token ids, (L,) int64, at least two each; each runs by itself. needs: "gradient", "fisher" or both.
    dtype: in which the model runs. Memory is what `gradient_bytes` says.

    Yields units that hold wanted weights, the last block first. The unit "" comes before all blocks with a head that is
    not the embedding, and after them with what else lies outside the blocks.

    UsageError: no sequences, or a model without a next-token loss; CheckpointError: a loss that is not finite.
    """
    _require_loss(graph)
    if not sequences:
        raise UsageError("the gradients of the loss need calibration text; give at least one sequence")
    sums = Sums(len(sequences), frozenset(needs))
    run = Run(checkpoint, graph, frozenset(wanted), sums, device, dtype, logits_bytes)
    groups = _groups(graph, [len(ids_L) for ids_L in sequences], dtype, stored_bytes)
    for group in groups:
        courses = [run.course(i, sequences[i]) for i in group]
        for unit, names in run.through(courses):
            if group is groups[-1] and names:
                yield unit, run.take(names)


def gradient_bytes(
    graph: Graph,
    weights: Collection[str],
    lengths: Sequence[int],
    *,
    needs: Collection[str] = BOTH,
    dtype: torch.dtype = torch.float32,
    stored_bytes: int = STORED_BYTES,
    logits_bytes: int = LOGITS_BYTES,
    held: bool = False,
) -> int:
    """Memory that `gradients` needs at most, about. lengths: tokens of each sequence; held: whether who reads it keeps
    what he gets.

    What comes to the blocks, and the larger of two: one block, the gradient of one of its parameters and what it leaves
    behind for one sequence; or the head and some logits. With them the results: of one unit, or where `stored_bytes`
    makes more than one group of the sequences, of all wanted weights, which add up over the groups. UsageError: a model
    without a next-token loss.
    """
    _require_loss(graph)
    longest, itemsize = max(lengths), dtype.itemsize
    groups = _groups(graph, lengths, dtype, stored_bytes)
    stored = _token_bytes(graph, dtype) * max(sum(lengths[i] for i in group) for group in groups)
    units = {unit: graph.parameters(unit) for unit in graph.units}
    wanted = [graph.weight(name) for name in weights]
    results = {unit: 4 * len(needs) * sum(_numel(w) for w in wanted if w.unit == unit) for unit in ("", *graph.units)}
    block = max(sum(_numel(w) for w in graph.unit(unit)) for unit in units) * itemsize
    parameters = [pieces for named in units.values() for pieces in named.values()]
    own = [pieces for pieces in parameters if any(piece.weight.name in weights for piece in pieces)]
    gradient = 2 * itemsize * max((sum(_numel(piece.weight) for piece in pieces) for pieces in own), default=0)
    left = max(_left_behind(graph, unit) for unit in units) * longest * itemsize
    largest = max(results[unit] for unit in units)
    head = graph.head or max((w for w in graph.unit("") if w.kind == "lookup"), key=_numel)
    logits = min(logits_bytes, 4 * longest * head.rows)
    outside = _numel(head) * itemsize * (3 if head.name in weights else 1) + 4 * logits
    if held or len(groups) > 1:
        return stored + sum(results.values()) + max(block + gradient + left, outside)
    return stored + results[""] + max(block + gradient + left + largest, outside)


def _require_loss(graph: Graph) -> None:
    """UsageError for a model without a next-token loss."""
    if graph.family.auto_class not in ("CausalLM", "Seq2SeqLM"):
        raise UsageError(
            f"a {graph.model_type} model predicts masked tokens, and gradients are taken of the loss of next tokens; "
            "choose a method that needs no Fisher information"
        )


def _groups(graph: Graph, lengths: Sequence[int], dtype: torch.dtype, stored_bytes: int) -> list[list[int]]:
    """Which sequences go through the model together, in order."""
    groups: list[list[int]] = []
    room = 0
    for i, length in enumerate(lengths):
        needed = length * _token_bytes(graph, dtype)
        if not groups or needed > room:
            groups.append([])
            room = stored_bytes
        groups[-1].append(i)
        room -= needed
    return groups


def _token_bytes(graph: Graph, dtype: torch.dtype) -> int:
    """What comes to all blocks, of one token."""
    return len(graph.units) * graph.sizes["residual"] * dtype.itemsize


def _left_behind(graph: Graph, unit: str) -> int:
    """Numbers that a block keeps of a token until its gradients are there."""
    weights = [w for w in graph.unit(unit) if w.kind == "linear"]
    share = min(1.0, _EXPERTS_A_TOKEN / max(1, len({w.expert for w in weights} - {None})))
    # Inputs and outputs of the weights, and what norms, rotations, activation functions and gradients add.
    return sum(round(6 * (w.rows + w.columns) * (1 if w.expert is None else share)) for w in weights)


def _numel(weight: Weight) -> int:
    return weight.spec.nbytes // weight.spec.dtype.itemsize
