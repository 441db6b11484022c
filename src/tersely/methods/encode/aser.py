"""ASER: a low-rank matrix that makes up for what rounding loses on the activations that were seen
(Zhao et al., AAAI 2025, arXiv 2411.07762).

Shapes: O outputs, I inputs, R rank.

With S S^T = X X^T, ||D X|| = ||D S|| for every D. So with E = W - Q(W) and E S = U diag(sigma) V^T, the correction
U_R diag(sigma_R) V_R^T S^-1 is the best one of rank R on X, and what it leaves is sqrt(sum of sigma_i^2 beyond R).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tersely.codecs import Encoded, Form
from tersely.codecs.integer import Clip
from tersely.codecs.low_rank import Factors, Inputs, LowRank, LowRankForm, check_low_rank, factorized
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.encode.gptq import GPTQ
from tersely.methods.encode.rtn import RTN
from tersely.methods.encode.singular import largest_singular, singular_flops
from tersely.methods.protocol import Work

Rounding = Literal["nearest", "gptq"]


@dataclass(frozen=True)
class ASER:
    """Integers, and the best low-rank correction of their error on the calibration activations.

    W_hat = Q(W_s) + B A,    B A = the best rank-R approximation of W - Q(W_s), errors measured on X

    W_s is W with its `outliers` set to zero: the columns with the largest mean |x| * mean |w|, which the low-rank
    part takes over whole, so that they widen no grid. The Gram matrix is damped and factorized in float64; without
    tokens all inputs count alike, and the weight's note says so. The smoothing of activations that goes with it is
    `aser_scale`; it leaves the products, and so the choice of columns, as they are.
    """

    name: ClassVar[str] = "aser"
    needs: ClassVar[frozenset[str]] = frozenset({"gram", "absmean"})
    row_wise: ClassVar[bool] = False
    keeps_zeros: ClassVar[bool] = False

    bits: int = 4
    group: int = 0
    """Inputs that share a scale; 0: all inputs of an output."""
    symmetric: bool = True
    rounding: Rounding = "gptq"
    """How the integers are found: each to the nearest, or by GPTQ's sweep."""
    clip: Clip = "mse"
    """"mse": search the range of each group that loses least."""
    rank: int = 64
    """Of the correction; no more than the smaller side of the weight."""
    energy: float = 0.0
    """Above 0: the smallest rank whose singular values sum to this share of all, at most `rank`."""
    outliers: int = 32
    """Columns that only the low-rank part holds."""
    passes: int = 1
    """How often the two are found in turns, each beside the other, while that helps (CALDERA, arXiv 2405.18886)."""
    damping: float = 0.001
    """Added to the diagonal of the low-rank part's Gram matrix, relative to its mean."""
    factors: Factors = "plain"
    inputs: Inputs = "quantized"
    """What the low-rank part multiplies where the inputs are quantized: those, or the inputs as they come."""

    def __post_init__(self) -> None:
        check_low_rank(self.rank, self.factors, self.inputs)
        if self.rounding not in ("nearest", "gptq"):
            raise UsageError(f"rounding={self.rounding!r}: expected 'nearest' or 'gptq'")
        if not 0 <= self.energy <= 1:
            raise UsageError(f"energy={self.energy}: expected 0 (a fixed rank) to 1")
        if self.outliers < 0:
            raise UsageError(f"outliers={self.outliers}: expected 0 or more columns")
        if self.passes < 1:
            raise UsageError(f"passes={self.passes}: expected 1 (as published) or more")
        if not 0 < self.damping <= 1:
            raise UsageError(f"damping={self.damping}: expected more than 0 and at most 1 (0.001 is usual)")
        self._rounder()

    def check(self, columns: int) -> None:
        self._rounder().check(columns)
        if self.outliers > columns:
            raise UsageError(f"outliers={self.outliers}: the weight has {columns} columns in all; use fewer")

    def forms(self, rows: int, columns: int) -> tuple[Form, ...]:
        rank = min(self.rank, rows, columns)
        return (*self._rounder().forms(rows, columns), LowRankForm(rank, self.factors, self.inputs))

    def work(self, rows: int, columns: int) -> Work:
        work = self._rounder().work(rows, columns)
        # The root, the error times it, and what is made of that.
        flops = columns**3 / 3 + 2.0 * rows * columns**2 + singular_flops(rows, columns, self.rank, self.energy)
        memory = 8 * (2 * columns**2 + 4 * rows * columns)
        flops, passes = self.passes * (work.flops + flops), self.passes * (work.passes + 4)
        return replace(work, flops=flops, passes=passes, memory=max(work.memory, memory))

    def __call__(self, weight_OI: Tensor, stats: Statistics) -> Encoded:
        outliers = _outliers(stats.absmean_I, weight_OI.float().abs().mean(0), self.outliers)
        root = None if stats.gram_II is None or not stats.tokens else square_root(stats.gram_II, self.damping)
        lower_II, damping = root or (None, self.damping)
        seen = _without(stats, outliers)

        def rounded_beside(correction_OI: Tensor | float) -> Encoded:
            rest_OI = (weight_OI - correction_OI).to(weight_OI.dtype)
            rest_OI[:, outliers] = 0
            return self._rounder()(rest_OI, seen)

        rounded = rounded_beside(0.0)
        correction, lost = self._correction(weight_OI, rounded, lower_II, self.rank, self.energy)
        for _ in range(1, self.passes):
            again = rounded_beside(correction.decode())
            other, now = self._correction(weight_OI, again, lower_II, correction.form.rank, 0.0)
            if now >= lost:
                break
            rounded, correction, lost = again, other, now
        notes = [rounded.note]
        if lower_II is None:
            lacks = "the Gram matrix has no Cholesky factor with damping up to 1" if stats.tokens else "no tokens"
            notes.append(f"{lacks}: the low-rank part makes up for the error of the weight, not of its outputs")
        elif stats.tokens < stats.columns:
            few = f"{stats.tokens} tokens for {stats.columns} inputs"
            notes.append(f"{few}: directions without any count by damping alone")
        if damping > self.damping:
            notes.append(f"damping of the low-rank part raised to {damping:g}")
        if correction.form.rank < min(self.outliers, len(weight_OI)):
            notes.append(f"rank {correction.form.rank} is too low for {self.outliers} outliers")
        return Encoded((*rounded.parts, correction), "; ".join(filter(None, notes)))

    def _correction(
        self, weight_OI: Tensor, rounded: Encoded, lower_II: Tensor | None, rank: int, energy: float
    ) -> tuple[LowRank, float]:
        """The low-rank part beside these integers, and the squared error that the two leave."""
        error_OI = weight_OI.double() - rounded.decode().double()
        whitened_OI = error_OI if lower_II is None else error_OI @ lower_II
        left_OR, sigma_R, right_RI = largest_singular(whitened_OI, rank, energy)
        left = float(whitened_OI.square().sum() - sigma_R.square().sum())
        if lower_II is not None:
            right_RI = torch.linalg.solve_triangular(lower_II, right_RI, upper=False, left=False)
        form = LowRankForm(len(sigma_R), self.factors, self.inputs)
        return factorized(left_OR * sigma_R, right_RI, form, weight_OI.dtype), left

    def _rounder(self) -> RTN | GPTQ:
        method = GPTQ if self.rounding == "gptq" else RTN
        return method(bits=self.bits, group=self.group, symmetric=self.symmetric, clip=self.clip)


