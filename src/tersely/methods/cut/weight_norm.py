"""Structures by the size of their weights: the magnitude baseline of structured pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersely.methods.cut.protocol import Kind, Structures


@dataclass(frozen=True)
class WeightNorm:
    """Keep what has large weights.

    score = sqrt(sum of w^2 over all weights that write or read the structure)
    """

    name: ClassVar[str] = "weight_norm"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    @property
    def kinds(self) -> frozenset[Kind]:
        return frozenset({"neurons", "heads", "hidden", "experts"})

    def __call__(self, structures: Structures, seed: int) -> Tensor:  # noqa: ARG002 (protocol)
        squares_G = torch.zeros(structures.count, dtype=torch.float64)
        for member in structures.members:
            squares_G += member.weight_GM.square().sum(1).double().cpu()
        return squares_G.sqrt()
