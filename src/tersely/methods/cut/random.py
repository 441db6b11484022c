"""Structures removed by chance: what every other choice has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersely.methods.cut.protocol import Kind, Structures


@dataclass(frozen=True)
class RandomChoice:
    """Remove structures by chance, by the recipe's seed."""

    name: ClassVar[str] = "random"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    @property
    def kinds(self) -> frozenset[Kind]:
        return frozenset({"neurons", "heads", "hidden", "experts"})

    def __call__(self, structures: Structures, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(structures.count, generator=generator, dtype=torch.float64)
