"""Magnitude pruning: the smallest weights become zero. The baseline that every other sparsity is compared with.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from tersely.codecs import Encoded
from tersely.codecs.dense import Dense, DenseForm
from tersely.measure import Statistics
from tersely.methods.encode.floating import check_choice
from tersely.methods.encode.masks import (
    SPARSITY,
    check_columns,
    check_sparsity,
    kept_by_row,
    largest,
    pruned,
    removed_of,
    sparse_form,
)
from tersely.methods.protocol import Work

Scope = Literal["tensor", "row"]


@dataclass(frozen=True)
class Magnitude:
    """Set the weights with the least |w| to zero; no data is needed.

    The published baseline compares all weights of a tensor. Exactly as many become zero as are asked for: of equal
    ones, the first.
    """

    name: ClassVar[str] = "magnitude"
    needs: ClassVar[frozenset[str]] = frozenset()
    keeps_zeros: ClassVar[bool] = True

    sparsity: float = SPARSITY
    """Share of the weights that become zero."""
    pattern: str = ""
    """"2:4": of every 4 consecutive inputs 2 are kept; "": no pattern."""
    scope: Scope = "tensor"
    """What is compared: all of the "tensor", or each "row" by itself."""

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity, self.pattern)
        check_choice("scope", self.scope, Scope)

    @property
    def row_wise(self) -> bool:
        return bool(self.pattern) or self.scope == "row"

    def check(self, columns: int) -> None:
        check_columns(self.pattern, columns)

    def forms(self, rows: int, columns: int) -> tuple[DenseForm]:
        if self.row_wise:
            return (sparse_form(self.sparsity, self.pattern, columns),)
        return (sparse_form(self.sparsity, "", rows * columns),)

    def work(self, rows: int, columns: int) -> Work:
        return Work(passes=8, memory=16 * rows * columns)

    def __call__(self, weight_OI: Tensor, stats: Statistics) -> Encoded:  # noqa: ARG002 (of the protocol)
        size_OI = weight_OI.abs().float()
        if self.row_wise:
            kept_OI = kept_by_row(size_OI, self.sparsity, self.pattern)
        else:
            removed = removed_of(size_OI.numel(), self.sparsity)
            kept_OI = ~largest(-size_OI.flatten(), removed).view(size_OI.shape)
        return Encoded((Dense(pruned(weight_OI, kept_OI)),))
