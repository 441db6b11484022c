"""Rows drawn from a normal distribution, coordinate by coordinate.

Shapes: V old rows, N missing ones, D coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersely.vocabulary.initialise.protocol import Gap, Need, Rules, Tables, moments


@dataclass(frozen=True)
class RandomNormal:
    """What a new token gets that nothing is known of.

    row ~ N(mu_j, sigma_j^2) in coordinate j, with the mean and the deviation of that coordinate over the old rows
    """

    name: ClassVar[str] = "random_normal"
    convex: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset()

    def __call__(self, gap: Gap, tables: Tables, donor: Tables | None, seed: int) -> Rules:  # noqa: ARG002 (protocol)
        return Rules(*(Drawn(len(gap.missing_N), own) for own in (2 * seed, 2 * seed + 1)))


@dataclass(frozen=True)
class Drawn:
    """So many rows, each coordinate by itself."""

    count: int
    seed: int

    @property
    def covered_N(self) -> Tensor:
        return torch.ones(self.count, dtype=torch.bool)

    def __call__(self, matrix_VD: Tensor) -> Tensor:
        mean_D, deviation_D = moments(matrix_VD)
        noise_ND = torch.randn((self.count, matrix_VD.shape[1]), generator=torch.Generator().manual_seed(self.seed))
        return noise_ND.mul_(deviation_D.float()).add_(mean_D.float())
