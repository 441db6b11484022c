"""Integers of 1 to 8 bits as bit planes, and their exact products from products of single bits ("bipolar-INT").

The n bits of a code stand for +1 or -1, which leaves neither a sign nor a zero to be treated apart (arXiv 2409.17870):

    v = sum_i (2 bit_i - 1) 2^i = 2 code - (2^n - 1)         odd, -(2^n - 1) .. 2^n - 1; -v is NOT code
    u v = sum_ij 2^(i + j) (bit i of u, as +-1) (bit j of v, as +-1)

Every integer grid is such a v with a scale and a shift: w = scale (code - zero) = scale / 2 (v + 2^n - 1 - 2 zero).

Shapes: O outputs, I inputs, G groups per row, T tokens, R rows, N bits, M words of 32 columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tersely.codecs.integer import IntegerForm, Integers, pack, unpack

Grid = Literal["bipolar", "symmetric", "asymmetric"]
GRIDS: tuple[Grid, ...] = ("bipolar", "symmetric", "asymmetric")
_CHUNK = 1 << 22
"""Words that are compared at once."""


@dataclass(frozen=True)
class PlanesForm:
    """Integer codes as bit planes; group 0: all inputs of an output share a scale.

    grid "bipolar": w = scale v, the only one with a single bit; "symmetric" and "asymmetric": w = scale (code - zero),
    those of `Integers`.
    """

    kind: ClassVar[str] = "planes"
    full_inputs: ClassVar[bool] = False

    bits: int
    group: int
    grid: Grid

    def nbytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        groups = columns // self.group if self.group else 1
        zeros = rows * groups if self.grid == "asymmetric" else 0
        return 4 * rows * self.bits * -(-columns // 32) + rows * groups * dtype.itemsize + zeros

    def read(self, stored: Mapping[str, Tensor], rows: int, columns: int, dtype: torch.dtype) -> Planes:  # noqa: ARG002
        zero = stored["weight_planes_zero"] if self.grid == "asymmetric" else None
        codes = join_planes(stored["weight_planes"], columns)
        return Planes(codes, stored["weight_planes_scale"], zero, self)


@dataclass(frozen=True)
class Planes:
    """One part of an encoded weight: integer codes that are stored bit by bit."""

    codes_OI: Tensor
    """uint8, 0 .. 2^bits - 1."""
    scale_OG: Tensor
    """In the dtype in which it is stored."""
    zero_OG: Tensor | None
    """uint8; only on an asymmetric grid."""
    form: PlanesForm

    def decode(self) -> Tensor:
        """The weight, (O, I), in the scale's dtype."""
        if self.form.grid != "bipolar":
            return integers_of(self).decode()
        rows, columns = self.codes_OI.shape
        values = to_bipolar(self.codes_OI, self.form.bits).view(rows, self.scale_OG.shape[1], -1)
        return values.to(self.scale_OG.dtype).mul_(self.scale_OG[:, :, None]).view(rows, columns)

    def tensors(self) -> dict[str, Tensor]:
        """Words of 32 inputs, (O, N, M) int32 with the lowest bit's plane first; scales; zero points."""
        stored = {
            "weight_planes": slice_planes(self.codes_OI, self.form.bits),
            "weight_planes_scale": self.scale_OG,
        }
        if self.zero_OG is not None:
            stored["weight_planes_zero"] = self.zero_OG
        return stored

    def sample(self, start: int, step: int) -> Planes:
        """Every `step`-th output from `start`."""
        zero = None if self.zero_OG is None else self.zero_OG[start::step]
        return Planes(self.codes_OI[start::step], self.scale_OG[start::step], zero, self.form)

    def split(self, rows: list[int]) -> list[Planes]:
        """Cut along the outputs."""
        zeros = [None] * len(rows) if self.zero_OG is None else torch.split(self.zero_OG, rows)
        pieces = zip(torch.split(self.codes_OI, rows), torch.split(self.scale_OG, rows), zeros, strict=True)
        return [Planes(codes, scale, zero, self.form) for codes, scale, zero in pieces]


def planes_of(part: Integers) -> Planes:
    """The same codes, to be stored as planes."""
    grid: Grid = "symmetric" if part.form.symmetric else "asymmetric"
    return Planes(part.codes_OI, part.scale_OG, part.zero_OG, PlanesForm(part.form.bits, part.form.group, grid))


def integers_of(part: Planes) -> Integers:
    """The inverse of `planes_of`, where the grid is not bipolar."""
    form = IntegerForm(part.form.bits, part.form.group, part.form.grid == "symmetric")
    return Integers(part.codes_OI, part.scale_OG, part.zero_OG, form)


