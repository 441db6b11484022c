"""MaskLLM: N:M masks that the whole model learns (Fang et al., NeurIPS 2024, arXiv 2409.17481).

Shapes: O outputs, I inputs, M consecutive inputs of a block, B blocks of a weight, C masks that a block may have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar, final

import torch
from torch import Tensor

from tersely.codecs import Encoded, Form, Scheme
from tersely.codecs.dense import Dense
from tersely.errors import UsageError
from tersely.methods.encode.masks import check_columns, numbers
from tersely.methods.tune.protocol import Motion, TuneModel, check_rates

_CANDIDATES = 128
"""Masks of a block, at most: 4:8 has 70."""
_COPIES_A_LOGIT = 6
"""A logit, its gradient, both averages of Adam, its probability, and what waits for the backward pass."""


@final
@dataclass(frozen=True)
class MaskLLM(TuneModel):
    """Learns which N of every M consecutive inputs are kept, for all weights at once; their values stay the source's.

    Each block of M weights has a logit for each of the C = M! / (N! (M - N)!) masks that it may have. In a step it runs
    with their mean under a softmax with Gumbel noise g, which hardens as the steps go on:

        p = softmax((sharpness logit + g) / temperature)        w_hat = w * sum over masks of p mask
        loss = KL(parent || model) - energy (1 - share) sum of w_hat^2        share: of the steps that are done

    temperature and sharpness change linearly from their first to their last value; the energy keeps what is left of
    the weights large, so that gradients do not vanish. What is stored, and scored, has the likeliest mask of each
    block. Logits begin at prior (s - N + 1), where s entries are kept both by the mask and by the sparsity that was
    there before: at first, the likeliest masks are those.

    Departures: the authors learn from the text itself (`loss = "text"`), and add noise to the first logits, which
    changes masks before anything is learned.
    """

    name: ClassVar[str] = "maskllm"

    tokens: int = 1_000_000
    batch: int = 1024
    pattern: str = "2:4"
    """How many of how many consecutive inputs are kept."""
    rate: float = 0.0015
    """Of the logits."""
    prior: float = 0.03
    """How far the first logit of a mask rises with each entry that it shares with the mask before."""
    temperature: float = 4.0
    """Of the softmax, at first."""
    last_temperature: float = 0.05
    sharpness: float = 100.0
    """Of the logits against the noise, at first."""
    last_sharpness: float = 500.0
    energy: float = 1e-5
    """How much large weights are worth, at first; falls to zero."""
    decay: float = 0.1
    """What logits lose in each step, relative to themselves and to the rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rates(rate=self.rate, prior=self.prior, energy=self.energy, decay=self.decay)
        for name in ("temperature", "last_temperature", "sharpness", "last_sharpness"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name}={getattr(self, name)}: expected more than 0")
        if (masks := math.comb(*reversed(numbers(self.pattern)))) > _CANDIDATES:
            raise UsageError(
                f"pattern={self.pattern!r}: a block may have {masks} masks, and each is learned; expected at most "
                f"{_CANDIDATES} (4:8 has 70)"
            )

    @property
    def motion(self) -> Motion:
        return Motion(self.rate, 0.0, betas=(0.9, 0.95), epsilon=1e-5, decay=self.decay, energy=self.energy)

    @property
    def copies(self) -> float:
        keep, m = numbers(self.pattern)
        return 4 + _COPIES_A_LOGIT * math.comb(m, keep) / m

    def check(self, columns: int, forms: Sequence[Form]) -> None:
        check_columns(self.pattern, columns)
        if not Scheme(tuple(forms)).unquantized:
            raise UsageError(
                f"{self.name} learns masks of weights that no step stores in fewer bits, and finds "
                f"{', '.join(form.kind for form in forms)}; let a sparsity step (wanda, sparsegpt ...) come before it, "
                "and quantize its result with keep_zeros=true"
            )

    def view(self, encoded: Encoded, weight_OI: Tensor, draw: torch.Generator) -> Masks:
        return Masks(encoded, weight_OI, self, draw)


@final
class Masks:
    """A weight whose mask moves; see MaskLLM."""

    def __init__(self, encoded: Encoded, weight_OI: Tensor, settings: MaskLLM, draw: torch.Generator) -> None:
        keep, m = numbers(settings.pattern)
        before_OI = encoded.decode()
        self._note, self._dtype = encoded.note, before_OI.dtype
        self._weight_OI, self._settings, self._draw = weight_OI.float(), settings, draw
        self._masks_CM = candidates(keep, m).to(weight_OI.device)
        kept_BM = (before_OI != 0).to(self._masks_CM).reshape(-1, m)
        self.logits_CB = (settings.prior * (self._masks_CM @ kept_BM.t() - (keep - 1))).requires_grad_()
        self.latents: tuple[Tensor, ...] = (self.logits_CB,)
        self.values: tuple[Tensor, ...] = ()
        self.begin(0.0)

    def begin(self, share: float) -> None:
        own = self._settings
        self._temperature = own.temperature + share * (own.last_temperature - own.temperature)
        self._sharpness = own.sharpness + share * (own.last_sharpness - own.sharpness)

    def mask(self) -> Tensor:
        """(O, I), soft: the entries of each block add up to N; with new noise each time."""
        noise_CB = torch.empty_like(self.logits_CB).exponential_(generator=self._draw).log_().neg_()
        likely_CB = ((self._sharpness * self.logits_CB + noise_CB) / self._temperature).softmax(0)
        return (self._masks_CM.t() @ likely_CB).t().reshape(self._weight_OI.shape)

    def moving(self) -> Tensor:
        return self._weight_OI * self.mask()

    def settle(self, limit: float, forget: float) -> None:
        pass

    @torch.no_grad()
    def stored(self) -> Encoded:
        kept_OI = self._masks_CM[self.logits_CB.argmax(0)].view(self._weight_OI.shape) > 0
        return Encoded((Dense(torch.where(kept_OI, self._weight_OI, 0).to(self._dtype)),), self._note)


def candidates(keep: int, m: int) -> Tensor:
    """Every mask, (C, M) float32 of zeros and ones, that keeps so many of m."""
    masks_CM = torch.zeros((math.comb(m, keep), m))
    for mask_M, kept in zip(masks_CM, combinations(range(m), keep), strict=True):
        mask_M[list(kept)] = 1
    return masks_CM
