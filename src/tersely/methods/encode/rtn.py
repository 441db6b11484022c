"""Round to nearest: the data-free baseline that every other method is compared with.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tersely.codecs import Encoded, IntegerForm
from tersely.codecs.integer import SHRINKS, Clip, check_grid, check_group, fit_grid, round_to_grid
from tersely.measure import Statistics
from tersely.methods.protocol import Work


@dataclass(frozen=True)
class RTN:
    """Each weight goes to the nearest point of its group's grid; no data is needed.

    code = clip(round(w / scale) + zero, 0, 2^bits - 1)
    """

    name: ClassVar[str] = "rtn"
    needs: ClassVar[frozenset[str]] = frozenset()
    row_wise: ClassVar[bool] = True
    keeps_zeros: ClassVar[bool] = True

    bits: int = 4
    group: int = 128
    """Inputs that share a scale; 0: all inputs of an output."""
    symmetric: bool = True
    clip: Clip = "none"
    """"mse": search the range of each group that loses least."""

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group, self.clip)

    def check(self, columns: int) -> None:
        check_group(self.group, columns)

    def forms(self, rows: int, columns: int) -> tuple[IntegerForm]:  # noqa: ARG002 (of the protocol)
        return (IntegerForm(self.bits, self.group, self.symmetric),)

    def work(self, rows: int, columns: int) -> Work:  # noqa: ARG002 (of the protocol)
        return Work(passes=SHRINKS if self.clip == "mse" else 1)

    def __call__(self, weight_OI: Tensor, stats: Statistics) -> Encoded:  # noqa: ARG002 (of the protocol)
        scale, zero = fit_grid(
            weight_OI,
            bits=self.bits,
            group=self.group,
            symmetric=self.symmetric,
            clip=self.clip,
            scale_dtype=weight_OI.dtype,
        )
        return Encoded((round_to_grid(weight_OI, scale, zero, *self.forms(*weight_OI.shape)),))
