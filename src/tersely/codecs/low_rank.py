"""A matrix of low rank, held as two factors: what a coarse grid lost, for a few more bytes.

    w = b @ a        a (R, I), b (O, R)

Shapes: O outputs, I inputs, R rank; M, N any matrix.

"plain" factors have the dtype of the weight, as the scales of a grid have: one rule, and a float32 weight of full
rank comes back to its last digits. "mxint8" ones have 8 bits and an exponent per block of 16 (the MXINT of LQER,
arXiv 2402.02446): w = code * 2^(exponent - 7), code in -127 .. 127, 2^exponent the least power of two above the
block's largest value. Every such value is one of float16 and of bfloat16 too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tersely.errors import UsageError

Factors = Literal["plain", "mxint8"]
Inputs = Literal["quantized", "full"]
BLOCK = 16
_LEAVES = ("low_rank_a", "low_rank_b")
_SMALLEST_EXPONENT = -100


@dataclass(frozen=True)
class LowRankForm:
    """Two factors; `inputs`: which inputs they multiply where those of the weight are quantized."""

    kind: ClassVar[str] = "low_rank"

    rank: int
    factors: Factors
    inputs: Inputs

    @property
    def full_inputs(self) -> bool:
        return self.inputs == "full"

    def nbytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        if self.factors == "plain":
            return self.rank * (rows + columns) * dtype.itemsize
        return self.rank * (columns + -(-columns // BLOCK)) + rows * (self.rank + -(-self.rank // BLOCK))

    def read(self, stored: Mapping[str, Tensor], rows: int, columns: int, dtype: torch.dtype) -> LowRank:  # noqa: ARG002
        a, b = (
            stored[leaf]
            if self.factors == "plain"
            else _from_blocks(stored[leaf], stored[f"{leaf}_exponent"]).to(dtype)
            for leaf in _LEAVES
        )
        return LowRank(a, b, self)


@dataclass(frozen=True)
class LowRank:
    """One part of an encoded weight: b @ a. `factorized` makes it of any two factors."""

    a_RI: Tensor
    """The values that are stored, in the dtype of the weight."""
    b_OR: Tensor
    form: LowRankForm

    def decode(self) -> Tensor:
        """b @ a, (O, I): a product in float32, rounded to the dtype of the weight."""
        return (self.b_OR.float() @ self.a_RI.float()).to(self.b_OR.dtype)

    def tensors(self) -> dict[str, Tensor]:
        factors = dict(zip(_LEAVES, (self.a_RI, self.b_OR), strict=True))
        if self.form.factors == "plain":
            return {leaf: factor.contiguous() for leaf, factor in factors.items()}
        stored = {}
        for leaf, factor in factors.items():
            stored[leaf], stored[f"{leaf}_exponent"] = _to_blocks(factor)
        return stored

    def sample(self, start: int, step: int) -> LowRank:
        """Every `step`-th output from `start`."""
        return LowRank(self.a_RI, self.b_OR[start::step], self.form)

    def split(self, rows: list[int]) -> list[LowRank]:
        """Cut along the outputs; each piece keeps the whole of a."""
        return [LowRank(self.a_RI, b_OR, self.form) for b_OR in torch.split(self.b_OR, rows)]


def is_product(forms: Sequence[object]) -> bool:
    """Whether a weight of these forms is a low-rank part alone, so that it runs as two products."""
    return len(forms) == 1 and isinstance(forms[0], LowRankForm) and not forms[0].full_inputs


def factors_of(parts: Sequence[object]) -> tuple[Tensor, Tensor] | None:
    """a (R, I) and b (O, R) of a weight that is a low-rank part alone; else None."""
    first = parts[0]
    return (first.a_RI, first.b_OR) if isinstance(first, LowRank) and is_product([first.form, *parts[1:]]) else None


def look_up(ids: Tensor, a_RI: Tensor, b_OR: Tensor) -> Tensor:
    """Rows `ids` of b @ a, (..., I), which is not formed."""
    return torch.nn.functional.linear(b_OR[ids], a_RI.t())


def check_low_rank(rank: int, factors: str, inputs: str) -> None:
    """UsageError for settings that do not exist."""
    if rank < 1:
        raise UsageError(f"rank={rank}: expected 1 or more (64 is usual)")
    for name, value, known in (("factors", factors, ("plain", "mxint8")), ("inputs", inputs, ("quantized", "full"))):
        if value not in known:
            raise UsageError(f"{name}={value!r}: expected {' or '.join(map(repr, known))}")


def factorized(b_OR: Tensor, a_RI: Tensor, form: LowRankForm, dtype: torch.dtype) -> LowRank:
    """Factors of any float dtype as they are stored for a weight of this dtype.

    They are balanced first: the largest |value| of each column of b becomes that of its row of a, which leaves
    their product and fits the range of float16.
    """
    above_R, below_R = b_OR.abs().amax(0), a_RI.abs().amax(1)
    ratio_R = torch.where((above_R > 0) & (below_R > 0), (below_R / above_R).sqrt(), 1.0)
    return LowRank(_stored(a_RI / ratio_R[:, None], form, dtype), _stored(b_OR * ratio_R, form, dtype), form)


def _stored(factor_MN: Tensor, form: LowRankForm, dtype: torch.dtype) -> Tensor:
    if form.factors == "mxint8":
        return _from_blocks(*_to_blocks(factor_MN, dtype)).to(dtype)
    return factor_MN.to(dtype).contiguous()


def _to_blocks(value_MN: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Codes (M, N) int8 and exponents (M, blocks) int8. What `_from_blocks` gives comes back as it was."""
    limits = torch.finfo(dtype or value_MN.dtype)
    # 2^(exponent - 7) must be a number of the dtype, be it a subnormal one.
    least = max(_SMALLEST_EXPONENT, round(math.log2(limits.smallest_normal * limits.eps)) + 7)
    rows, columns = value_MN.shape
    blocks = torch.nn.functional.pad(value_MN.double(), (0, -columns % BLOCK)).view(rows, -1, BLOCK)
    exponent = torch.frexp(blocks.abs().amax(-1)).exponent.clamp_(min=least)
    codes = torch.ldexp(blocks, 7 - exponent[:, :, None]).round_().clamp_(-127, 127)
    return codes.to(torch.int8).view(rows, -1)[:, :columns].contiguous(), exponent.to(torch.int8)


def _from_blocks(codes_MN: Tensor, exponent: Tensor) -> Tensor:
    """The values, (M, N) float32."""
    power = exponent.to(torch.int32).repeat_interleave(BLOCK, dim=1)[:, : codes_MN.shape[1]] - 7
    return torch.ldexp(codes_MN.float(), power)
