"""ASVD: two thin factors in place of a weight, truncated with its inputs weighed by their size (Yuan et al.,
arXiv 2312.05821).

Shapes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersely.codecs import Encoded, Form
from tersely.codecs.low_rank import Factors
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.encode.projection import check_ratio, project, project_rows, projection_work, thin_form
from tersely.methods.protocol import Work

_FLOOR = 1e-6


@dataclass(frozen=True)
class ASVD:
    """The best approximation of low rank, each input weighed by its mean size.

    W_hat = B A,    B A = the matrix of rank R that is nearest to W in ||(W - W_hat) diag(s)||,    s = a^alpha + 1e-6

    with a = mean |x| of each input and R = floor((1 - ratio) O I / (O + I)). alpha = 0 is the plain SVD of the weight.
    Every weight has the same ratio: the paper's search for a ratio of each is left out.
    """

    name: ClassVar[str] = "asvd"
    row_wise: ClassVar[bool] = False
    keeps_zeros: ClassVar[bool] = False

    ratio: float = 0.2
    """Share of the weight's parameters that is removed."""
    alpha: float = 0.5
    """How much the size of an input counts; 0: not at all, and nothing is measured."""
    multiple: int = 1
    """The rank is rounded down to a multiple of it, where it is at least that."""
    factors: Factors = "plain"
    """How the factors are stored: in the weight's dtype, or "mxint8", 8 bits with an exponent per block of 16."""

    def __post_init__(self) -> None:
        check_ratio(self.ratio, self.multiple, self.factors)
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha={self.alpha:g}: expected 0 (the plain SVD) to 1 (0.5 is usual)")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"absmean"} if self.alpha else ())

    def check(self, columns: int) -> None:
        pass

    def forms(self, rows: int, columns: int) -> tuple[Form, ...]:
        return (thin_form(rows, columns, self.ratio, self.multiple, self.factors),)

    def work(self, rows: int, columns: int) -> Work:
        return projection_work(rows, columns)

    def __call__(self, weight_OI: Tensor, stats: Statistics) -> Encoded:
        form = thin_form(len(weight_OI), stats.columns, self.ratio, self.multiple, self.factors)
        if self.alpha and stats.reads_O is not None:
            return Encoded((project_rows(weight_OI, (stats.reads_O.double() + 1) ** self.alpha, form),))
        note, scale_I = "", torch.ones_like(weight_OI[0], dtype=torch.float64)
        if self.alpha and stats.absmean_I is not None:
            scale_I = stats.absmean_I.double() ** self.alpha + _FLOOR
        elif self.alpha:
            note = "no tokens: all inputs count alike"
        return Encoded((project(weight_OI, weight_OI.double() * scale_I, form),), note)
