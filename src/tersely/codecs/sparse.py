"""Sparse parts: few values at arbitrary places, zero elsewhere, in compressed rows (CSR).

Shapes: O outputs, I inputs, N values, P = O + 1 pointers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from tersely.errors import UsageError


@dataclass(frozen=True)
class SparseForm:
    """Values in the weight's dtype, their columns, and where each row starts among them."""

    kind: ClassVar[str] = "sparse"
    full_inputs: ClassVar[bool] = False

    density: float
    """Values per weight; round(density * rows * columns) of them are stored."""

    def count(self, rows: int, columns: int) -> int:
        """How many values a weight of this shape has."""
        return round(self.density * rows * columns)

    def nbytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        count = self.count(rows, columns)
        return count * (dtype.itemsize + _narrowest(columns - 1).itemsize) + (rows + 1) * _narrowest(count).itemsize

    def read(self, stored: Mapping[str, Tensor], rows: int, columns: int, dtype: torch.dtype) -> Sparse:
        values, places, pointers = (stored[f"weight_sparse_{leaf}"] for leaf in ("values", "columns", "rows"))
        count = self.count(rows, columns)
        if values.shape != (count,) or places.shape != (count,) or pointers.shape != (rows + 1,):
            raise ValueError(f"{count} sparse values in {rows} rows are expected")
        if values.dtype != dtype or int(pointers[0]) or int(pointers[-1]) != count or bool((pointers.diff() < 0).any()):
            raise ValueError("the rows of its sparse values do not fit together")
        if count and not (int(places.min()) >= 0 and int(places.max()) < columns):
            raise ValueError(f"a sparse value lies outside its {columns} columns")
        return Sparse(values, places, pointers, columns)


@dataclass(frozen=True)
class Sparse:
    """One part of an encoded weight: zero but for some values."""

    values_N: Tensor
    """In the weight's dtype, row by row, columns ascending."""
    columns_N: Tensor
    """int16, or int32 where the inputs need it."""
    pointers_P: Tensor
    """Row o holds the values pointers[o] to pointers[o + 1] - 1; int16 or int32."""
    columns: int
    """Inputs."""

    @property
    def rows(self) -> int:
        """Outputs."""
        return len(self.pointers_P) - 1

    @property
    def form(self) -> SparseForm:
        return SparseForm(len(self.values_N) / (self.rows * self.columns))

    def decode(self) -> Tensor:
        """The weight, (O, I), in its dtype."""
        weight_OI = self.values_N.new_zeros((self.rows, self.columns))
        weight_OI[self._rows(), self.columns_N.long()] = self.values_N
        return weight_OI

    def tensors(self) -> dict[str, Tensor]:
        """Stored form: values, columns and row pointers."""
        return {
            "weight_sparse_values": self.values_N,
            "weight_sparse_columns": self.columns_N,
            "weight_sparse_rows": self.pointers_P,
        }

    def sample(self, start: int, step: int) -> Sparse:
        """Every `step`-th output from `start`."""
        return self._select(torch.arange(start, self.rows, step, device=self.values_N.device))

    def split(self, rows: list[int]) -> list[Sparse]:
        """Cut along the outputs."""
        ends = list(accumulate(rows))
        device = self.values_N.device
        return [self._select(torch.arange(a, b, device=device)) for a, b in zip([0, *ends], ends, strict=False)]

    def _rows(self) -> Tensor:
        """The row of every value."""
        lengths = self.pointers_P.long().diff()
        return torch.repeat_interleave(torch.arange(self.rows, device=lengths.device), lengths)

    def _select(self, rows: Tensor) -> Sparse:
        held = self._rows()
        place = torch.full((self.rows,), -1, device=held.device)
        place[rows] = torch.arange(len(rows), device=held.device)
        keep = place[held] >= 0
        return _compressed(self.values_N[keep], place[held[keep]], self.columns_N[keep], len(rows), self.columns)


def sparse(values_N: Tensor, kept_OI: Tensor) -> Sparse:
    """The values at the places where a mask holds, in the order of `Tensor.nonzero`: row by row."""
    rows_N, columns_N = kept_OI.nonzero(as_tuple=True)
    return _compressed(values_N, rows_N, columns_N, *kept_OI.shape)


def check_density(name: str, density: float) -> None:
    """UsageError for a share of the weights that is none."""
    if not 0 <= density <= 1:
        raise UsageError(f"{name}={density}: a share of the weights is expected, 0 to 1 (0.005 is half a percent)")


def _compressed(values_N: Tensor, rows_N: Tensor, columns_N: Tensor, rows: int, columns: int) -> Sparse:
    counts = torch.bincount(rows_N, minlength=rows)
    pointers = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(_narrowest(len(values_N)))
    return Sparse(values_N, columns_N.to(_narrowest(columns - 1)), pointers, columns)


def _narrowest(largest: int) -> torch.dtype:
    return torch.int16 if largest <= torch.iinfo(torch.int16).max else torch.int32