def aser_scale(absmean_I: Tensor, weights: Sequence[Tensor], outliers: int = 32) -> Tensor:
    """What to divide the inputs of weights (O, I) by, and multiply their columns with, before they are quantized.

    Of the `outliers` columns with the largest mean |x| * mean |w|, each takes mean |x| over the least of theirs,
    1 or more; all others 1. (I,) float32. Columns whose product is zero are none.
    """
    size_I = sum((w.float().abs().sum(0) for w in weights), torch.zeros_like(absmean_I))
    scale_I = torch.ones_like(absmean_I)
    chosen = _outliers(absmean_I, size_I, outliers)
    chosen = chosen[(absmean_I * size_I)[chosen] > 0]
    if len(chosen):
        scale_I[chosen] = absmean_I[chosen] / absmean_I[chosen].min()
    return scale_I


def square_root(gram_II: Tensor, damping: float) -> tuple[Tensor, float] | None:
    """Lower triangular S, float64, with S S^T = the Gram matrix + damping * mean of its diagonal, and the damping.

    Damping grows tenfold up to 1 where that fails; None where it fails still. A Gram matrix of zeros has the root 1.
    """
    mean = float(gram_II.diagonal().double().mean())
    while True:
        damped = gram_II.to(torch.float64, copy=True)
        damped.diagonal().add_(damping * mean if mean > 0 else 1.0)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed and lower.isfinite().all():
            return lower, damping
        if damping >= 1:
            return None
        damping = min(damping * 10, 1.0)


def _outliers(absmean_I: Tensor | None, size_I: Tensor, count: int) -> Tensor:
    """Indices of the columns with the largest products, that of the weights alone where nothing was measured."""
    product_I = size_I if absmean_I is None else absmean_I * size_I
    return torch.argsort(product_I, descending=True, stable=True)[:count]


def _without(stats: Statistics, columns: Tensor) -> Statistics:
    """Statistics in which these inputs are always zero, so that a sweep passes them by."""
    if stats.gram_II is None or not len(columns):
        return stats
    gram_II = stats.gram_II.clone()
    gram_II[columns] = 0
    gram_II[:, columns] = 0
    return replace(stats, gram_II=gram_II)
