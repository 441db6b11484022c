"""NF4: 4-bit codes at the quantiles of a normal distribution (QLoRA, Dettmers et al., NeurIPS 2023, arXiv 2305.14314).

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tersely.codecs import Encoded
from tersely.codecs.codebook import NormalFloatForm, round_to_levels
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.protocol import Work


@dataclass(frozen=True)
class NF4:
    """Each weight goes to the nearest of 16 fixed levels times its block's largest magnitude; no data is needed.

    code = argmin_k |w / absmax - level_k|,   w_hat = level_code * absmax

    Blocks are taken row by row and may cross rows, so that any number of inputs will do. With `double` the magnitudes
    are stored in 8 bits (the signed dynamic code, less their mean, 256 to a scale): 4.127 bits per weight instead of
    4.5. Weights are rounded with the magnitudes as they are stored.
    """

    name: ClassVar[str] = "nf4"
    needs: ClassVar[frozenset[str]] = frozenset()
    row_wise: ClassVar[bool] = False
    keeps_zeros: ClassVar[bool] = True

    block: int = 64
    """Weights that share a magnitude."""
    double: bool = True
    """Double quantization: store the magnitudes in 8 bits."""

    def __post_init__(self) -> None:
        if self.block < 1:
            raise UsageError(f"block={self.block}: expected 1 or more (64 is usual)")

    def check(self, columns: int) -> None:
        """Every number of inputs can be taken."""

    def forms(self, rows: int, columns: int) -> tuple[NormalFloatForm]:  # noqa: ARG002 (of the protocol)
        return (NormalFloatForm(self.block, self.double),)

    def work(self, rows: int, columns: int) -> Work:  # noqa: ARG002 (of the protocol)
        return Work(passes=8)

    def __call__(self, weight_OI: Tensor, stats: Statistics) -> Encoded:  # noqa: ARG002 (of the protocol)
        return Encoded((round_to_levels(weight_OI, *self.forms(*weight_OI.shape)),))
