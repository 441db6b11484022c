"""Statistics of the activations that a weight multiplies, accumulated in float32.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Statistics:
    """Second moments of the activations of one space in one block.

    gram_II = sum over tokens of x x^T, float32. `tokens` counts what was summed; for an expert, only the tokens
    that were routed to it. While it accumulates only the upper block triangle is filled; `finish` mirrors it.
    """

    columns: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tokens: int = 0
    gram_II: Tensor | None = None

    def add(self, x_TI: Tensor) -> None:
        """Add the tokens of one micro-batch, (T, I), any float dtype."""
        if self.gram_II is None:
            self.gram_II = torch.zeros((self.columns, self.columns), device=self.device)
        self.tokens += x_TI.shape[0]
        x = x_TI.float()
        step = max(128, self.columns // 8)
        for a in range(0, self.columns, step):
            target = self.gram_II[a : a + step, a:]
            torch.addmm(target, x[:, a : a + step].t(), x[:, a:], out=target)

    def finish(self) -> Statistics:
        """Make the matrix whole; to be called once, after the last token."""
        if self.gram_II is not None:
            step = max(128, self.columns // 8)
            for a in range(0, self.columns, step):
                b = min(a + step, self.columns)
                self.gram_II[b:, a:b] = self.gram_II[a:b, b:].t()
        return self


def output_energies(weight_OI: Tensor, decoded_OI: Tensor, gram_II: Tensor | None) -> tuple[float, float]:
    """||(W - W_hat) X||^2 and ||W X||^2 on the calibration tokens; without a Gram matrix X is the identity."""
    weight = weight_OI.float()
    delta = weight - decoded_OI.float()

    def energy(rows_OI: Tensor) -> float:
        projected = rows_OI if gram_II is None else rows_OI @ gram_II
        return float((projected * rows_OI).sum())

    return energy(delta), energy(weight)
