"""SmoothQuant: move the range of activations into the weights that read them (Xiao et al., ICML 2023, 2211.10438).

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersely.bases import Diagonal
from tersely.errors import UsageError
from tersely.measure import Statistics

_FLOOR = 1e-5


@dataclass(frozen=True)
class Smooth:
    """Divide each input by s and multiply the weights that read it by s, so that both have smaller ranges.

    s_j = max|x_j|^alpha / max|W_:j|^(1 - alpha), over all tokens and over all weights that read the space

    At alpha = 0.5 both ranges become equal; 0.8 to 0.9 is usual for Llama-like models. An input that is always zero, or
    that no weight reads, is left alone.
    """

    name: ClassVar[str] = "smooth"
    needs: ClassVar[frozenset[str]] = frozenset({"absmax"})

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha={self.alpha}: expected 0 (all range stays in the activations) to 1")

    def check(self, columns: int) -> None:
        pass

    def __call__(self, readers: Sequence[Tensor], stats: Statistics, seed: int) -> Diagonal:  # noqa: ARG002 (protocol)
        if stats.absmax_I is None:
            return Diagonal(torch.ones(stats.columns))
        weight_I = torch.stack([w.float().abs().amax(0) for w in readers]).amax(0)
        scale = stats.absmax_I.pow(self.alpha) / weight_I.clamp(min=_FLOOR).pow(1 - self.alpha)
        idle = (stats.absmax_I == 0) | (weight_I == 0)
        return Diagonal(1 / torch.where(idle, 1.0, scale.clamp(min=_FLOOR)))
