"""Rows drawn close to the mean row, as the old rows are spread.

Shapes: V old rows, N missing ones, D coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersely.errors import UsageError
from tersely.vocabulary.initialise.protocol import CHUNK_BYTES, Gap, Need, Rules, Tables, moments


@dataclass(frozen=True)
class Multivariate:
    """The strong simple baseline of constrained word2vec's authors (Mundra et al., CoNLL 2024).

    row ~ N(mu, scale * Sigma), mu and Sigma mean and covariance of the old rows; with scale = 0 all rows are mu, and
    the sum over exp(logits) grows by a factor of N / V at most

    It needs no text and no cutting of tokens, and hardly ever lets a new token win.
    """

    scale: float = 1e-5
    name: ClassVar[str] = "multivariate"
    convex: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.scale >= 0:
            raise UsageError(f"scale={self.scale:g}: expected 0 (all rows the mean) or more")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset()

    def __call__(self, gap: Gap, tables: Tables, donor: Tables | None, seed: int) -> Rules:  # noqa: ARG002 (protocol)
        return Rules(*(Spread(len(gap.missing_N), self.scale, own) for own in (2 * seed, 2 * seed + 1)))


@dataclass(frozen=True)
class Spread:
    """So many rows around the mean."""

    count: int
    scale: float
    seed: int

    @property
    def covered_N(self) -> Tensor:
        return torch.ones(self.count, dtype=torch.bool)

    def __call__(self, matrix_VD: Tensor) -> Tensor:
        """Uses 24 D^2 bytes beside the result."""
        mean_D = moments(matrix_VD)[0]
        columns = len(mean_D)
        drawn_ND = mean_D.float().expand(self.count, -1).clone()
        if self.scale == 0:
            return drawn_ND
        covariance_DD = torch.zeros((columns, columns), dtype=torch.float64)
        for part in torch.split(matrix_VD, max(1, CHUNK_BYTES // (8 * columns))):
            away = part.double() - mean_D
            covariance_DD.addmm_(away.t(), away)
        covariance_DD /= max(1, len(matrix_VD) - 1)
        # Fewer rows than coordinates leave it singular.
        covariance_DD.diagonal().add_(1e-6 * covariance_DD.diagonal().mean() + torch.finfo(torch.float64).tiny)
        spread_DD = torch.linalg.cholesky(covariance_DD).mul_(self.scale**0.5).float()
        generator = torch.Generator().manual_seed(self.seed)
        for part in torch.split(drawn_ND, max(1, CHUNK_BYTES // (8 * columns))):
            part.addmm_(torch.randn(part.shape, generator=generator), spread_DD.t())
        return drawn_ND
