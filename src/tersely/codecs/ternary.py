"""Weights of -1, 0 and 1 with a scale per group (BitNet b1.58: arXiv 2402.17764; BitCPM4: arXiv 2506.07900).

    scale = mean |w|        trit = clip(round(w / scale), -1, 1)        w_hat = scale * trit

Zeros make mean |w_hat| smaller than the scale, so that the scale cannot be derived from the values again: it is stored.

Shapes: O outputs, I inputs, G groups per row, R rows of scales (O, or 1 where one scale serves the whole weight).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tersely.codecs.integer import check_group, pack, unpack
from tersely.errors import UsageError

WHOLE = -1
"""The group of a weight with a single scale."""
Packing = Literal["trits", "two_bits"]
PACKINGS: tuple[Packing, ...] = ("trits", "two_bits")
_PER_BYTE = 5
"""Trits: 3^5 = 243 of the 256 values of a byte."""


@dataclass(frozen=True)
class TernaryForm:
    """Trits with a scale for `group` inputs; 0: for all inputs of an output; -1: for the whole weight.

    packing "trits": five to a byte (1.6 bits each); "two_bits": sixteen to a word.
    """

    kind: ClassVar[str] = "ternary"
    full_inputs: ClassVar[bool] = False

    group: int
    packing: Packing

    def nbytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        packed = -(-columns // _PER_BYTE) if self.packing == "trits" else 4 * -(-columns // 16)
        scales = 1 if self.group == WHOLE else rows * (columns // self.group if self.group else 1)
        return rows * packed + scales * dtype.itemsize

    def read(self, stored: Mapping[str, Tensor], rows: int, columns: int, dtype: torch.dtype) -> Ternary:  # noqa: ARG002
        packed = stored["weight_trits"]
        codes = unpack_trits(packed, columns) if self.packing == "trits" else unpack(packed, 2, columns)
        return Ternary(codes, stored["weight_trits_scale"], self)


@dataclass(frozen=True)
class Ternary:
    """One part of an encoded weight: trits and their scales."""

    codes_OI: Tensor
    """uint8: 0, 1, 2 for -1, 0, 1."""
    scale_RG: Tensor
    """In the dtype in which it is stored."""
    form: TernaryForm

    def decode(self) -> Tensor:
        """The weight, (O, I), in the scale's dtype; exact, as every value is 0 or the scale."""
        rows, columns = self.codes_OI.shape
        trits = self.codes_OI.to(self.scale_RG.dtype).sub_(1).view(rows, self.scale_RG.shape[1], -1)
        return trits.mul_(self.scale_RG[:, :, None]).view(rows, columns)

    def tensors(self) -> dict[str, Tensor]:
        packed = pack_trits(self.codes_OI) if self.form.packing == "trits" else pack(self.codes_OI, 2)
        return {"weight_trits": packed, "weight_trits_scale": self.scale_RG}

    def sample(self, start: int, step: int) -> Ternary:
        """Every `step`-th output from `start`."""
        scale = self.scale_RG if self.form.group == WHOLE else self.scale_RG[start::step]
        return Ternary(self.codes_OI[start::step], scale, self.form)

    def split(self, rows: list[int]) -> list[Ternary]:
        """Cut along the outputs."""
        scales = [self.scale_RG] * len(rows) if self.form.group == WHOLE else torch.split(self.scale_RG, rows)
        return [Ternary(c, s, self.form) for c, s in zip(torch.split(self.codes_OI, rows), scales, strict=True)]


def check_ternary(group: int, packing: str) -> None:
    """UsageError for a form that does not exist."""
    if group < WHOLE:
        raise UsageError(f"group={group}: a positive group size is expected, 0 for outputs or -1 for the whole weight")
    if packing not in PACKINGS:
        raise UsageError(f"packing={packing!r}: expected {' or '.join(map(repr, PACKINGS))}")


def ternarize(weight_OI: Tensor, group: int, scale_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """uint8 codes (O, I) and scales (R, G) of a weight of any float dtype; the scales' dtype is the weight's or given.

    A group of zeros keeps its trits at zero. UsageError: the group does not divide the inputs.
    """
    rows, columns = weight_OI.shape
    if group > 0:
        check_group(group, columns)
    dtype = scale_dtype or weight_OI.dtype
    w = weight_OI.float().view(rows, columns // group if group > 0 else 1, -1)
    mean = w.abs().mean((0, 2) if group == WHOLE else 2).view(1 if group == WHOLE else rows, -1)
    scale = mean.to(dtype).clamp_min(torch.finfo(dtype).smallest_normal)
    codes = (w / scale.float()[:, :, None]).round_().clamp_(-1, 1).add_(1).to(torch.uint8)
    return codes.view(rows, columns), scale


def pack_trits(codes_RN: Tensor) -> Tensor:
    """Codes 0, 1, 2 to bytes of five, (R, ceil(N / 5)): the first is the lowest digit; missing ones are 0."""
    padded = torch.nn.functional.pad(codes_RN, (0, -codes_RN.shape[1] % _PER_BYTE))
    digits = padded.view(len(codes_RN), -1, _PER_BYTE).unbind(-1)
    byte = digits[-1].clone()
    for digit in reversed(digits[:-1]):
        byte = byte.mul_(3).add_(digit)
    return byte


def unpack_trits(bytes_RM: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_trits`: uint8 codes, (R, columns)."""
    digits = [bytes_RM.div(3**i, rounding_mode="floor") % 3 for i in range(_PER_BYTE)]
    return torch.stack(digits, -1).view(len(bytes_RM), -1)[:, :columns].contiguous()
