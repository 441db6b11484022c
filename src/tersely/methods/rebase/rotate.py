"""Rotation of a space by a random Hadamard matrix (QuaRot: Ashkboos et al., NeurIPS 2024, arXiv 2404.00456)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tersely.bases import Orthogonal
from tersely.hadamard import orthogonal
from tersely.measure import Statistics


@dataclass(frozen=True)
class Rotate:
    """Spread what stands out in a few coordinates over all of them; folded into the weights, free when the model runs.

    `residual` is the space to rotate before weights and activations are rounded; `v` rotates inside the heads. What
    cannot be folded (the inputs of down_proj, o_proj across heads) is the setting `hadamard` of a step that encodes.
    The gains of the norms are folded into what reads them first, and a tied head is stored on its own.
    """

    name: ClassVar[str] = "rotate"
    needs: ClassVar[frozenset[str]] = frozenset()

    def check(self, columns: int) -> None:
        pass

    def __call__(self, readers: Sequence[Tensor], stats: Statistics, seed: int) -> Orthogonal:  # noqa: ARG002 (protocol)
        return Orthogonal(orthogonal(stats.columns, seed))
