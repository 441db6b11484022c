"""FineQuant: as fine a grid as the weight itself asks for (Kim et al., 2023, arXiv 2308.09723).

Shapes: O outputs, I inputs, G groups per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2
from typing import ClassVar

import torch
from torch import Tensor

from tersely.codecs import Encoded, IntegerForm
from tersely.codecs.integer import Integers, check_grid, fit_grid, round_to_grid
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.protocol import Work


@dataclass(frozen=True)
class FineQuant:
    """Round to nearest, with groups that shrink while that makes their ranges shrink; no data is needed.

    From one group per output, the group becomes the next smaller power of two that divides the inputs, as long as

        1 - (mean range of the smaller groups / mean range of the groups) >= shrink_threshold       range: max|w|

    per halving (a step to a quarter counts as two), the weight is rounded no worse, and the group is not below
    `min_group`. Each weight has the group that this ends at; the note says how it came about. The paper's own
    statistic and threshold could not be checked: this is its idea. In Gaussian weights the ranges shrink by 4 to 9 %
    per halving, down to groups of 64; with an outlier in every output, by more than 40 %.
    """

    name: ClassVar[str] = "finequant"
    needs: ClassVar[frozenset[str]] = frozenset()
    row_wise: ClassVar[bool] = False
    keeps_zeros: ClassVar[bool] = True

    bits: int = 4
    min_group: int = 64
    """A power of two."""
    shrink_threshold: float = 0.1

    def __post_init__(self) -> None:
        check_grid(self.bits, 0, "none")
        if self.min_group < 2 or self.min_group & (self.min_group - 1):
            raise UsageError(f"min_group={self.min_group}: expected a power of two (64 suits most engines)")
        if not 0 < self.shrink_threshold < 1:
            raise UsageError(f"shrink_threshold={self.shrink_threshold}: expected a share between 0 and 1")

    def check(self, columns: int) -> None:
        """Any number of inputs fits: one group per output always does."""

    def forms(self, rows: int, columns: int) -> tuple[IntegerForm]:  # noqa: ARG002 (of the protocol)
        return (self._form(([0, *self._groups(columns)])[-1]),)

    def work(self, rows: int, columns: int) -> Work:  # noqa: ARG002 (of the protocol)
        return Work(passes=3.0 * (1 + len(self._groups(columns))))

    def __call__(self, weight_OI: Tensor, stats: Statistics) -> Encoded:  # noqa: ARG002 (of the protocol)
        columns = weight_OI.shape[1]
        chosen, group = self._rounded(weight_OI, 0), columns
        reach, error = _mean_range(weight_OI, columns), _error(weight_OI, chosen)
        shrinks = []
        for smaller in self._groups(columns):
            next_reach = _mean_range(weight_OI, smaller)
            shrink = 1 - (next_reach / reach) ** (1 / log2(group / smaller)) if reach > 0 else 0.0
            shrinks.append(f"{shrink:.3f} at {smaller}")
            if shrink < self.shrink_threshold:
                break
            tried = self._rounded(weight_OI, smaller)
            next_error = _error(weight_OI, tried)
            if next_error > error:
                shrinks.append("which rounds worse")
                break
            chosen, group, reach, error = tried, smaller, next_reach, next_error
        size = f"groups of {group}" if group < columns else "one group per output"
        tail = f": ranges shrink by {', '.join(shrinks)}" if shrinks else ""
        return Encoded((chosen,), f"{size}{tail}")

    def _groups(self, columns: int) -> list[int]:
        """Powers of two below the inputs that divide them, from the largest to the smallest allowed."""
        largest = columns & -columns
        powers = [1 << i for i in range(largest.bit_length() - 1, 0, -1)]
        return [power for power in powers if self.min_group <= power < columns]

    def _form(self, group: int) -> IntegerForm:
        return IntegerForm(self.bits, group, symmetric=True)

    def _rounded(self, weight_OI: Tensor, group: int) -> Integers:
        scale, zero = fit_grid(
            weight_OI, bits=self.bits, group=group, symmetric=True, clip="none", scale_dtype=weight_OI.dtype
        )
        return round_to_grid(weight_OI, scale, zero, self._form(group))


def _mean_range(weight_OI: Tensor, group: int) -> float:
    return float(weight_OI.view(len(weight_OI), -1, group).abs().amax(-1).double().mean())


def _error(weight_OI: Tensor, part: Integers) -> float:
    return float((weight_OI.float() - part.decode().float()).square().sum(dtype=torch.float64))
