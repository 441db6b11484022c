"""A weight with many zeros: one bit a weight says where the others are, and these follow.

Shapes: O outputs, I inputs, N values, B = ceil(I / 8) bytes of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersely.codecs.dense import Dense, DenseForm

_BITS = 8


@dataclass(frozen=True)
class BitmaskForm:
    """The mask, lowest bit first, each row in bytes of its own; and the values in the weight's dtype, row by row."""

    kind: ClassVar[str] = "bitmask"
    full_inputs: ClassVar[bool] = False

    density: float
    """Values per weight; round(density * rows * columns) of them are stored."""

    def count(self, rows: int, columns: int) -> int:
        """How many values a weight of this shape has."""
        return round(self.density * rows * columns)

    def nbytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        return rows * -(-columns // _BITS) + self.count(rows, columns) * dtype.itemsize

    def read(self, stored: Mapping[str, Tensor], rows: int, columns: int, dtype: torch.dtype) -> Bitmask:
        bytes_OB, values_N = stored["weight_bitmask"], stored["weight_values"]
        if bytes_OB.shape != (rows, -(-columns // _BITS)) or bytes_OB.dtype != torch.uint8:
            raise ValueError(f"a bit for each of {rows} x {columns} weights is expected")
        part = Bitmask(bytes_OB, values_N, columns)
        if values_N.dtype != dtype or values_N.shape != (self.count(rows, columns),):
            raise ValueError(f"{self.count(rows, columns)} values in {dtype} are expected")
        if int(part.mask().sum()) != len(values_N):
            raise ValueError("the mask has another number of values than are stored")
        return part


@dataclass(frozen=True)
class Bitmask:
    """One part of an encoded weight: zero where its mask is."""

    bytes_OB: Tensor
    """uint8."""
    values_N: Tensor
    """In the weight's dtype, row by row, columns ascending."""
    columns: int
    """Inputs."""

    @property
    def form(self) -> BitmaskForm:
        return BitmaskForm(len(self.values_N) / (len(self.bytes_OB) * self.columns))

    def mask(self) -> Tensor:
        """(O, I) bool."""
        bits = torch.stack([(self.bytes_OB >> n) & 1 for n in range(_BITS)], dim=-1)
        return bits.view(len(self.bytes_OB), -1)[:, : self.columns].bool()

    def decode(self) -> Tensor:
        """The weight, (O, I), in its dtype."""
        mask_OI = self.mask()
        return self.values_N.new_zeros(mask_OI.shape).masked_scatter_(mask_OI, self.values_N)

    def tensors(self) -> dict[str, Tensor]:
        """Stored form: the mask and the values."""
        return {"weight_bitmask": self.bytes_OB.contiguous(), "weight_values": self.values_N.contiguous()}

    def sample(self, start: int, step: int) -> Bitmask:
        """Every `step`-th output from `start`."""
        return masked(self.decode()[start::step])

    def split(self, rows: list[int]) -> list[Bitmask]:
        """Cut along the outputs."""
        pieces = torch.split(self.mask().sum(1), rows)
        values = torch.split(self.values_N, [int(counts.sum()) for counts in pieces])
        return [Bitmask(b, v, self.columns) for b, v in zip(torch.split(self.bytes_OB, rows), values, strict=True)]


def smallest_form(form: DenseForm, rows: int, columns: int, dtype: torch.dtype) -> DenseForm | BitmaskForm:
    """The form in which a weight of this density takes the fewest bytes."""
    mask = BitmaskForm(form.density)
    return mask if mask.nbytes(rows, columns, dtype) < form.nbytes(rows, columns, dtype) else form


def smallest(weight_OI: Tensor) -> Dense | Bitmask:
    """A weight in that form, by its own zeros."""
    rows, columns = weight_OI.shape
    density = int((weight_OI != 0).sum()) / weight_OI.numel()
    form = smallest_form(DenseForm(density), rows, columns, weight_OI.dtype)
    return masked(weight_OI) if isinstance(form, BitmaskForm) else Dense(weight_OI)


def masked(weight_OI: Tensor) -> Bitmask:
    """A weight with its zeros left out."""
    mask_OI = weight_OI != 0
    columns = weight_OI.shape[1]
    padded = torch.nn.functional.pad(mask_OI.to(torch.uint8), (0, -columns % _BITS)).view(len(mask_OI), -1, _BITS)
    bytes_OB = torch.zeros_like(padded[:, :, 0])
    for n in range(_BITS):
        bytes_OB |= padded[:, :, n] << n
    return Bitmask(bytes_OB, weight_OI[mask_OI], columns)
