"""Wanda: pruning by weights and activations (Sun et al., ICLR 2024, arXiv 2306.11695).

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tersely.codecs import Encoded
from tersely.codecs.dense import Dense, DenseForm
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.encode.masks import SPARSITY, check_columns, check_sparsity, kept_by_row, pruned, sparse_form
from tersely.methods.protocol import Work


@dataclass(frozen=True)
class Wanda:
    """Set the weights of each output with the least |w_oj| sqrt(sum over tokens of x_j^2) to zero.

    The others stay as they are. Without enough tokens the weights alone are compared, and the note says so.
    """

    name: ClassVar[str] = "wanda"
    needs: ClassVar[frozenset[str]] = frozenset({"square"})
    row_wise: ClassVar[bool] = True
    keeps_zeros: ClassVar[bool] = True

    sparsity: float = SPARSITY
    """Share of each output's weights that become zero."""
    pattern: str = ""
    """"2:4": of every 4 consecutive inputs 2 are kept; "": no pattern."""
    minimum_tokens: float = 0.1
    """Per input; with fewer, their sizes say too little."""

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity, self.pattern)
        if not self.minimum_tokens >= 0:
            raise UsageError(f"minimum_tokens={self.minimum_tokens}: expected 0 or more")

    def check(self, columns: int) -> None:
        check_columns(self.pattern, columns)

    def forms(self, rows: int, columns: int) -> tuple[DenseForm]:  # noqa: ARG002 (of the protocol)
        return (sparse_form(self.sparsity, self.pattern, columns),)

    def work(self, rows: int, columns: int) -> Work:
        return Work(passes=12, memory=16 * rows * columns)

    def __call__(self, weight_OI: Tensor, stats: Statistics) -> Encoded:
        score_OI, note = importance(weight_OI, stats, self.minimum_tokens)
        return Encoded((Dense(pruned(weight_OI, kept_by_row(score_OI, self.sparsity, self.pattern))),), note)


def importance(weight_OI: Tensor, stats: Statistics, minimum_tokens: float) -> tuple[Tensor, str]:
    """|w| times the size of the input, (O, I) float32; and what the user should know of it."""
    size_OI = weight_OI.abs().float()
    if stats.squares_I is None or stats.tokens < max(1, minimum_tokens * stats.columns):
        few = f"{stats.tokens} calibration tokens for {stats.columns} inputs, fewer than {minimum_tokens:g} per input"
        return size_OI, f"{few}: pruned by magnitude"
    return size_OI.mul_(stats.squares_I.sqrt()), ""