def to_bipolar(codes: Tensor, bits: int) -> Tensor:
    """2 code - (2^bits - 1), int16. Of a signed s, whose code is s + 2^(bits - 1), it is 2 s + 1."""
    return codes.to(torch.int16).mul_(2).sub_((1 << bits) - 1)


def from_bipolar(values: Tensor, bits: int) -> Tensor:
    """The inverse of `to_bipolar`: uint8 codes of odd values."""
    return ((values + ((1 << bits) - 1)) >> 1).to(torch.uint8)


def slice_planes(codes_RI: Tensor, bits: int) -> Tensor:
    """uint8 codes to words, (R, N, M) int32: bit i of a word's column is bit n of its code; pad bits are 0."""
    return torch.stack([pack((codes_RI >> bit) & 1, 1) for bit in range(bits)], dim=1)


def join_planes(planes_RNM: Tensor, columns: int) -> Tensor:
    """The inverse of `slice_planes`: uint8 codes, (R, columns)."""
    codes = torch.zeros((len(planes_RNM), columns), dtype=torch.uint8, device=planes_RNM.device)
    for bit, plane_RM in enumerate(planes_RNM.unbind(1)):
        codes |= unpack(plane_RM, 1, columns) << bit
    return codes


def binary_product(weight_OM: Tensor, inputs_TM: Tensor, columns: int) -> Tensor:
    """Products of rows of +1 and -1, (T, O) int64: columns - 2 popcount(XOR).

    Pad bits are alike in both operands, so that their XOR is 0 and they never count.
    """
    step = max(1, _CHUNK // weight_OM.numel())
    differing = [
        _popcount(weight_OM ^ rows_TM[:, None]).sum(-1, dtype=torch.int64) for rows_TM in torch.split(inputs_TM, step)
    ]
    return columns - 2 * torch.cat(differing)


def bipolar_product(weight_OI: Tensor, weight_bits: int, inputs_TI: Tensor, inputs_bits: int) -> Tensor:
    """Exact products of the bipolar values of two matrices of uint8 codes, (T, O) int64."""
    columns = weight_OI.shape[1]
    weight_ONM, inputs_TNM = slice_planes(weight_OI, weight_bits), slice_planes(inputs_TI, inputs_bits)
    total = torch.zeros((len(inputs_TI), len(weight_OI)), dtype=torch.int64, device=weight_OI.device)
    for i in range(weight_bits):
        for j in range(inputs_bits):
            total += binary_product(weight_ONM[:, i], inputs_TNM[:, j], columns) << (i + j)
    return total


def product(weight: Planes, inputs: Planes) -> Tensor:
    """inputs times the weight transposed, (T, O) float64: integer products, then scales and zero corrections.

    `inputs` holds the tokens' activations with one scale for each (group 0). Both operands may have a zero, each of
    which adds a term of rank one for every group of the weight:

        (u + a)(v + b) summed = u v + a sum v + b sum u + columns a b
    """
    assert inputs.scale_OG.shape[1] == 1, "one scale for each token"
    groups = weight.scale_OG.shape[1]
    weight_step, weight_shift = _steps(weight)
    inputs_step, inputs_shift = _steps(inputs)
    total = weight_step.new_zeros((len(inputs.codes_OI), len(weight.codes_OI)))
    pieces = zip(weight.codes_OI.chunk(groups, 1), inputs.codes_OI.chunk(groups, 1), strict=True)
    for g, (weight_codes, inputs_codes) in enumerate(pieces):
        exact = bipolar_product(weight_codes, weight.form.bits, inputs_codes, inputs.form.bits)
        exact += inputs_shift * to_bipolar(weight_codes, weight.form.bits).sum(1)
        exact += weight_shift[:, g] * to_bipolar(inputs_codes, inputs.form.bits).sum(1, keepdim=True)
        exact += weight_codes.shape[1] * inputs_shift * weight_shift[:, g]
        total += exact * weight_step[:, g]
    return total * inputs_step


def _steps(part: Planes) -> tuple[Tensor, Tensor]:
    """Step (float64) and shift (int64), both (O, G), of w = step (v + shift)."""
    scale = part.scale_OG.double()
    if part.form.grid == "bipolar":
        return scale, torch.zeros_like(scale, dtype=torch.int64)
    middle = torch.full_like(scale, 1 << (part.form.bits - 1), dtype=torch.int64)
    zero = middle if part.zero_OG is None else part.zero_OG.to(torch.int64)
    return scale / 2, (1 << part.form.bits) - 1 - 2 * zero


def _popcount(words: Tensor) -> Tensor:
    """Set bits of int32 words: sums of neighbouring bits, pairs, nibbles, bytes."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    words = words + (words >> 8)
    return (words + (words >> 16)) & 0x3F
