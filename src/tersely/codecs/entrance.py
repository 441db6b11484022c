"""What the inputs of a weight go through before they meet it.

Shapes: I inputs, ... leading axes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tersely.codecs.activations import ACTIVATIONS
from tersely.hadamard import hadamard


@dataclass(frozen=True, eq=False)
class Entrance:
    """x (..., I) -> round(x H): first a Hadamard product, then a quantizer; both may be missing."""

    hadamard: int = 0
    activations: str = ""
    scale: Tensor | None = None
    """The static scale of the quantizer, where it has one."""

    def transformed(self, x: Tensor) -> Tensor:
        """x H, run by run."""
        return hadamard(x, self.hadamard) if self.hadamard else x

    def rounded(self, x: Tensor) -> Tensor:
        """What the quantizer leaves of transformed inputs."""
        return ACTIVATIONS[self.activations](x, self.scale) if self.activations else x
