"""Which of GGML's block types holds an encoded weight, and the weight in it.

A row of a weight is cut into blocks of 32 inputs (K and T types: 256), each stored with its scales in a run of bytes:

    Q4_0, Q5_0, Q8_0    d * q              q in -8 .. 7, -16 .. 15, -128 .. 127
    Q4_1, Q5_1          d * q + m          q in 0 .. 15, 0 .. 31
    Q2_K, Q4_K, Q5_K    d * s * q - e * m  s, m: whole numbers for every 16 (Q2_K) or 32 inputs
    Q3_K, Q6_K          d * s * q          q in -4 .. 3, -32 .. 31; s: a whole number for every 16 inputs
    TQ1_0               d * q              q in -1, 0, 1
    MXFP4               2^k * q            q a float of four bits, E2M1

d, e, and m of Q4_1 and Q5_1, are float16. Integers on a grid, scale * (code - zero), keep their codes: a group that is
a multiple of 32 repeats its scale, and one of 256 or more takes a K type with s = 1, m = zero and e = d where that is
smaller. Trits and MXFP4 keep theirs, too.

Shapes: O outputs, I inputs, B blocks of all rows, G groups per row, Y bytes of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tersely.codecs import Encoded, Form, IntegerForm, Integers, Part, Scheme
from tersely.codecs.affine import Affine, AffineForm
from tersely.codecs.floats import Floats, MXFP4Form
from tersely.codecs.ternary import Ternary, TernaryForm
from tersely.errors import CheckpointError
from tersely.export.gguf.layouts import CENTRED, MICROSCALED, OFFSET, WHOLE_OFFSET, Bytes, Type
from tersely.hadamard import hadamard

DENSE: Mapping[torch.dtype, Type] = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}
_BLOCK, _SUPERBLOCK = 32, 256
Kind = Literal["symmetric", "whole zero", "real zero", "trits"]


@dataclass(frozen=True)
class Choice:
    """The type for a weight, and whether it keeps the codes."""

    type: Type
    kept: bool
    reason: str = ""
    """Why the type is not the one of the stored bits."""


@dataclass(frozen=True)
class Packed:
    """A weight as bytes."""

    data_OY: Bytes
    change: float
    """Largest difference from the stored value, relative to the largest magnitude among the same 32 inputs."""


@dataclass(frozen=True)
class Grid:
    """scale * (code - zero), whatever its parts are stored in."""

    codes_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor

    def ordered(self, index: Tensor | slice) -> Grid:
        """With the rows in an order."""
        return Grid(self.codes_OI[index], self.scale_OG[index], self.zero_OG[index])

    def decode(self) -> Tensor:
        """The values, (O, I), float32."""
        codes = self.codes_OI.view(len(self.codes_OI), self.scale_OG.shape[1], -1).float()
        return codes.sub_(self.zero_OG[:, :, None]).mul_(self.scale_OG[:, :, None].float()).view(self.codes_OI.shape)


_SMALL: Mapping[tuple[Kind, int], Type] = {
    **{("symmetric", bits): Type.Q4_0 for bits in (2, 3, 4)},
    ("symmetric", 5): Type.Q5_0,
    **{("symmetric", bits): Type.Q8_0 for bits in (6, 7, 8)},
    # code - zero of 2 or 3 bits lies in -7 .. 7, and of 6 or 7 bits in -127 .. 127.
    **{("whole zero", bits): Type.Q4_0 for bits in (2, 3)},
    ("whole zero", 4): Type.Q4_1,
    ("whole zero", 5): Type.Q5_1,
    **{("whole zero", bits): Type.Q8_0 for bits in (6, 7)},
    **{("real zero", bits): Type.Q4_1 for bits in (2, 3, 4)},
    ("real zero", 5): Type.Q5_1,
    ("trits", 2): Type.Q4_0,
}
"""The smallest type of 32 inputs that has room for codes of so many bits."""
_LARGE: Mapping[tuple[Kind, int], Type] = {
    ("symmetric", 2): Type.Q2_K,
    ("symmetric", 3): Type.Q3_K,
    ("symmetric", 6): Type.Q6_K,
    ("whole zero", 2): Type.Q2_K,
    ("whole zero", 4): Type.Q4_K,
    ("whole zero", 5): Type.Q5_K,
    ("trits", 2): Type.TQ1_0,
}
"""The same for groups of 256 and more, where a type of 256 inputs is smaller."""


def choose(scheme: Scheme, columns: int) -> Choice:
    """The type for a weight of so many inputs that is stored like this."""
    form = scheme.parts[0]
    said = " + ".join(part.kind for part in scheme.parts) + " behind a Hadamard matrix" * bool(scheme.hadamard)
    if len(scheme.parts) == 1 and not scheme.hadamard:
        if isinstance(form, MXFP4Form):
            return Choice(Type.MXFP4, True)
        if grid := _grid_of(form, columns):
            kind, bits, group = grid
            if (kind, bits) in _LARGE and group % _SUPERBLOCK == columns % _SUPERBLOCK == 0:
                return _kept(_LARGE[kind, bits], bits)
            if (kind, bits) in _SMALL and group % _BLOCK == columns % _BLOCK == 0:
                return _kept(_SMALL[kind, bits], bits)
            codes = "trits" if kind == "trits" else f"{bits}-bit integers"
            said = f"{codes} in groups of {group}" + f" with a {kind}" * kind.endswith("zero")
    nearest = Type.F16 if columns % _BLOCK else Type.Q8_0
    return Choice(nearest, False, f"no type holds {said}; {nearest.name} is the nearest")


def bits_of(kind: Type) -> float:
    """Bits of a weight, scales included."""
    count, nbytes = gguf.GGML_QUANT_SIZES[kind]
    return 8 * nbytes / count


def pack(encoded: Encoded, scheme: Scheme, choice: Choice, order_O: Tensor | None = None) -> Packed:
    """An encoded weight, its rows in an order, in the type that was chosen for it: its codes, where that keeps them.

    CheckpointError: a scale, or a value, is beyond float16.
    """
    part, index = encoded.parts[0], slice(None) if order_O is None else order_O
    if choice.kept and isinstance(part, Floats):
        return _pack_floats(replace(part, codes_OI=part.codes_OI[index], scale_OG=part.scale_OG[index]), choice.type)
    if choice.kept and (grid := _grid(part)):
        return _pack_grid(grid.ordered(index), choice.type)
    value_OI = encoded.decode()
    if scheme.hadamard:
        # W (H x) = (W H) x
        value_OI = hadamard(value_OI.float(), scheme.hadamard)
    return pack_values(value_OI[index], choice.type)


def pack_values(value_OI: Tensor, kind: Type) -> Packed:
    """Values of any float dtype in the nearest numbers that the type has."""
    value = value_OI.float().contiguous()
    if kind not in (Type.F32, Type.BF16):
        _require_half(float(value.abs().max()))
    data_OY = gguf.quants.quantize(value.numpy(), kind).view(np.uint8)
    return Packed(data_OY, _change(data_OY, kind, value))


def pack_dense(value: Tensor) -> Packed:
    """A tensor of one of the dtypes of DENSE, bit for bit."""
    return Packed(value.contiguous().reshape(-1).view(torch.uint8).numpy().reshape(*value.shape[:-1], -1), 0.0)


def _grid_of(form: Form, columns: int) -> tuple[Kind, int, int] | None:
    """Kind of grid, bits and group; None for what is no grid."""
    match form:
        case IntegerForm():
            return "symmetric" if form.symmetric else "whole zero", form.bits, form.group or columns
        case AffineForm():
            return "real zero", form.bits, form.group or columns
        case TernaryForm():
            return "trits", 2, form.group if form.group > 0 else columns
    return None


def _grid(part: Part) -> Grid | None:
    match part:
        case Integers():
            middle = torch.tensor(1 << (part.bits - 1)).expand(part.scale_OG.shape)
            return Grid(part.codes_OI, part.scale_OG, middle if part.zero_OG is None else part.zero_OG)
        case Affine():
            return Grid(part.codes_OI, part.scale_OG, part.zero_OG)
        case Ternary():
            scale_OG = part.scale_RG.expand(len(part.codes_OI), -1)
            return Grid(part.codes_OI, scale_OG, torch.ones_like(scale_OG))
    return None


def _kept(kind: Type, bits: int) -> Choice:
    spare = bits_of(kind) - bits
    reason = f"{bits_of(kind):g} bits a weight; GGUF has no smaller type for {bits}-bit codes" if spare > 1 else ""
    return Choice(kind, True, reason)


def _pack_grid(grid: Grid, kind: Type) -> Packed:
    """Codes as they are, scales and offsets in float16."""
    if kind is Type.TQ1_0:
        return pack_values(grid.decode(), kind)
    rows, groups = grid.scale_OG.shape
    size, _ = gguf.GGML_QUANT_SIZES[kind]
    repeat = grid.codes_OI.shape[1] // groups // size
    scale, zero = grid.scale_OG.float(), grid.zero_OG.float()
    offset = -scale * zero

    def blocks(value_OG: Tensor) -> NDArray[np.float32]:
        """One value for each block, (B, 1)."""
        return value_OG.repeat_interleave(repeat, 1).reshape(-1, 1).numpy()

    codes = grid.codes_OI.view(rows, groups, -1).to(torch.int16)
    if kind in CENTRED:
        codes -= grid.zero_OG[:, :, None].to(torch.int16)
    codes_BI, scale_B = codes.view(-1, size).numpy(), _half(blocks(scale))
    if kind in CENTRED:
        data = CENTRED[kind](codes_BI, scale_B)
    elif kind in WHOLE_OFFSET:
        data = WHOLE_OFFSET[kind](codes_BI, scale_B, blocks(zero).astype(np.uint8))
    else:
        data = OFFSET[kind](codes_BI, scale_B, _half(blocks(offset)))
    data_OY = data.reshape(rows, -1)
    rounded = (scale, offset) if kind in OFFSET else (scale,)
    if all(torch.equal(each.half().float(), each) for each in rounded):
        return Packed(data_OY, 0.0)
    return Packed(data_OY, _change(data_OY, kind, grid.decode()))


def _pack_floats(part: Floats, kind: Type) -> Packed:
    rows = len(part.codes_OI)
    codes_BI = part.codes_OI.reshape(-1, _BLOCK).to(torch.int16).numpy()
    data_OY = MICROSCALED[kind](codes_BI, part.scale_OG.reshape(-1, 1).numpy()).reshape(rows, -1)
    return Packed(data_OY, _change(data_OY, kind, part.decode().float()))


def _change(data_OY: Bytes, kind: Type, value_OI: Tensor) -> float:
    found = torch.from_numpy(gguf.quants.dequantize(data_OY, kind)).view(value_OI.shape)
    difference = (found - value_OI).abs_()
    if not difference.any():
        return 0.0
    columns = value_OI.shape[1]
    width = columns if columns % _BLOCK else _BLOCK
    largest = value_OI.abs().view(-1, width).amax(1).clamp_(min=torch.finfo(torch.float32).tiny)
    return float((difference.view(-1, width).amax(1) / largest).max())


def _half(value_B1: NDArray[np.float32]) -> Bytes:
    """float16, as bytes (B, 2)."""
    _require_half(float(np.abs(value_B1).max()))
    return value_B1.astype("<f2").view(np.uint8)


def _require_half(largest: float) -> None:
    limit = torch.finfo(torch.float16).max
    if largest > limit:
        raise CheckpointError(
            f"a scale or a value of {largest:g} is beyond float16's largest, {limit:g}; GGUF cannot hold the weight"
        )
