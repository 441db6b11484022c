"""Next-token distributions compared: from the logits of a few tokens at a time to numbers of each token.

R = tokens worked on at once, V = vocabulary, C = columns compared (all, or those that two vocabularies share).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# Of one float32 R x V tensor. On a CPU what fits its cache is three times faster; an accelerator wants more.
CHUNK_BYTES_CPU, CHUNK_BYTES_ACCELERATOR = 4 * 2**20, 64 * 2**20
_TOP = 5
_TAME = 60.0
"""The exponential of a logit no larger than this, and sums of as many as any vocabulary has, are floats."""


@dataclass(frozen=True, eq=False)
class Distribution:
    """Of rows of logits z, R x C, in float32: e = exp(z - m), its sum over the columns, and log sum exp(z).

    m is 0, or, where a logit is so large or all are so small that exp would leave the range of floats, the row's
    largest.
    """

    logits_RC: Tensor
    weights_RC: Tensor
    sum_R: Tensor
    normalizer_R: Tensor


def cuts(tokens: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """A row of tokens in pieces of at most `rows_at_once`."""
    step = rows_at_once(vocabulary, device)
    return (slice(first, min(first + step, tokens)) for first in range(0, tokens, step))


def rows_at_once(vocabulary: int, device: torch.device) -> int:
    """How many tokens are worked on together."""
    nbytes = CHUNK_BYTES_CPU if device.type == "cpu" else CHUNK_BYTES_ACCELERATOR
    return max(1, nbytes // (4 * vocabulary))


def workspace(vocabulary: int, device: torch.device, count: int) -> list[Tensor]:
    """Memory that is used for one piece after another: fresh memory would cost as much as the arithmetic in it."""
    size = rows_at_once(vocabulary, device) * vocabulary
    return [torch.empty(size, device=device) for _ in range(count)]


def as_float32(values_RV: Tensor, space: Tensor) -> Tensor:
    """The values in float32: themselves, or a copy in the space."""
    return values_RV if values_RV.dtype == torch.float32 else _fit(space, values_RV).copy_(values_RV)


def distribution(logits_RC: Tensor, largest_R1: Tensor, space: Tensor) -> Distribution:
    """Exponentials, sums and normalizers. largest_R1: the largest logit of each row; space: room for R x C."""
    weights_RC = _fit(space, logits_RC)
    if bool((largest_R1.abs() <= _TAME).all()):
        torch.exp(logits_RC, out=weights_RC)
        sum_R = weights_RC.sum(-1)
        return Distribution(logits_RC, weights_RC, sum_R, sum_R.log())
    torch.sub(logits_RC, largest_R1, out=weights_RC).exp_()
    sum_R = weights_RC.sum(-1)
    return Distribution(logits_RC, weights_RC, sum_R, largest_R1.squeeze(1) + sum_R.log())


def divergence(base: Distribution, model: Distribution, space: Tensor) -> Tensor:
    """KL(base || model) of each row, nats, R:

        sum(e_base * (z_base - z)) / sum(e_base) - logsumexp(z_base) + logsumexp(z)

    Never negative: rounding would make it -1e-7 at times. Exactly 0 where the logits are equal.
    """
    apart_RC = torch.sub(base.logits_RC, model.logits_RC, out=_fit(space, base.logits_RC))
    kl_R = apart_RC.mul_(base.weights_RC).sum(-1) / base.sum_R - base.normalizer_R + model.normalizer_R
    return kl_R.clamp_(min=0)


def compare(
    logits: list[Tensor], targets: list[Tensor], columns: list[Tensor | None], space: list[Tensor]
) -> tuple[Tensor, ...]:
    """What needs whole distributions, R rows: loss; and against a base its loss among the shared columns, KL, the
    probability outside these, the five most likely columns of both, the true one, and the rank of the base's first
    where it is not among the model's five (else 0).

    logits, targets: of the model, and of the base if there is one; columns: those that they share, None for all;
    space: two of `workspace`.
    """
    tops = [top(each_RV) for each_RV in logits]
    found = [
        distribution(each_RV, each_RV.gather(1, top_RK[:, :1]), room)
        for each_RV, top_RK, room in zip(logits, tops, space, strict=False)
    ]
    losses = [
        each.normalizer_R - each.logits_RC.gather(1, t_R[:, None]).squeeze(1)
        for each, t_R in zip(found, targets, strict=True)
    ]
    if len(logits) == 1:
        return (losses[0],)
    truth_R, outside_R = targets[0], torch.zeros_like(losses[0])
    if columns[0] is not None and columns[1] is not None:
        whole_R = found[1].normalizer_R
        shared = [each_RV[:, own_C] for each_RV, own_C in zip(logits, (columns[0], columns[1]), strict=True)]
        tops = [top(each_RC) for each_RC in shared]
        found = [
            distribution(each_RC, each_RC.gather(1, top_RK[:, :1]), room)
            for each_RC, top_RK, room in zip(shared, tops, space, strict=True)
        ]
        outside_R = (1 - (found[1].normalizer_R - whole_R).exp()).clamp(0, 1)
        truth_R = torch.searchsorted(columns[0], truth_R)  # every id of a compared document is among the columns
        # Tokens that the model does not have take nothing of the base's probability: a trimmed model is not the better.
        losses[1] = found[1].normalizer_R - found[1].logits_RC.gather(1, truth_R[:, None]).squeeze(1)
    (model, base), (top_RK, base_top_RK) = found, tops
    rank_R = torch.zeros_like(truth_R)
    far_N = (top_RK != base_top_RK[:, :1]).all(1).nonzero().squeeze(1)
    if len(far_N):
        reached_N1 = model.logits_RC[far_N].gather(1, base_top_RK[far_N, :1])
        rank_R[far_N] = 1 + (model.logits_RC[far_N] > reached_N1).sum(-1)
    return (*losses, divergence(base, model, space[0]), outside_R, top_RK, base_top_RK, truth_R, rank_R)


def top(values_RC: Tensor) -> Tensor:
    """Columns of the five largest values of each row, largest first, R x 5.

    They lie in the five blocks of columns with the largest maxima; to look only there takes a third of the time.
    """
    count = min(_TOP, values_RC.shape[1])
    width = _block(values_RC.shape[1])
    if not width:
        return values_RC.topk(count, dim=-1).indices
    blocks_RNW = values_RC.reshape(len(values_RC), -1, width)
    best_RK = blocks_RNW.amax(-1).topk(count, dim=-1).indices
    inside_RKW = blocks_RNW.gather(1, best_RK[:, :, None].expand(-1, -1, width))
    place_RK = inside_RKW.flatten(1).topk(count, dim=-1).indices
    return best_RK.gather(1, place_RK // width) * width + place_RK % width


@lru_cache
def _block(columns: int) -> int:
    """A divisor of the number of columns near its root; 0 where there is none that helps."""
    root = math.isqrt(columns)
    near = [w for w in range(max(2, root // 8), 8 * root + 1) if columns % w == 0 and columns // w >= _TOP]
    return min(near, key=lambda w: abs(math.log(w / root)), default=0) if columns >= 512 else 0


def _fit(space: Tensor, like_RV: Tensor) -> Tensor:
    """As much of the space as has this shape."""
    return space.view(-1)[: like_RV.numel()].view(like_RV.shape)
