"""MXFP4: floats of four bits with a power of two for every 32 (OCP Microscaling Formats (MX) 1.0; arXiv 2310.10537).

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tersely.codecs import Encoded
from tersely.codecs.floats import MXFP4Form, Rule, fit_mxfp4
from tersely.measure import Statistics
from tersely.methods.encode.floating import Rounding, check_block, check_choice, needs_of, round_weight, work_of
from tersely.methods.protocol import Work


@dataclass(frozen=True)
class MXFP4:
    """Each weight goes to an E2M1 float (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) times its block's 2^e.

    4.25 bits per weight. The two rules in use for e differ where the largest |w| lies between 6 and 8 times 2^e:
    there the first saturates, and the second doubles every step.
    """

    name: ClassVar[str] = "mxfp4"
    row_wise: ClassVar[bool] = True
    keeps_zeros: ClassVar[bool] = True

    scale: Rule = "mse"
    """"floor": e = floor(log2 amax) - 2; "ceil": e = ceil(log2(amax / 6)); "mse": for each block the one of the two
    that loses less (of the output, with rounding = "gptq")."""
    rounding: Rounding = "gptq"
    """"gptq": with second-order error compensation, on calibration text; "nearest": without data."""

    def __post_init__(self) -> None:
        check_choice("scale", self.scale, Rule)
        check_choice("rounding", self.rounding, Rounding)

    @property
    def needs(self) -> frozenset[str]:
        return needs_of(self.rounding)

    def check(self, columns: int) -> None:
        check_block("MXFP4", MXFP4Form.group, columns)

    def forms(self, rows: int, columns: int) -> tuple[MXFP4Form]:  # noqa: ARG002 (of the protocol)
        return (MXFP4Form(),)

    def work(self, rows: int, columns: int) -> Work:
        return work_of(self.rounding, rows, columns, 2)

    def __call__(self, weight_OI: Tensor, stats: Statistics) -> Encoded:
        def fit(importance_I: Tensor | None) -> tuple[Tensor, None]:
            return fit_mxfp4(weight_OI, self.scale, importance_I), None

        return round_weight(weight_OI, stats, self.rounding, MXFP4Form(), fit)
