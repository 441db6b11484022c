"""A weight as it is: what a method leaves that sets entries to zero, or changes them, and stores none in fewer bits.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class DenseForm:
    """Every value, in the dtype of the weight."""

    kind: ClassVar[str] = "dense"
    full_inputs: ClassVar[bool] = False

    density: float = 1.0
    """Share of the values that are not zero, where it is known beforehand."""

    def nbytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        return rows * columns * dtype.itemsize

    def read(self, stored: Mapping[str, Tensor], rows: int, columns: int, dtype: torch.dtype) -> Dense:
        weight_OI = stored["weight"]
        if weight_OI.shape != (rows, columns) or weight_OI.dtype != dtype:
            raise ValueError(f"a weight of {rows} x {columns} in {dtype} is expected")
        return Dense(weight_OI)


@dataclass(frozen=True)
class Dense:
    """The only part of a weight that keeps its dtype."""

    weight_OI: Tensor

    @property
    def form(self) -> DenseForm:
        return DenseForm()

    def decode(self) -> Tensor:
        """The weight itself, (O, I)."""
        return self.weight_OI

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight_OI.contiguous()}

    def sample(self, start: int, step: int) -> Dense:
        """Every `step`-th output from `start`."""
        return Dense(self.weight_OI[start::step])

    def split(self, rows: list[int]) -> list[Dense]:
        """Cut along the outputs."""
        return [Dense(weight_OI) for weight_OI in torch.split(self.weight_OI, rows)]
