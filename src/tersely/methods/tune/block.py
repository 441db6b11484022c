"""Tune the parts of one block towards what it gave at full precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from tersely.codecs import Encoded
from tersely.graph import Weight
from tersely.methods.protocol import Work
from tersely.methods.tune.descent import Descent, descend
from tersely.methods.tune.protocol import Progress, TuneBlock
from tersely.methods.tune.trainable import encoded as stored
from tersely.methods.tune.trainable import trainable, weight

T = TypeVar("T")


def rounding_work(tuned: Sequence[Weight], settings: TuneBlock, *, context: int) -> Work:
    """What `tune_block` costs in all blocks together: sequences of `context` tokens, forward, recomputed and back."""
    parameters = sum(w.rows * w.columns for w in tuned)
    return Work(flops=4.0 * parameters * context * settings.steps * settings.batch)


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
    views = {name: trainable(own, weights[name], motion.reach) for name, own in encoded.items()}
    order = torch.Generator().manual_seed(seed)

    def error(sequence: int) -> Tensor:
        output = forward({name: weight(own) for name, own in views.items()}, inputs[sequence])
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
            [view for own in views.values() for view in own],
            motion,
            steps=settings.steps,
            checks=settings.checks,
            backward=backward,
            score=score,
            keep=lambda: {name: stored(own, encoded[name].note) for name, own in views.items()},
            progress=progress,
        )
