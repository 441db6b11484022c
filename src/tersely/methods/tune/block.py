"""Tune the parts of one block towards what it gave at full precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from tersely.codecs import Encoded
from tersely.graph import Graph, Weight
from tersely.methods.protocol import Work
from tersely.methods.tune.descent import Descent, descend
from tersely.methods.tune.protocol import Progress, TuneBlock
from tersely.methods.tune.trainable import Parts

T = TypeVar("T")


_RECORDED = 3
"""Hidden states that are held of every token: what a block gets, here and in the source, and what it should give."""
_COPIES = 12
"""Float32 copies of a tuned weight in memory: itself, where its latents began, how far they moved, their gradients, its
codes, those stored, those of the best, and what waits for the backward pass."""


def rounding_work(
    graph: Graph,
    tuned: Sequence[Weight],
    settings: TuneBlock,
    *,
    sequences: Sequence[int],
    micro: int,
    dtype: torch.dtype,
) -> Work:
    """What `tune_block` costs in all blocks together: sequences of so many tokens, forward, recomputed and back.

    memory counts the largest block as it runs in `dtype`, the copies of what is tuned of it, its Gram matrices, what is
    recorded of all sequences, and the activations of a micro-batch of `micro` tokens with gradients.
    """
    tokens, width = sum(sequences), dtype.itemsize
    parameters = sum(w.rows * w.columns for w in tuned)
    largest = 0
    for unit in graph.units:
        own = [w for w in tuned if w.unit == unit]
        linear = [w for w in graph.unit(unit) if w.kind == "linear"]
        block = width * sum(w.rows * w.columns for w in linear)
        copies = 4 * _COPIES * sum(w.rows * w.columns for w in own)
        grams = 4 * sum(columns**2 for columns in {w.statistics: w.columns for w in own}.values())
        activations = 3 * width * micro * sum(w.rows + w.columns for w in linear)
        largest = max(largest, block + copies + grams + activations if own else 0)
    recorded = _RECORDED * tokens * graph.sizes["residual"] * width
    flops = 4.0 * parameters * (tokens // len(sequences)) * settings.steps * settings.batch
    return Work(flops=flops, memory=largest + recorded)


def tune_block(
    forward: Callable[[Mapping[str, Tensor], T], Tensor],
    inputs: Sequence[T],
    targets: Sequence[Tensor],
    weights: Mapping[str, Tensor],
    encoded: Mapping[str, Encoded],
    settings: TuneBlock,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Descent[dict[str, Encoded]]:
    """The block's encoded weights, tuned; `best` is what they are now, the scores are mean squared errors.

    forward(weights, input): the block's output for one recorded input, with these float32 weights, (O, I), in place
    of its own; its gradients flow to them. inputs: recorded, one a sequence, of any type that forward takes (best
    those that the block gets in the compressed model). targets: the outputs at full precision. weights: what was
    encoded.
    """
    held = min(settings.held_out, len(inputs) - 1)
    tuned = range(len(inputs) - held)
    scored = range(len(inputs) - held, len(inputs)) if held else tuned
    sizes = [target.square().mean().item() for target in targets]
    unit = sum(sizes) / len(sizes) or 1.0
    motion = settings.motion
    views = {name: Parts(own, weights[name], motion.reach) for name, own in encoded.items()}
    order = torch.Generator().manual_seed(seed)

    def error(sequence: int) -> Tensor:
        output = forward({name: view.moving() for name, view in views.items()}, inputs[sequence])
        return (output.float() - targets[sequence].float()).square().mean()

    def backward(step: int) -> float:  # noqa: ARG001 (every step draws anew)
        drawn = torch.randperm(len(tuned), generator=order)[: settings.batch].tolist()
        total = 0.0
        for sequence in drawn:
            loss = error(sequence) / (len(drawn) * unit)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item() * unit
        return total

    @torch.no_grad()
    def score() -> float:
        return sum(error(sequence).item() for sequence in scored) / len(scored)

    with torch.enable_grad():
        return descend(
            list(views.values()),
            motion,
            steps=settings.steps,
            checks=settings.checks,
            backward=backward,
            score=score,
            keep=lambda: {name: view.stored() for name, view in views.items()},
            progress=progress,
        )
