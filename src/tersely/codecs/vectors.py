"""Additive vector codebooks (AQLM: arXiv 2401.06118).

    w_hat[o, group n of inputs] = scale_o sum_m codebook_m[code_onm]

Shapes: O outputs, I inputs, V inputs in a vector, N vectors per row (I / V), M codebooks, K entries of each (2^bits).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersely.codecs.integer import pack, unpack

_BYTE = 8


@dataclass(frozen=True)
class VectorForm:
    """`codebooks` codes of `bits` bits for every `group` inputs of an output; a scale for each output."""

    kind: ClassVar[str] = "vectors"
    full_inputs: ClassVar[bool] = False

    codebooks: int
    bits: int
    group: int

    def nbytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        codes = columns // self.group * self.codebooks
        low, high = min(self.bits, _BYTE), max(self.bits - _BYTE, 0)
        words = -(-codes * low // 32) + -(-codes * high // 32)
        return 4 * rows * words + (self.codebooks * (1 << self.bits) * self.group + rows) * dtype.itemsize

    def read(self, stored: Mapping[str, Tensor], rows: int, columns: int, dtype: torch.dtype) -> Vectors:  # noqa: ARG002
        codes = columns // self.group * self.codebooks
        value = unpack(stored["weight_codes"], min(self.bits, _BYTE), codes).to(torch.int32)
        if self.bits > _BYTE:
            value |= unpack(stored["weight_codes_high"], self.bits - _BYTE, codes).to(torch.int32) << _BYTE
        shaped = value.view(rows, columns // self.group, self.codebooks)
        books = stored["weight_codebooks"].view(self.codebooks, 1 << self.bits, self.group)
        return Vectors(shaped, books, stored["weight_codebooks_scale"], self)


@dataclass(frozen=True)
class Vectors:
    """One part of an encoded weight: codes, the codebooks that all outputs share, and scales."""

    codes_ONM: Tensor
    """int32, 0 .. 2^bits - 1."""
    codebooks_MKV: Tensor
    scale_O1: Tensor
    """Both in the dtype in which they are stored, the weight's."""
    form: VectorForm

    def decode(self) -> Tensor:
        """The weight, (O, I): summed and scaled in float32, then in the codebooks' dtype."""
        summed = sum_entries(self.codes_ONM, self.codebooks_MKV.float())
        return summed.mul_(self.scale_O1.float()).to(self.codebooks_MKV.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Codes packed to words, those above 8 bits in two tensors; codebooks; scales."""
        flat = self.codes_ONM.flatten(1)
        stored = {
            "weight_codes": pack((flat & 0xFF).to(torch.uint8), min(self.form.bits, _BYTE)),
            "weight_codebooks": self.codebooks_MKV,
            "weight_codebooks_scale": self.scale_O1,
        }
        if self.form.bits > _BYTE:
            stored["weight_codes_high"] = pack((flat >> _BYTE).to(torch.uint8), self.form.bits - _BYTE)
        return stored

    def sample(self, start: int, step: int) -> Vectors:
        """Every `step`-th output from `start`."""
        return Vectors(self.codes_ONM[start::step], self.codebooks_MKV, self.scale_O1[start::step], self.form)

    def split(self, rows: list[int]) -> list[Vectors]:
        """Cut along the outputs; each piece has all codebooks."""
        pieces = zip(torch.split(self.codes_ONM, rows), torch.split(self.scale_O1, rows), strict=True)
        return [Vectors(codes, self.codebooks_MKV, scale, self.form) for codes, scale in pieces]


def sum_entries(codes_ONM: Tensor, codebooks_MKV: Tensor) -> Tensor:
    """The weight before its scales, (O, I), in the codebooks' dtype; gradients flow to the codebooks."""
    total = codebooks_MKV[0][codes_ONM[:, :, 0]]
    for m in range(1, len(codebooks_MKV)):
        total = total + codebooks_MKV[m][codes_ONM[:, :, m]]
    return total.flatten(1)
