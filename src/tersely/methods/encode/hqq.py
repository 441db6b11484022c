"""HQQ: half-quadratic quantization (Badri and Shaji, 2023, the blog of Mobius Labs; github.com/mobiusml/hqq).

Shapes: O outputs, G groups per row, I inputs of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersely.codecs import Encoded
from tersely.codecs.affine import Affine, AffineForm, zero_dtype
from tersely.codecs.integer import check_grid, check_group
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.protocol import Work

_CHUNK = 1 << 18
"""Elements that are worked on at once."""


@dataclass(frozen=True)
class HQQ:
    """Fit the zero point of each group so that few weights are far off; no data is needed.

    Minimises sum |w - w_hat|^p, p < 1, over real-valued zero points by splitting the error into a sparse part e and
    a rest of least squares, in turns:

        code = clip(round(w / scale + zero), 0, 2^bits - 1),   d = w - scale * (code - zero)
        e    = sign(d) max(0, |d| - |d|^(p-1) / beta)
        zero = mean(code - (w - e) / scale),   beta = kappa * beta

    The scale stays (max - min) / (2^bits - 1), the start is zero = -min / scale. Each group keeps the zero point with
    the least mean |d| on the way, the start included (the authors' code keeps the last one of all groups together).
    A group of equal weights is exact.
    """

    name: ClassVar[str] = "hqq"
    needs: ClassVar[frozenset[str]] = frozenset()
    row_wise: ClassVar[bool] = True
    keeps_zeros: ClassVar[bool] = False

    bits: int = 4
    group: int = 64
    """Inputs that share a scale and a zero point; 0: all inputs of an output."""
    p: float = 0.7
    """Power of the errors in what is minimised."""
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group, "none")
        if not 0 < self.p <= 1:
            raise UsageError(f"p={self.p}: expected more than 0 and at most 1 (0.7 is usual)")
        if not self.beta > 0:
            raise UsageError(f"beta={self.beta}: expected more than 0 (10 is usual)")
        if not self.kappa >= 1:
            raise UsageError(f"kappa={self.kappa}: expected 1 or more (1.01 is usual)")
        if self.iterations < 0:
            raise UsageError(f"iterations={self.iterations}: expected 0 or more (20 is usual)")

    def check(self, columns: int) -> None:
        check_group(self.group, columns)

    def forms(self, rows: int, columns: int) -> tuple[AffineForm]:  # noqa: ARG002 (of the protocol)
        return (AffineForm(self.bits, self.group),)

    def work(self, rows: int, columns: int) -> Work:  # noqa: ARG002 (of the protocol)
        return Work(passes=3 + 2 * (1 + self.iterations))

    def __call__(self, weight_OI: Tensor, stats: Statistics) -> Encoded:  # noqa: ARG002 (of the protocol)
        rows, columns = weight_OI.shape
        codes = torch.empty((rows, columns), dtype=torch.uint8, device=weight_OI.device)
        size = self.group or columns
        scale = weight_OI.new_empty((rows, columns // size))
        zero = torch.empty_like(scale, dtype=zero_dtype(weight_OI.dtype))
        step = max(1, _CHUNK // columns)
        for a in range(0, rows, step):
            w_OGI = weight_OI[a : a + step].float().reshape(-1, columns // size, size)
            s, z = self._fit(w_OGI, weight_OI.dtype)
            scale[a : a + step], zero[a : a + step] = s, z
            codes[a : a + step] = self._codes(w_OGI / s[:, :, None], z[:, :, None]).flatten(1)
        return Encoded((Affine(codes, scale, zero, *self.forms(rows, columns)),))

    def _codes(self, units_OGI: Tensor, zero: Tensor) -> Tensor:
        """Of weights in units of the scale."""
        return (units_OGI + zero).round_().clamp_(0, (1 << self.bits) - 1)

    def _fit(self, w_OGI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scale and zero point, (O, G), float32 numbers that the stored dtypes hold."""
        scale, zero = _start(w_OGI, (1 << self.bits) - 1, dtype)
        units = w_OGI / scale[:, :, None]
        best, least = zero, torch.full_like(zero, torch.inf)
        beta = self.beta
        for turn in range(self.iterations + 1):
            codes = self._codes(units, zero[:, :, None])
            error = w_OGI - (codes - zero[:, :, None]) * scale[:, :, None]
            size = error.abs()
            mean = size.mean(-1)
            better = mean < least
            best, least = torch.where(better, zero, best), torch.where(better, mean, least)
            if turn < self.iterations:
                # |d|^(p-1) is infinite where d is 0, and what is left of d then 0, as it should be.
                kept = (size - size.pow(self.p - 1) / beta).clamp_(min=0).copysign_(error)
                zero = _stored_zero((codes - units).addcdiv_(kept, scale[:, :, None]).mean(-1), dtype)
                beta *= self.kappa
        return scale, best


def _start(w_OGI: Tensor, levels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    low, high = torch.aminmax(w_OGI, dim=-1)
    smallest = torch.finfo(dtype).smallest_normal
    scale = ((high - low) / levels).to(dtype).float().clamp_(min=smallest)
    # Equal weights: code 0 and zero = -1 or 1 give them back. The authors' code does so in effect, for any range below
    # 1e-4, and keeps 1 / scale below 2e4, which float16 needs and other dtypes do not.
    flat = low == high
    scale = torch.where(flat, torch.where(low == 0, 1.0, low.abs()), scale)
    return scale, _stored_zero(torch.where(flat, -low.sign(), -low / scale), dtype)


def _stored_zero(zero: Tensor, dtype: torch.dtype) -> Tensor:
    stored = zero_dtype(dtype)
    limit = torch.finfo(stored).max
    return zero.clamp(-limit, limit).to(stored).float()
