"""Gradients of the loss by stored weights, added up over sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersely.graph import Weight


@dataclass(frozen=True, eq=False)
class Gradient:
    """Means over sequences; float32, (O, I), or as stored where the weight is a vector. None: not asked for."""

    mean: Tensor | None
    """Of the gradient."""
    square: Tensor | None
    """Of its square, each sequence's gradient squared by itself: the diagonal of the empirical Fisher information."""


class Sums:
    """What adds up over sequences, by stored name."""

    def __init__(self, sequences: int, needs: frozenset[str]) -> None:
        self._share, self._needs = 1 / sequences, needs
        self._sums: dict[tuple[str, str], Tensor] = {}

    def add(self, weight: Weight, gradient: Tensor, rows_U: Tensor | None = None) -> None:
        """The gradient of one sequence, as stored; rows_U: those that it is of, each once, if not of all."""
        own = (gradient.t() if weight.transposed else gradient).float()
        for need in self._needs:
            total = self._total(need, weight, own.device)
            if rows_U is not None:
                total[rows_U] += (own if need == "gradient" else own.square()) * self._share
            elif need == "gradient":
                total.add_(own, alpha=self._share)
            else:
                total.addcmul_(own, own, value=self._share)

    def take(self, weight: Weight, device: torch.device) -> Gradient:
        for need in self._needs:
            self._total(need, weight, device)
        return Gradient(self._sums.pop(("gradient", weight.name), None), self._sums.pop(("fisher", weight.name), None))

    def _total(self, need: str, weight: Weight, device: torch.device) -> Tensor:
        if (need, weight.name) not in self._sums:
            shape = tuple(reversed(weight.spec.shape)) if weight.transposed else weight.spec.shape
            self._sums[need, weight.name] = torch.zeros(shape, device=device)
        return self._sums[need, weight.name]
