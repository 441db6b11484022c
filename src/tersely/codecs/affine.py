"""Integers of 2 to 8 bits with a scale and a real-valued zero point per group of inputs.

    w = scale * (code - zero)        code in 0 .. 2^bits - 1, zero any number

Shapes: O outputs, I inputs, G groups per row (I / group). The scale has the weight's dtype; so has the zero point, but
float16 where that is bfloat16, whose 8 bits would round a zero point by up to a quarter of a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from tersely.codecs.integer import pack, unpack


@dataclass(frozen=True)
class AffineForm:
    """Integer codes with real-valued zero points; group 0: all inputs of an output share a scale."""

    kind: ClassVar[str] = "affine"
    full_inputs: ClassVar[bool] = False

    bits: int
    group: int

    def nbytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        groups = columns // self.group if self.group else 1
        grid = dtype.itemsize + zero_dtype(dtype).itemsize
        return 4 * rows * -(-columns * self.bits // 32) + rows * groups * grid

    def read(self, stored: Mapping[str, Tensor], rows: int, columns: int, dtype: torch.dtype) -> Affine:
        codes = unpack(stored["weight_affine_packed"], self.bits, columns)
        scale, zero = stored["weight_affine_scale"], stored["weight_affine_zero"]
        groups = columns // (self.group or columns)
        if codes.shape != (rows, columns) or scale.shape != (rows, groups) or zero.shape != (rows, groups):
            raise ValueError(f"codes of {rows} rows and {columns} columns in {groups} groups are expected")
        if scale.dtype != dtype or zero.dtype != zero_dtype(dtype):
            raise ValueError(f"a scale in {dtype} and a zero point in {zero_dtype(dtype)} are expected")
        return Affine(codes, scale, zero, self)


@dataclass(frozen=True)
class Affine:
    """One part of an encoded weight: integer codes on a grid that need not hold zero."""

    codes_OI: Tensor
    """uint8, 0 .. 2^bits - 1."""
    scale_OG: Tensor
    """In the weight's dtype."""
    zero_OG: Tensor
    """In `zero_dtype` of it."""
    form: AffineForm

    def decode(self) -> Tensor:
        """The weight, (O, I): computed in float32, rounded to the scale's dtype."""
        rows, groups = self.scale_OG.shape
        codes = self.codes_OI.reshape(rows, groups, -1).float()
        codes.sub_(self.zero_OG[:, :, None].float()).mul_(self.scale_OG[:, :, None].float())
        return codes.view(rows, -1).to(self.scale_OG.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Stored form: packed codes, scales, zero points."""
        return {
            "weight_affine_packed": pack(self.codes_OI, self.form.bits),
            "weight_affine_scale": self.scale_OG,
            "weight_affine_zero": self.zero_OG,
        }

    def sample(self, start: int, step: int) -> Affine:
        """Every `step`-th output from `start`."""
        return self._rows(slice(start, None, step))

    def split(self, rows: list[int]) -> list[Affine]:
        """Cut along the outputs."""
        ends = list(accumulate(rows))
        return [self._rows(slice(a, b)) for a, b in zip([0, *ends], ends, strict=False)]

    def _rows(self, rows: slice) -> Affine:
        return Affine(self.codes_OI[rows], self.scale_OG[rows], self.zero_OG[rows], self.form)


def zero_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which the zero points of a weight of this dtype are stored."""
    return torch.float16 if dtype == torch.bfloat16 else dtype
