"""GPTQ: rounding with second-order error compensation (Frantar et al., ICLR 2023, arXiv 2210.17323).

Shapes: O outputs, I inputs, G groups per row. The loop is in `sweep`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersely.codecs import Encoded, IntegerForm
from tersely.codecs.integer import SHRINKS, Clip, Integers, check_grid, check_group, fit_grid, round_to_grid
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.encode.sweep import Factor, prepare, sweep
from tersely.methods.protocol import Work

_SWEEP_ELEMENTS = 1 << 24
"""Of a weight whose rows are swept together."""


@dataclass(frozen=True)
class GPTQ:
    """Minimise ||(W - W_hat) X|| on a fixed grid, column by column, each column making up for those before it.

    Grids are fitted beforehand on the unmodified weight ("static groups"), so that act-order costs nothing when
    the model runs. Columns whose input is always zero keep their rounded value. Where the factorization fails,
    the damping grows tenfold up to 1 and then the weight is rounded to nearest, and says so. So it does when
    fewer tokens than `minimum_tokens` per input reached it: its Gram matrix says too little (rare experts).
    """

    name: ClassVar[str] = "gptq"
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    row_wise: ClassVar[bool] = True
    keeps_zeros: ClassVar[bool] = True

    bits: int = 4
    group: int = 128
    """Inputs that share a scale; 0: all inputs of an output."""
    symmetric: bool = True
    clip: Clip = "mse"
    """"mse": search the range of each group that loses least, inputs weighted by their mean square."""
    damping: float = 0.01
    """Added to the diagonal, relative to its mean."""
    act_order: bool = True
    """Take the inputs with the largest mean square first."""
    minimum_tokens: float = 1.0

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group, self.clip)
        if not 0 < self.damping <= 1:
            raise UsageError(f"damping={self.damping}: expected more than 0 and at most 1 (0.01 is usual)")
        if not self.minimum_tokens >= 0:
            raise UsageError(f"minimum_tokens={self.minimum_tokens}: expected 0 or more")

    def check(self, columns: int) -> None:
        check_group(self.group, columns)

    def forms(self, rows: int, columns: int) -> tuple[IntegerForm]:  # noqa: ARG002 (of the protocol)
        return (IntegerForm(self.bits, self.group, self.symmetric),)

    def work(self, rows: int, columns: int) -> Work:
        flops = 2.0 * rows * columns * columns + columns**3 / 3
        return Work(flops=flops, passes=SHRINKS if self.clip == "mse" else 1, loops=columns)

    def __call__(self, weight_OI: Tensor, stats: Statistics) -> Encoded:
        (form,) = self.forms(*weight_OI.shape)
        factor, importance, note = prepare(
            stats, damping=self.damping, act_order=self.act_order, minimum_tokens=self.minimum_tokens
        )
        scale, zero = fit_grid(
            weight_OI,
            bits=self.bits,
            group=self.group,
            symmetric=self.symmetric,
            clip=self.clip,
            scale_dtype=weight_OI.dtype,
            importance_I=importance,
        )
        if factor is None:
            return Encoded((round_to_grid(weight_OI, scale, zero, form),), note)
        codes = torch.empty(weight_OI.shape, dtype=torch.uint8, device=weight_OI.device)
        step = max(1, _SWEEP_ELEMENTS // weight_OI.shape[1])
        for a in range(0, len(codes), step):
            rows = slice(a, a + step)
            codes[rows] = swept_codes(
                weight_OI[rows].float(),
                factor,
                scale[rows],
                None if zero is None else zero[rows],
                self.bits,
                None if stats.kept_OI is None else stats.kept_OI[rows],
            )
        return Encoded((Integers(codes, scale, zero, form),), note)


def swept_codes(
    weight_OI: Tensor,
    factor: Factor,
    scale_OG: Tensor,
    zero_OG: Tensor | None,
    bits: int,
    kept_OI: Tensor | None = None,
) -> Tensor:
    """Codes, (O, I) uint8, of a float32 weight swept onto a grid; of zero where `kept_OI` does not hold."""
    rows, columns = weight_OI.shape
    group = columns // scale_OG.shape[1]
    top = float((1 << bits) - 1)
    codes_IO = torch.empty((columns, rows), dtype=torch.uint8, device=weight_OI.device)
    scale_GO = scale_OG.t().float().contiguous()
    middle = torch.full((rows,), float(1 << (bits - 1)), device=weight_OI.device)
    zero_GO = None if zero_OG is None else zero_OG.t().float().contiguous()
    stored = scale_OG.dtype
    kept_IO = None if kept_OI is None else kept_OI.t().float().contiguous()

    def rounded(column: int, target_O: Tensor) -> Tensor:
        scale_O = scale_GO[column // group]
        if kept_IO is not None:
            target_O = target_O * kept_IO[column]
        zero_O = middle if zero_GO is None else zero_GO[column // group]
        code_O = torch.div(target_O, scale_O).round_().add_(zero_O).clamp_(0.0, top)
        codes_IO[column] = code_O
        value_O = code_O.sub_(zero_O).mul_(scale_O)
        return value_O if stored == torch.float32 else value_O.to(stored).float()

    sweep(weight_OI, factor, rounded)
    return codes_IO.t().contiguous()
