"""LQER and L2QER: the low-rank part of what rounding loses (Zhang et al., ICML 2024, arXiv 2402.02446).

Shapes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tersely.codecs import Encoded, Form
from tersely.codecs.integer import Clip
from tersely.codecs.low_rank import Factors, Inputs, LowRankForm, check_low_rank, factorized
from tersely.measure import Statistics
from tersely.methods.encode.rtn import RTN
from tersely.methods.encode.singular import largest_singular, singular_flops
from tersely.methods.protocol import Work

_FLOOR = 1e-4


@dataclass(frozen=True)
class LQER:
    """Integers rounded to nearest, and the best low-rank approximation of their error, inputs weighted by their size.

    W_hat = Q(W) + B A,    B A diag(s) = the best rank-R approximation of (W - Q(W)) diag(s)

    s = a / sqrt(min a * max a) with a = mean |x| of each input (L2QER), or 1 (LQER). The defaults are those of the
    paper for integers. There, a is the largest of the means of the calibration's batches; here it is the mean over
    all tokens, and never below 1e-4 of its own mean.
    """

    name: ClassVar[str] = "lqer"
    row_wise: ClassVar[bool] = False
    keeps_zeros: ClassVar[bool] = False

    bits: int = 4
    group: int = 128
    """Inputs that share a scale; 0: all inputs of an output."""
    symmetric: bool = True
    clip: Clip = "none"
    """"mse": search the range of each group that loses least."""
    scaled: bool = True
    """Weigh inputs by their mean size (L2QER); false: all alike (LQER)."""
    rank: int = 64
    """Of the correction; no more than the smaller side of the weight."""
    factors: Factors = "mxint8"
    """How the factors are stored: 8 bits with an exponent per block of 16, or "plain", in the weight's dtype."""
    inputs: Inputs = "quantized"
    """What the low-rank part multiplies where the inputs are quantized: those, or the inputs as they come."""

    def __post_init__(self) -> None:
        check_low_rank(self.rank, self.factors, self.inputs)
        self._rounder()

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"absmean"} if self.scaled else ())

    def check(self, columns: int) -> None:
        self._rounder().check(columns)

    def forms(self, rows: int, columns: int) -> tuple[Form, ...]:
        rank = min(self.rank, rows, columns)
        return (*self._rounder().forms(rows, columns), LowRankForm(rank, self.factors, self.inputs))

    def work(self, rows: int, columns: int) -> Work:
        work = self._rounder().work(rows, columns)
        flops = work.flops + singular_flops(rows, columns, self.rank)
        return replace(work, flops=flops, passes=work.passes + 4, memory=32 * rows * columns)

    def __call__(self, weight_OI: Tensor, stats: Statistics) -> Encoded:
        rounded = self._rounder()(weight_OI, stats)
        scale_I, note = torch.ones_like(weight_OI[0], dtype=torch.float64), ""
        if self.scaled and stats.absmean_I is not None:
            scale_I = lqer_scale(stats.absmean_I)
        elif self.scaled:
            note = "no tokens: all inputs count alike in the low-rank part"
        error_OI = weight_OI.double() - rounded.decode().double()
        left_OR, sigma_R, right_RI = largest_singular(error_OI * scale_I, self.rank)
        form = LowRankForm(len(sigma_R), self.factors, self.inputs)
        correction = factorized(left_OR * sigma_R, right_RI / scale_I, form, weight_OI.dtype)
        return Encoded((*rounded.parts, correction), note)

    def _rounder(self) -> RTN:
        return RTN(bits=self.bits, group=self.group, symmetric=self.symmetric, clip=self.clip)


def lqer_scale(absmean_I: Tensor) -> Tensor:
    """a / sqrt(min a * max a), float64; the same for inputs of any unit. Inputs of zero throughout: 1."""
    a_I = absmean_I.double()
    a_I = torch.maximum(a_I, _FLOOR * a_I.mean())
    return a_I / (a_I.min() * a_I.max()).sqrt() if a_I.max() > 0 else torch.ones_like(a_I)
