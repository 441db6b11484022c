"""Integers of 2 to 8 bits on a uniform grid, with a scale (and a zero point) per group of inputs.

    w = scale * (code - zero)        code in 0 .. 2^bits - 1

Shapes: O outputs, I inputs, G groups per row (I / group), all in the letters behind a name.

Symmetric grids keep the zero at 2^(bits-1) and take scale = 2 max|w| / (2^bits - 1) ("S2" of the GPTQ code,
and what compressed-tensors writes). Asymmetric ones span min(w, 0) .. max(w, 0). Scales are rounded to the dtype
in which they are stored *before* anything is rounded with them. Ties round to even.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tersely.errors import UsageError

Clip = Literal["none", "mse"]
SHRINKS = 40
_CHUNK = 1 << 17
"""Elements that are worked on at once: in float32 they fit a core's own cache."""
_SEARCH_CHUNK = 1 << 19
"""The same in a search, whose operations all cores share."""


@dataclass(frozen=True)
class IntegerForm:
    """Integer codes on a grid; group 0: all inputs of an output share a scale.

    Packed codes are a stream of bits in int32 words. Plain ones, a byte for each whatever their bits, are what
    engines read that multiply integers: they round the inputs as well.
    """

    kind: ClassVar[str] = "integers"
    full_inputs: ClassVar[bool] = False

    bits: int
    group: int
    symmetric: bool
    packed: bool = True

    def nbytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        groups = columns // self.group if self.group else 1
        if not self.packed:
            return rows * columns + rows * groups * (dtype.itemsize + (0 if self.symmetric else 1))
        zeros = 0 if self.symmetric else 4 * -(-rows * self.bits // 32) * groups
        return 4 * rows * -(-columns * self.bits // 32) + rows * groups * dtype.itemsize + zeros + 16

    def read(self, stored: Mapping[str, Tensor], rows: int, columns: int, dtype: torch.dtype) -> Integers:  # noqa: ARG002
        zero = None
        if not self.packed:
            middle = 1 << (self.bits - 1)
            if not self.symmetric:
                zero = (stored["weight_zero_point"].to(torch.int16) + middle).to(torch.uint8)
            codes = (stored["weight"].to(torch.int16) + middle).to(torch.uint8)
            return Integers(codes, stored["weight_scale"], zero, self)
        if not self.symmetric:
            zero = unpack(stored["weight_zero_point"].t().contiguous(), self.bits, rows).t().contiguous()
        codes = unpack(stored["weight_packed"], self.bits, columns)
        return Integers(codes, stored["weight_scale"], zero, self)


@dataclass(frozen=True)
class Integers:
    """One part of an encoded weight: integer codes on a grid."""

    codes_OI: Tensor
    """uint8, 0 .. 2^bits - 1."""
    scale_OG: Tensor
    """In the dtype in which it is stored."""
    zero_OG: Tensor | None
    """uint8; None on a symmetric grid, whose zero is 2^(bits-1)."""
    form: IntegerForm

    @property
    def bits(self) -> int:
        return self.form.bits

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.codes_OI.shape[1] // self.scale_OG.shape[1]

    def decode(self) -> Tensor:
        """The weight, (O, I), in the scale's dtype: what a reader of the stored form computes."""
        dtype = self.scale_OG.dtype
        rows, columns = self.codes_OI.shape
        codes = self.codes_OI.view(rows, -1, self.group).to(dtype)
        zero = float(1 << (self.bits - 1)) if self.zero_OG is None else self.zero_OG[:, :, None].to(dtype)
        return codes.sub_(zero).mul_(self.scale_OG[:, :, None]).view(rows, columns)

    def tensors(self) -> dict[str, Tensor]:
        """Stored form: codes, scales, zero points, in compressed-tensors' names; packed, or as signed bytes."""
        if not self.form.packed:
            plain = {"weight": _signed(self.codes_OI, self.bits), "weight_scale": self.scale_OG}
            if self.zero_OG is not None:
                plain["weight_zero_point"] = _signed(self.zero_OG, self.bits)
            return plain
        stored = {
            "weight_packed": pack(self.codes_OI, self.bits),
            "weight_scale": self.scale_OG,
            "weight_shape": torch.tensor(self.codes_OI.shape, dtype=torch.int64),
        }
        if self.zero_OG is not None:
            stored["weight_zero_point"] = pack(self.zero_OG.t(), self.bits).t().contiguous()
        return stored

    def sample(self, start: int, step: int) -> Integers:
        """Every `step`-th output from `start`."""
        zero = None if self.zero_OG is None else self.zero_OG[start::step]
        return Integers(self.codes_OI[start::step], self.scale_OG[start::step], zero, self.form)

    def split(self, rows: list[int]) -> list[Integers]:
        """Cut along the outputs: the inverse of stacking weights that share their inputs."""
        parts = []
        start = 0
        for end in accumulate(rows):
            zero = None if self.zero_OG is None else self.zero_OG[start:end]
            parts.append(Integers(self.codes_OI[start:end], self.scale_OG[start:end], zero, self.form))
            start = end
        return parts


def check_group(group: int, columns: int) -> None:
    """UsageError where `group` does not divide the inputs of a weight, naming groups that do."""
    if group and columns % group:
        fits = [g for g in (16, 32, 64, 128, 256, 512) if columns % g == 0]
        if not fits:
            fits = sorted((d for d in range(2, columns + 1) if columns % d == 0), key=lambda d: abs(d - group))[:3]
        near = sorted(sorted(fits, key=lambda g: abs(g - group))[:2])
        raise UsageError(
            f"group={group} does not divide {columns}; use {' or '.join(map(str, near))}, or 0 for one group per output"
        )


def check_grid(bits: int, group: int, clip: str) -> None:
    """UsageError for a grid that does not exist."""
    if not 2 <= bits <= 8:
        raise UsageError(f"bits={bits}: integers of 2 to 8 bits can be stored")
    if group < 0:
        raise UsageError(f"group={group}: a positive group size is expected, or 0 for one group per output")
    if clip not in ("none", "mse"):
        raise UsageError(f"clip={clip!r}: expected 'none' or 'mse'")


def fit_grid(
    weight_OI: Tensor,
    *,
    bits: int,
    group: int,
    symmetric: bool,
    clip: Clip,
    scale_dtype: torch.dtype,
    importance_I: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scale (O, G) in `scale_dtype` and zero point (O, G) uint8 (None if symmetric) for a weight of any float dtype.

    `clip="mse"` shrinks the range of each group by 1 - i/50, i = 0 .. 39, and keeps the shrink with the least
    sum of importance * |w - w_hat|^p: p = 2 with `importance_I` (the mean square of each input: then the sum is
    the expected error of the output), p = 2.4 without, as GPTQ's code does.
    """
    rows, columns = weight_OI.shape
    size = group or columns
    groups = columns // size
    scale = weight_OI.new_empty((rows, groups), dtype=scale_dtype)
    zero = None if symmetric else torch.empty((rows, groups), dtype=torch.uint8, device=weight_OI.device)
    weigh = None if importance_I is None else importance_I.view(1, groups, size)
    step = max(1, (_CHUNK if clip == "none" else _SEARCH_CHUNK) // columns)
    for a in range(0, rows, step):
        w = weight_OI[a : a + step].float().view(-1, groups, size)
        low, high = _range(w, symmetric)
        s, z = _grid(low, high, bits, symmetric, scale_dtype)
        if clip == "mse":
            s, z = _search(w, low, high, s, z, bits, symmetric, scale_dtype, weigh)
        scale[a : a + step] = s
        if zero is not None and z is not None:
            zero[a : a + step] = z.to(torch.uint8)
    return scale, zero


def round_to_grid(weight_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, form: IntegerForm) -> Integers:
    """Round to nearest, ties to even."""
    bits = form.bits
    rows, columns = weight_OI.shape
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=weight_OI.device)
    groups = scale_OG.shape[1]
    middle = float(1 << (bits - 1))
    step = max(1, _CHUNK // columns)
    for a in range(0, rows, step):
        w = weight_OI[a : a + step].float().view(-1, groups, columns // groups)
        zero = middle if zero_OG is None else zero_OG[a : a + step, :, None].float()
        w = (
            w / scale_OG[a : a + step, :, None].float()
            if w.dtype == weight_OI.dtype
            else w.div_(scale_OG[a : a + step, :, None].float())
        )
        codes[a : a + step] = w.round_().add_(zero).clamp_(0, (1 << bits) - 1).view(-1, columns)
    return Integers(codes, scale_OG, zero_OG, form)


def _range(w: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    low, high = torch.aminmax(w, dim=-1)
    if symmetric:
        high = torch.maximum(high, -low)
        return -high, high
    return low.clamp_(max=0), high.clamp_(min=0)


def _grid(low: Tensor, high: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    levels = (1 << bits) - 1
    smallest = torch.finfo(dtype).smallest_normal
    scale = ((high - low) / levels).to(dtype)
    # A group of zeros, or one too small for the stored dtype: any scale keeps its codes at zero.
    scale = torch.where(scale < smallest, torch.finfo(dtype).eps, scale)
    if symmetric:
        return scale, None
    return scale, (-low / scale.float()).round_().clamp_(0, levels)


def _search(
    w: Tensor,
    low: Tensor,
    high: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    symmetric: bool,
    dtype: torch.dtype,
    weigh: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    best = torch.full_like(low, torch.inf)
    levels = (1 << bits) - 1
    error = torch.empty_like(w)
    for i in range(SHRINKS):
        p = 1 - i / 50
        s, z = _grid(low * p, high * p, bits, symmetric, dtype)
        step = s.float()[:, :, None]
        shift = torch.tensor(float(1 << (bits - 1)), device=w.device) if z is None else z[:, :, None]
        limits = (-shift, levels - shift)
        torch.div(w, step, out=error)
        # In units of the scale: code - zero, clamped, times the scale, minus w.
        error.round_().clamp_(*limits).mul_(step).sub_(w)
        loss = error.abs_().pow_(2.4) if weigh is None else error.square_().mul_(weigh)
        total = loss.sum(-1)
        better = total < best
        best = torch.where(better, total, best)
        scale = torch.where(better, s, scale)
        zero = None if zero is None or z is None else torch.where(better, z, zero)
    return scale, zero


def pack(codes_RN: Tensor, bits: int) -> Tensor:
    """uint8 codes, (R, N), to int32 words, (R, ceil(N * bits / 32)): a dense stream of bits, lowest first."""
    rows, columns = codes_RN.shape
    words = -(-columns * bits // 32)
    if bits == 8 and columns % 4 == 0:
        return codes_RN.contiguous().view(torch.int32)
    if bits in (1, 2, 4):
        per_byte = 8 // bits
        padded = _padded(codes_RN, 32 // bits).view(rows, -1, per_byte)
        byte = padded[:, :, 0].clone()
        for i in range(1, per_byte):
            byte |= padded[:, :, i] << (i * bits)
        return byte.view(torch.int32)
    value = _padded(codes_RN, 32).view(rows, -1, 32).to(torch.int64)
    packed = value.new_zeros((rows, value.shape[1], bits + 1))
    for i in range(32):
        word, offset = divmod(i * bits, 32)
        shifted = value[:, :, i] << offset
        packed[:, :, word] |= shifted & 0xFFFFFFFF
        packed[:, :, word + 1] |= shifted >> 32
    return packed[:, :, :bits].reshape(rows, -1)[:, :words].to(torch.int32).contiguous()


def unpack(words_RM: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: uint8 codes, (R, columns)."""
    rows = words_RM.shape[0]
    if bits == 8 and columns % 4 == 0:
        return words_RM.contiguous().view(torch.uint8)
    mask = (1 << bits) - 1
    if bits in (1, 2, 4):
        byte = words_RM.contiguous().view(torch.uint8)
        codes = torch.stack([(byte >> (i * bits)) & mask for i in range(8 // bits)], dim=-1)
        return codes.view(rows, -1)[:, :columns].contiguous()
    words = _padded(words_RM, bits).view(rows, -1, bits).to(torch.int64) & 0xFFFFFFFF
    codes = words.new_empty((rows, words.shape[1], 32), dtype=torch.uint8)
    for i in range(32):
        word, offset = divmod(i * bits, 32)
        value = words[:, :, word] >> offset
        if offset + bits > 32:
            value = value | (words[:, :, word + 1] << (32 - offset))
        codes[:, :, i] = (value & mask).to(torch.uint8)
    return codes.view(rows, -1)[:, :columns].contiguous()


def _signed(codes: Tensor, bits: int) -> Tensor:
    return (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def _padded(value: Tensor, multiple: int) -> Tensor:
    missing = -value.shape[1] % multiple
    return (torch.nn.functional.pad(value, (0, missing)) if missing else value).contiguous()
