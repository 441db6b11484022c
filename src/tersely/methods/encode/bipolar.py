"""Integers of 1 to 8 bits that are stored as bit planes ("bipolar-INT", arXiv 2409.17870).

Shapes: O outputs, I inputs, G groups per row, S inputs in a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tersely.codecs import Encoded
from tersely.codecs.integer import SHRINKS, Integers, check_group
from tersely.codecs.planes import GRIDS, Grid, Planes, PlanesForm, from_bipolar, planes_of
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.encode.gptq import GPTQ
from tersely.methods.encode.rtn import RTN
from tersely.methods.encode.sweep import Factor, prepare, sweep
from tersely.methods.protocol import Work

_CHUNK = 1 << 19
"""Elements whose scales are searched at once."""
Rounding = Literal["gptq", "nearest"]


@dataclass(frozen=True)
class Bipolar:
    """Round to odd multiples of a scale, w_hat = scale v with v in -(2^bits - 1) .. 2^bits - 1, by GPTQ's sweep.

    There is no zero and no sign among the codes, so a product of any two widths is a sum of products of single bits.
    The scale is the one of SHRINKS ranges that loses least, refined by least squares; with one bit that is mean |w|.
    The other grids are those of `gptq` and `rtn`, stored as planes; their zero points make up for the shift.
    """

    name: ClassVar[str] = "bipolar"
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    row_wise: ClassVar[bool] = True
    keeps_zeros: ClassVar[bool] = False

    bits: int = 4
    group: int = 128
    """Inputs that share a scale; 0: all inputs of an output."""
    grid: Grid = "bipolar"
    rounding: Rounding = "gptq"
    """"nearest": no compensation of errors; the Gram matrix then only says which inputs matter to a scale."""
    damping: float = 0.01
    """Added to the diagonal, relative to its mean."""
    act_order: bool = True
    """Take the inputs with the largest mean square first."""
    minimum_tokens: float = 1.0

    def __post_init__(self) -> None:
        if self.grid not in GRIDS:
            raise UsageError(f"grid={self.grid!r}: expected {' or '.join(map(repr, GRIDS))}")
        if self.rounding not in ("gptq", "nearest"):
            raise UsageError(f"rounding={self.rounding!r}: expected 'gptq' or 'nearest'")
        fewest = 1 if self.grid == "bipolar" else 2
        if not fewest <= self.bits <= 8:
            raise UsageError(f"bits={self.bits}: a {self.grid} grid has {fewest} to 8 bits")
        self._gptq()

    def check(self, columns: int) -> None:
        check_group(self.group, columns)

    def forms(self, rows: int, columns: int) -> tuple[PlanesForm]:  # noqa: ARG002 (of the protocol)
        return (PlanesForm(self.bits, self.group, self.grid),)

    def work(self, rows: int, columns: int) -> Work:
        if self.rounding == "nearest":
            return Work(passes=SHRINKS)
        return Work(flops=2.0 * rows * columns**2 + columns**3 / 3, passes=SHRINKS, loops=columns)

    def __call__(self, weight_OI: Tensor, stats: Statistics) -> Encoded:
        if self.grid != "bipolar":
            symmetric = self.grid == "symmetric"
            nearest = RTN(bits=self.bits, group=self.group, symmetric=symmetric, clip="mse")
            encoded = (self._gptq() if self.rounding == "gptq" else nearest)(weight_OI, stats)
            return Encoded(tuple(planes_of(p) for p in encoded.parts if isinstance(p, Integers)), encoded.note)
        factor, importance, note = None, None, ""
        if self.rounding == "gptq":
            factor, importance, note = prepare(
                stats, damping=self.damping, act_order=self.act_order, minimum_tokens=self.minimum_tokens
            )
        scale = fit_scale(weight_OI, bits=self.bits, group=self.group, importance_I=importance)
        if factor is None:
            codes = nearest_codes(weight_OI.float(), scale, self.bits)
        else:
            codes = _swept_codes(weight_OI.float(), factor, scale, self.bits)
        return Encoded((Planes(codes, scale, None, *self.forms(*weight_OI.shape)),), note)

    def _gptq(self) -> GPTQ:
        return GPTQ(
            bits=max(self.bits, 2),
            group=self.group,
            symmetric=self.grid == "symmetric",
            damping=self.damping,
            act_order=self.act_order,
            minimum_tokens=self.minimum_tokens,
        )


def fit_scale(weight_OI: Tensor, *, bits: int, group: int, importance_I: Tensor | None) -> Tensor:
    """Scales (O, G) of a bipolar grid in the weight's dtype, from the shrunk ranges max|w| (1 - i/50), i = 0 .. 39.

    Each range gives codes, and these their least squares scale; the one with the least sum of importance * error^2
    is kept. A group of zeros has the smallest scale there is.
    """
    columns = weight_OI.shape[1]
    dtype = weight_OI.dtype
    weigh = torch.ones(columns, device=weight_OI.device) if importance_I is None else importance_I
    weigh_GS = weigh.view(-1, group or columns)
    top = (1 << bits) - 1
    scales = []
    for w in torch.split(weight_OI, max(1, _CHUNK // columns)):
        w_RGS = w.float().view(len(w), *weigh_GS.shape)
        largest = w_RGS.abs().amax(-1)
        best = torch.full_like(largest, torch.inf)
        scale = _storable(largest / top, dtype)
        for i in range(SHRINKS):
            start = _storable(largest * ((1 - i / 50) / top), dtype)
            v = _odd(w_RGS, start[:, :, None].float(), top)
            size = (weigh_GS * v.square()).sum(-1)
            fitted = _storable((weigh_GS * v * w_RGS).sum(-1) / size.clamp_min(torch.finfo(size.dtype).tiny), dtype)
            v = _odd(w_RGS, fitted[:, :, None].float(), top)
            error = (v.mul_(fitted[:, :, None].float()).sub_(w_RGS).square_() * weigh_GS).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            scale = torch.where(better, fitted, scale)
        scales.append(scale)
    return torch.cat(scales)


def nearest_codes(weight_OI: Tensor, scale_OG: Tensor, bits: int) -> Tensor:
    """uint8 codes, (O, I), of the nearest odd multiples of the scales."""
    rows, columns = weight_OI.shape
    w_OGS = weight_OI.view(rows, scale_OG.shape[1], -1)
    values = _odd(w_OGS, scale_OG[:, :, None].float(), (1 << bits) - 1)
    return from_bipolar(values.to(torch.int16), bits).view(rows, columns)


def _swept_codes(weight_OI: Tensor, factor: Factor, scale_OG: Tensor, bits: int) -> Tensor:
    group = weight_OI.shape[1] // scale_OG.shape[1]
    top = (1 << bits) - 1
    codes_IO = torch.empty(weight_OI.shape[::-1], dtype=torch.uint8, device=weight_OI.device)
    scale_GO = scale_OG.t().float().contiguous()

    def rounded(column: int, target_O: Tensor) -> Tensor:
        scale_O = scale_GO[column // group]
        value_O = _odd(target_O, scale_O, top)
        codes_IO[column] = from_bipolar(value_O.to(torch.int16), bits)
        return value_O.mul_(scale_O).to(scale_OG.dtype).float()

    sweep(weight_OI, factor, rounded)
    return codes_IO.t().contiguous()


def _odd(w: Tensor, scale: Tensor, top: int) -> Tensor:
    """The nearest odd multiples of the scale, as floats."""
    return (w / (2 * scale)).floor_().mul_(2).add_(1).clamp_(-top, top)


def _storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    return scale.to(dtype).clamp_min(torch.finfo(dtype).smallest_normal)
