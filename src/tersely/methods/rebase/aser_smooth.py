"""ASER's activation smoothing (Zhao et al., AAAI 2025, arXiv 2411.07762)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersely.bases import Diagonal
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.encode.aser import aser_scale


@dataclass(frozen=True)
class ASERSmooth:
    """Bring the inputs that stand out most down to the least of them; the `aser` step that follows keeps their columns.

    m_j = mean |x_j| / min of mean |x_i| over the `outliers` inputs with the largest mean |x| mean |w|; 1 for the others

    Set `outliers` as in the `aser` step.
    """

    name: ClassVar[str] = "aser_smooth"
    needs: ClassVar[frozenset[str]] = frozenset({"absmean"})

    outliers: int = 32

    def __post_init__(self) -> None:
        if self.outliers < 1:
            raise UsageError(f"outliers={self.outliers}: at least 1 is expected; leave the step out to have none")

    def check(self, columns: int) -> None:
        pass

    def __call__(self, readers: Sequence[Tensor], stats: Statistics, seed: int) -> Diagonal:  # noqa: ARG002 (protocol)
        if stats.absmean_I is None:
            return Diagonal(torch.ones(stats.columns))
        return Diagonal(1 / aser_scale(stats.absmean_I, readers, self.outliers))
