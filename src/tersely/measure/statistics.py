"""Statistics of the activations that a weight multiplies, accumulated in float32.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

MEASURES = {
    "gram": "sum over tokens of x x^T",
    "absmax": "largest |x| of each input",
    "absmean": "mean |x| of each input",
    "mean": "mean of each input",
    "square": "mean square of each input",
    "activity": "sum over sequences of (mean over tokens of |x|)^2, of each input",
    "inputs": "x of every token itself",
    "routed": "of an expert: mean over all tokens of the size of what it adds, its router's weight included",
    "fisher": "mean over sequences of the squared gradient of the loss by each weight",
}
"""What a method can ask the engine to measure."""


@dataclass
class Statistics:
    """What is known of the activations of one space in one block.

    `tokens` counts what was summed; for an expert, only the tokens that were routed to it. While it accumulates only
    the upper block triangle of the Gram matrix is filled; `finish` mirrors it.
    """

    columns: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    needs: frozenset[str] = frozenset({"gram"})
    """Which of the activations' MEASURES are gathered."""
    tokens: int = 0
    gram_II: Tensor | None = None
    """Sum over tokens of x x^T, float32."""
    absmax_I: Tensor | None = None
    """Largest |x| of each input, float32."""
    abssum_I: Tensor | None = None
    """Sum over tokens of |x|, float32."""
    sum_I: Tensor | None = None
    """Sum over tokens of x, float32."""
    squares_I: Tensor | None = None
    """Sum over tokens of x^2, float32."""
    activity_I: Tensor | None = None
    """Sum over sequences of the squared mean of |x|, float32; what reaches an expert counts as one sequence for each
    micro-batch."""
    inputs: list[Tensor] = field(default_factory=list)
    """x of the tokens of each sequence, (T, I), as they came."""
    routed: float = 0.0
    """Sum over tokens of the norm of what the expert adds."""
    reads_O: Tensor | None = None
    """Of a table: how often each of its rows was looked up, float32."""
    fisher_OI: Tensor | None = None
    """Of the weight itself: mean over sequences of the squared gradient of the loss, float32."""
    kept_OI: Tensor | None = None
    """Of the weight itself, bool: where it may differ from zero; None: everywhere."""

    @property
    def mean_I(self) -> Tensor | None:
        """Mean over tokens of x, float32."""
        return None if self.sum_I is None or not self.tokens else self.sum_I / self.tokens

    @property
    def absmean_I(self) -> Tensor | None:
        """Mean over tokens of |x|, float32."""
        return None if self.abssum_I is None or not self.tokens else self.abssum_I / self.tokens

    def add(self, x_TI: Tensor, lengths: Sequence[int] | None = None) -> None:
        """Add the tokens of one micro-batch, (T, I), any float dtype; lengths: of its sequences, one after another
        (None: all are one)."""
        self.tokens += x_TI.shape[0]
        if "inputs" in self.needs:
            self.inputs += torch.split(x_TI, list(lengths or [len(x_TI)]))
        x = x_TI.float()
        if "gram" in self.needs:
            self._add_gram(x)
        if x.shape[0] and self.needs & {"absmax", "absmean"}:
            size = x.abs()
            if "absmax" in self.needs:
                largest = size.amax(0)
                self.absmax_I = largest if self.absmax_I is None else torch.maximum(self.absmax_I, largest)
            if "absmean" in self.needs:
                total = size.sum(0)
                self.abssum_I = total if self.abssum_I is None else self.abssum_I + total
        if x.shape[0] and "mean" in self.needs:
            self.sum_I = x.sum(0) if self.sum_I is None else self.sum_I + x.sum(0)
        if x.shape[0] and "square" in self.needs:
            squares = x.square().sum(0)
            self.squares_I = squares if self.squares_I is None else self.squares_I + squares
        if x.shape[0] and "activity" in self.needs:
            each = torch.stack([own.abs().mean(0) for own in torch.split(x, list(lengths or [len(x)])) if len(own)])
            activity = each.square().sum(0)
            self.activity_I = activity if self.activity_I is None else self.activity_I + activity

    def _add_gram(self, x_TI: Tensor) -> None:
        if self.gram_II is None:
            self.gram_II = torch.zeros((self.columns, self.columns), device=self.device)
        step = max(128, self.columns // 8)
        for a in range(0, self.columns, step):
            target = self.gram_II[a : a + step, a:]
            torch.addmm(target, x_TI[:, a : a + step].t(), x_TI[:, a:], out=target)

    def rescaled(self, scale_I: Tensor) -> Statistics:
        """Of the same activations times a scale, (I,)."""
        size = scale_I.abs()
        return replace(
            self,
            gram_II=None if self.gram_II is None else self.gram_II * scale_I * scale_I[:, None],
            absmax_I=None if self.absmax_I is None else self.absmax_I * size,
            abssum_I=None if self.abssum_I is None else self.abssum_I * size,
            sum_I=None if self.sum_I is None else self.sum_I * scale_I,
            squares_I=None if self.squares_I is None else self.squares_I * size.square(),
            activity_I=None if self.activity_I is None else self.activity_I * size.square(),
        )

    def finish(self) -> Statistics:
        """Make the Gram matrix whole; to be called once, after the last token."""
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
