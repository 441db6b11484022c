"""The one loop that tunes: gradients move latents and values, codes settle, and the best that was seen is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from tersely.methods.tune.protocol import Motion, Progress, View

T = TypeVar("T")


@dataclass(frozen=True)
class Descent(Generic[T]):
    """What a descent found."""

    best: T
    before: float
    """The score at the start."""
    after: float
    """The score of the best: never above `before`."""
    losses: tuple[float, ...]
    """Of every step."""


def descend(
    views: Sequence[View],
    motion: Motion,
    *,
    steps: int,
    checks: int,
    backward: Callable[[int], float],
    score: Callable[[], float],
    keep: Callable[[], T],
    others: Sequence[tuple[Tensor, float]] = (),
    progress: Progress | None = None,
) -> Descent[T]:
    """Take `steps` steps, whose rates fall from the given ones to zero along half a cosine (signed: linearly).

    backward(step): add the gradients of a step's loss, and return the loss. score(): of what would be stored now, the
    smaller the better; asked at the start and `checks` times. keep(): a copy of what would be stored now; the result
    has the one with the best score, the start among them. others: tensors that move too, with their rates.
    """
    latents = [t for view in views for t in view.latents]
    values = [t for view in views for t in view.values]
    rated = [(latents, motion.rate), (values, motion.value_rate), *(([t], rate) for t, rate in others)]
    rated = [(tensors, rate) for tensors, rate in rated if tensors and rate > 0]
    best, before, losses = keep(), score(), []
    least = before
    if not rated or not steps:
        return Descent(best, before, before, ())
    decays = [motion.decay if tensors is latents else 0.0 for tensors, _ in rated]
    groups = [
        {"params": tensors, "lr": rate, "weight_decay": decay}
        for (tensors, rate), decay in zip(rated, decays, strict=True)
    ]
    optimizer = (
        torch.optim.SGD(groups) if motion.signed else torch.optim.AdamW(groups, betas=motion.betas, eps=motion.epsilon)
    )
    for step in range(steps):
        share = 1 - step / steps if motion.signed else (1 + math.cos(math.pi * step / steps)) / 2
        for group, (_, rate) in zip(optimizer.param_groups, rated, strict=True):
            group["lr"] = rate * share
        for view in views:
            view.begin(step / steps)
        optimizer.zero_grad()
        losses.append(backward(step))
        if motion.signed:
            for tensors, _ in rated:
                for tensor in tensors:
                    if tensor.grad is not None:
                        tensor.grad.sign_()
        optimizer.step()
        for view in views:
            view.settle(motion.limit, motion.forget)
        if progress is not None:
            progress(f"step {step + 1} of {steps}, loss {losses[-1]:.4g}", (step + 1) / steps)
        if (step + 1) * checks // steps > step * checks // steps:
            current = score()
            if current < least:
                best, least = keep(), current
    return Descent(best, before, least, tuple(losses))
