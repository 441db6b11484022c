"""A few columns of a weight, kept as they are: the inputs that no grid serves.

    w[:, index] = values, and 0 elsewhere

Shapes: O outputs, I inputs, K columns that are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class ColumnsForm:
    """Columns in the dtype of the weight, and their indices."""

    kind: ClassVar[str] = "columns"
    full_inputs: ClassVar[bool] = False

    count: int

    def nbytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:  # noqa: ARG002 (of the protocol)
        return self.count * (rows * dtype.itemsize + 4)

    def read(self, stored: Mapping[str, Tensor], rows: int, columns: int, dtype: torch.dtype) -> Columns:  # noqa: ARG002
        return Columns(stored["columns_values"], stored["columns_index"], columns)


@dataclass(frozen=True)
class Columns:
    """One part of an encoded weight: some of its columns."""

    values_OK: Tensor
    index_K: Tensor
    """int32, rising."""
    width: int
    """Inputs of the weight."""

    @property
    def form(self) -> ColumnsForm:
        return ColumnsForm(len(self.index_K))

    def decode(self) -> Tensor:
        """(O, I), zero but for these columns."""
        whole_OI = self.values_OK.new_zeros((len(self.values_OK), self.width))
        whole_OI[:, self.index_K.long()] = self.values_OK
        return whole_OI

    def tensors(self) -> dict[str, Tensor]:
        return {"columns_index": self.index_K, "columns_values": self.values_OK.contiguous()}

    def sample(self, start: int, step: int) -> Columns:
        """Every `step`-th output from `start`."""
        return Columns(self.values_OK[start::step], self.index_K, self.width)

    def split(self, rows: list[int]) -> list[Columns]:
        """Cut along the outputs; each piece keeps all indices."""
        return [Columns(values_OK, self.index_K, self.width) for values_OK in torch.split(self.values_OK, rows)]
