"""DSnoT: a mask refined by swaps, without training (Zhang et al., ICLR 2024, arXiv 2310.08915).

Shapes: O outputs, I inputs, M inputs of a pattern.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tersely.codecs import Encoded
from tersely.codecs.dense import Dense, DenseForm
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.encode.floating import check_choice
from tersely.methods.encode.magnitude import Magnitude
from tersely.methods.encode.masks import SPARSITY, check_columns, check_sparsity, numbers, pruned, sparse_form
from tersely.methods.encode.sparsegpt import SparseGPT
from tersely.methods.encode.wanda import Wanda, importance
from tersely.methods.protocol import Encode, Work

Start = Literal["wanda", "magnitude", "sparsegpt"]
_LEAST_VARIANCE = 1e-6
"""Of an input, relative to their mean."""


@dataclass(frozen=True)
class DSnoT:
    """From another method's mask, swap kept and removed weights of an output while its mean nears the source's.

    With c_j = w_j E[x_j], the removed weights P of an output change its mean by e = sum over P of c_j. As long as |e|
    is above `threshold` sum |c_j|, at most `cycles` times: the removed weight with the largest
    sign(e) c_g / Var[x_g]^power returns, and the kept one with the least Wanda score among those with sign(e) c_k < 0
    goes (with a pattern: the one with the least among the M inputs around g). A swap is made only if |e| falls; each
    weight moves once at most. Weights that stay are those of the source, whatever the start makes of them.
    """

    name: ClassVar[str] = "dsnot"
    row_wise: ClassVar[bool] = True
    keeps_zeros: ClassVar[bool] = True

    sparsity: float = SPARSITY
    """Share of each output's weights that become zero."""
    pattern: str = ""
    """"2:4": of every 4 consecutive inputs 2 are kept; "": no pattern."""
    start: Start = "wanda"
    """The method whose mask is refined, with its own defaults."""
    cycles: int = 50
    threshold: float = 0.01
    power: float = 1.0
    """Of the variance; 0: it does not count."""

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity, self.pattern)
        check_choice("start", self.start, Start)
        if self.cycles < 0:
            raise UsageError(f"cycles={self.cycles}: expected 0 or more (50 is usual)")
        if not self.threshold >= 0:
            raise UsageError(f"threshold={self.threshold}: expected 0 or more (0.01 is usual)")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"mean", "square"}) | self._first.needs

    @property
    def _first(self) -> Encode:
        if self.start == "magnitude":
            return Magnitude(self.sparsity, self.pattern, scope="row")
        if self.start == "sparsegpt":
            return SparseGPT(self.sparsity, self.pattern, scope="row", update=False)
        return Wanda(self.sparsity, self.pattern)

    def check(self, columns: int) -> None:
        check_columns(self.pattern, columns)

    def forms(self, rows: int, columns: int) -> tuple[DenseForm]:  # noqa: ARG002 (of the protocol)
        return (sparse_form(self.sparsity, self.pattern, columns),)

    def work(self, rows: int, columns: int) -> Work:
        first = self._first.work(rows, columns)
        return Work(first.flops, first.passes + 6 * self.cycles, first.loops + self.cycles, 32 * rows * columns)

    def __call__(self, weight_OI: Tensor, stats: Statistics) -> Encoded:
        first = self._first(weight_OI, stats)
        kept_OI = first.decode() != 0
        if stats.mean_I is None or stats.squares_I is None:
            return Encoded((Dense(pruned(weight_OI, kept_OI)),), first.note)
        score_OI, _ = importance(weight_OI, stats, 0.0)
        share_OI = weight_OI.float() * stats.mean_I
        variance_I = stats.squares_I / stats.tokens - stats.mean_I.square()
        variance_I = variance_I.clamp(min=max(float(variance_I.mean()) * _LEAST_VARIANCE, 1e-30))
        swapped_OI = self._swapped(kept_OI, share_OI, share_OI / variance_I**self.power, score_OI)
        return Encoded((Dense(pruned(weight_OI, swapped_OI)),), first.note)

    def _swapped(self, kept_OI: Tensor, share_OI: Tensor, gain_OI: Tensor, score_OI: Tensor) -> Tensor:
        """The mask after its swaps. share: c; gain: c / Var^power."""
        kept_OI, moved_OI = kept_OI.clone(), torch.zeros_like(kept_OI)
        bound_O = self.threshold * share_OI.abs().sum(1)
        rest_O = torch.where(kept_OI, 0, share_OI).sum(1)
        for _ in range(self.cycles):
            rows = (rest_O.abs() > bound_O).nonzero()[:, 0]
            if not len(rows):
                break
            sign = rest_O[rows].sign()[:, None]
            kept, moved, share = kept_OI[rows], moved_OI[rows], share_OI[rows]
            grown = (sign * gain_OI[rows]).masked_fill(kept | moved, -torch.inf).argmax(1, keepdim=True)
            free = kept & ~moved
            if self.pattern:
                m = numbers(self.pattern)[1]
                places = torch.arange(kept.shape[1], device=kept.device)
                free &= places // m == grown // m
            else:
                free &= sign * share < 0
            gone = score_OI[rows].masked_fill(~free, torch.inf).argmin(1, keepdim=True)
            may_O = (free.any(1, keepdim=True) & ~(kept | moved).gather(1, grown))[:, 0]
            rest = rest_O[rows] - (share.gather(1, grown) - share.gather(1, gone))[:, 0]
            better = may_O & (rest.abs() < rest_O[rows].abs())
            if not bool(may_O.any()):
                break
            # What would not help is not tried again.
            moved_OI[rows, grown[:, 0]] = True
            own, grown, gone = rows[better], grown[better, 0], gone[better, 0]
            moved_OI[own, gone] = True
            kept_OI[own, grown], kept_OI[own, gone] = True, False
            rest_O[own] = rest[better]
        return kept_OI
