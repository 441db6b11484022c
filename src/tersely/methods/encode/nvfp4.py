"""NVFP4: floats of four bits with an FP8 scale for every 16 (NVIDIA Blackwell; layout of ModelOpt, compressed-tensors).

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from tersely.codecs import Encoded
from tersely.codecs.floats import NVFP4_SHRINKS, NVFP4Form, fit_nvfp4
from tersely.measure import Statistics
from tersely.methods.encode.floating import Rounding, check_block, check_choice, needs_of, round_weight, work_of
from tersely.methods.protocol import Work

ScaleRule = Literal["absmax", "mse"]


@dataclass(frozen=True)
class NVFP4:
    """Each weight goes to an E2M1 float (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) times its block's scale.

    w_hat = e2m1 * s / d, s = e4m3(d amax / 6) of 16 inputs, d a power of two for the weight, 128 as a rule, since
    engines take one for all weights that they stack (q, k and v). 4.5 bits per weight.
    """

    name: ClassVar[str] = "nvfp4"
    # The outputs share d.
    row_wise: ClassVar[bool] = False
    keeps_zeros: ClassVar[bool] = True

    scale: ScaleRule = "mse"
    """"mse": for each block the multiple of s, 0.7 to 1.5, that loses least (of the output, with
    rounding = "gptq")."""
    rounding: Rounding = "gptq"
    """"gptq": with second-order error compensation, on calibration text; "nearest": without data."""

    def __post_init__(self) -> None:
        check_choice("scale", self.scale, ScaleRule)
        check_choice("rounding", self.rounding, Rounding)

    @property
    def needs(self) -> frozenset[str]:
        return needs_of(self.rounding)

    def check(self, columns: int) -> None:
        check_block("NVFP4", NVFP4Form.group, columns)

    def forms(self, rows: int, columns: int) -> tuple[NVFP4Form]:  # noqa: ARG002 (of the protocol)
        return (NVFP4Form(),)

    def work(self, rows: int, columns: int) -> Work:
        return work_of(self.rounding, rows, columns, len(NVFP4_SHRINKS) if self.scale == "mse" else 1)

    def __call__(self, weight_OI: Tensor, stats: Statistics) -> Encoded:
        def fit(importance_I: Tensor | None) -> tuple[Tensor, Tensor]:
            return fit_nvfp4(weight_OI, self.scale, importance_I)

        return round_weight(weight_OI, stats, self.rounding, NVFP4Form(), fit)
