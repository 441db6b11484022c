"""SliceGPT: turn the residual stream into its principal directions and drop the last (Ashkboos et al., ICLR 2024,
arXiv 2401.15024), with one rotation for the whole model, so that an ordinary checkpoint comes out.

Shapes: D coordinates of the residual stream, K kept ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersely.methods.cut.protocol import Kind, Structures, Turning


@dataclass(frozen=True)
class SliceGPT(Turning):
    """Keep the directions in which the inputs of attention, MLP and head have most of their energy.

    C = sum over norms of the second moments of what they give, their gains taken out;  basis = its eigenvectors

    The authors take a basis for each norm and put a matrix into each residual connection, which no stock model has;
    with one basis for all norms the model stays what it is, only narrower.
    """

    name: ClassVar[str] = "slicegpt"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"second_moments"})

    @property
    def kinds(self) -> frozenset[Kind]:
        return frozenset({"hidden"})

    def __call__(self, structures: Structures, seed: int) -> Tensor:  # noqa: ARG002 (protocol)
        """In the basis of principal directions, the coordinates lie in the order of what they matter."""
        return -torch.arange(structures.count, dtype=torch.float64)

    def basis(self, moments_DD: Tensor, kept: int, *, centred: bool) -> Tensor:
        """An orthogonal matrix, (D, D) float32: x @ basis has most of its energy in the first K coordinates.

        The columns are eigenvectors, largest eigenvalue first, the largest entry of each positive. centred: for
        LayerNorm, which subtracts the mean over coordinates. There the all-ones vector is mapped to itself, and so is
        that over the first K coordinates of what is kept: K - 1 directions that have a mean of zero there too, and one
        that a LayerNorm over K coordinates removes.
        """
        size = len(moments_DD)
        moments = moments_DD.double()
        if not centred:
            return _directions(moments).float()
        mean_D = torch.full((size, 1), size**-0.5, dtype=torch.float64, device=moments.device)
        away_DD = torch.eye(size, dtype=torch.float64, device=moments.device) - mean_D @ mean_D.t()
        # The direction of the mean comes last.
        left_DD = away_DD @ moments @ away_DD - (1 + moments.trace()) * mean_D @ mean_D.t()
        directions = _directions(left_DD)[:, : size - 1]
        first, last = _without_mean(kept), _without_mean(size - kept)
        across = torch.cat([torch.full((kept,), ((size - kept) / kept) ** 0.5), torch.full((size - kept,), -1.0)])
        if kept < size:
            across[kept:] *= (kept / (size - kept)) ** 0.5
        onto = torch.zeros((size - 1, size), dtype=torch.float64)
        onto[: kept - 1, :kept] = first
        onto[kept - 1 : size - 2, kept:] = last
        if kept < size:
            onto[size - 2] = across.double() / across.double().norm()
        basis = directions @ onto.to(directions.device)
        return (basis + mean_D @ mean_D.t()).float()


def _directions(moments_DD: Tensor) -> Tensor:
    vectors: Tensor = torch.linalg.eigh(moments_DD).eigenvectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def _without_mean(size: int) -> Tensor:
    """Orthonormal rows, (size - 1, size), each with a sum of zero (Helmert)."""
    rows = torch.zeros((max(size - 1, 0), size), dtype=torch.float64)
    for k in range(1, size):
        rows[k - 1, :k] = 1.0
        rows[k - 1, k] = -k
        rows[k - 1] /= (k * (k + 1)) ** 0.5
    return rows
