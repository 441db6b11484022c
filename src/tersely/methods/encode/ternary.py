"""Ternary weights by the mean of their sizes (BitNet b1.58, arXiv 2402.17764), without training.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tersely.codecs import Encoded
from tersely.codecs.integer import check_group
from tersely.codecs.ternary import Packing, Ternary, TernaryForm, check_ternary, ternarize
from tersely.measure import Statistics
from tersely.methods.protocol import Work


@dataclass(frozen=True)
class TernaryRounding:
    """scale = mean |w|, trit = clip(round(w / scale), -1, 1); no data is needed.

    A model needs training to bear it: this is where that starts from and what it ends in.
    """

    name: ClassVar[str] = "ternary"
    needs: ClassVar[frozenset[str]] = frozenset()
    row_wise: ClassVar[bool] = False
    keeps_zeros: ClassVar[bool] = True

    group: int = 0
    """Inputs that share a scale; 0: all inputs of an output; -1: the whole weight."""
    packing: Packing = "trits"
    """"trits": five to a byte; "two_bits": sixteen to a word of 32 bits, quicker to take apart."""

    def __post_init__(self) -> None:
        check_ternary(self.group, self.packing)

    def check(self, columns: int) -> None:
        if self.group > 0:
            check_group(self.group, columns)

    def forms(self, rows: int, columns: int) -> tuple[TernaryForm]:  # noqa: ARG002 (of the protocol)
        return (TernaryForm(self.group, self.packing),)

    def work(self, rows: int, columns: int) -> Work:  # noqa: ARG002 (of the protocol)
        return Work()

    def __call__(self, weight_OI: Tensor, stats: Statistics) -> Encoded:  # noqa: ARG002 (of the protocol)
        codes, scale = ternarize(weight_OI, self.group)
        return Encoded((Ternary(codes, scale, *self.forms(*weight_OI.shape)),))
