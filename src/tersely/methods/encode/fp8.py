"""FP8: weights as E4M3 floats of eight bits (Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433).

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tersely.codecs import Encoded
from tersely.codecs.floats import BLOCK, FP8Form, Scales, fit_fp8
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.encode.floating import Rounding, check_choice, needs_of, round_weight, work_of
from tersely.methods.protocol import Work


@dataclass(frozen=True)
class FP8:
    """Each weight goes to the nearest E4M3 float: w_hat = e4m3(w / s) s, s = largest |w| / 448.

    Relative errors are at most 1/16 whatever the size of a weight, down to s / 64. Nearly lossless; engines that
    multiply in FP8 want `activations = "fp8"` with it.
    """

    name: ClassVar[str] = "fp8"
    keeps_zeros: ClassVar[bool] = True

    scales: Scales = "channel"
    """What shares a scale: "tensor", "channel" (the inputs of an output) or "block" (128 x 128)."""
    rounding: Rounding = "nearest"
    """"gptq": with second-order error compensation, on calibration text."""

    def __post_init__(self) -> None:
        check_choice("scales", self.scales, Scales)
        check_choice("rounding", self.rounding, Rounding)

    @property
    def needs(self) -> frozenset[str]:
        return needs_of(self.rounding)

    @property
    def row_wise(self) -> bool:
        return self.scales == "channel"

    def check(self, columns: int) -> None:
        if self.scales == "block" and columns % BLOCK:
            raise UsageError(f"scales='block': blocks of {BLOCK} do not divide {columns} inputs; use 'channel'")

    def forms(self, rows: int, columns: int) -> tuple[FP8Form]:  # noqa: ARG002 (of the protocol)
        return (FP8Form(self.scales),)

    def work(self, rows: int, columns: int) -> Work:
        return work_of(self.rounding, rows, columns, 1)

    def __call__(self, weight_OI: Tensor, stats: Statistics) -> Encoded:
        form = FP8Form(self.scales)
        return round_weight(weight_OI, stats, self.rounding, form, lambda _: (fit_fp8(weight_OI, self.scales), None))
