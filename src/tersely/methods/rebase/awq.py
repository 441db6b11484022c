"""AWQ: scale up the inputs that matter before rounding (Lin et al., MLSys 2024, arXiv 2306.00978).

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersely.bases import Diagonal
from tersely.codecs import IntegerForm
from tersely.codecs.integer import Clip, check_grid, check_group, fit_grid, round_to_grid
from tersely.errors import UsageError
from tersely.measure import Statistics

_FLOOR = 1e-4


@dataclass(frozen=True)
class AWQ:
    """Multiply the columns that large activations meet by s before they are rounded, and divide the activations by it.

    s = a^alpha / sqrt(max s min s),  a_j = mean |x_j|,  alpha from 0, 1/steps, ... that loses least, where rounding to
    nearest on the grid below stands for whatever rounds afterwards

    The loss is the error of the outputs of all weights that read the space, through the Gram matrix of its activations
    (the authors take the error of the whole attention or MLP module). `bits`, `group`, `symmetric` and `clip` should be
    those of the step that encodes.
    """

    name: ClassVar[str] = "awq"
    needs: ClassVar[frozenset[str]] = frozenset({"gram", "absmean"})

    bits: int = 4
    group: int = 128
    symmetric: bool = False
    clip: Clip = "none"
    steps: int = 20
    """How many alphas from 0 up are tried; 1 itself is not."""

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group, self.clip)
        if self.steps < 1:
            raise UsageError(f"steps={self.steps}: at least 1 is expected")

    def check(self, columns: int) -> None:
        check_group(self.group, columns)

    def __call__(self, readers: Sequence[Tensor], stats: Statistics, seed: int) -> Diagonal:  # noqa: ARG002 (protocol)
        mean_I, gram_II = stats.absmean_I, stats.gram_II
        if mean_I is None or gram_II is None:
            return Diagonal(torch.ones(stats.columns))
        weight_OI = torch.cat([w.float() for w in readers])
        candidates = [self._scale(mean_I, step / self.steps) for step in range(self.steps)]
        losses = [self._loss(weight_OI, scale_I, gram_II) for scale_I in candidates]
        return Diagonal(1 / candidates[losses.index(min(losses))])

    @staticmethod
    def _scale(mean_I: Tensor, alpha: float) -> Tensor:
        scale_I = mean_I.pow(alpha).clamp(min=_FLOOR)
        return scale_I / (scale_I.max() * scale_I.min()).sqrt()

    def _loss(self, weight_OI: Tensor, scale_I: Tensor, gram_II: Tensor) -> float:
        scaled_OI = weight_OI * scale_I
        scale, zero = fit_grid(
            scaled_OI,
            bits=self.bits,
            group=self.group,
            symmetric=self.symmetric,
            clip=self.clip,
            scale_dtype=torch.float32,
        )
        form = IntegerForm(self.bits, self.group, self.symmetric)
        delta_OI = weight_OI - round_to_grid(scaled_OI, scale, zero, form).decode() / scale_I
        return float((delta_OI @ gram_II * delta_OI).sum())
