"""Learned rounding, block by block: AutoRound (Cheng et al., 2023, arXiv 2309.05516)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from tersely.methods.tune.protocol import Motion, TuneBlock, check_rates


@final
@dataclass(frozen=True)
class SignRound(TuneBlock):
    """Learns for every weight whether it is rounded up or down, so that a block gives its outputs.

        code = clip(round(w / scale + v))        |v| <= 1/2        scale = scale_0 (1 + value)

    v and the scales follow the signs of the gradients of the mean squared error of the block's output, with rates
    that fall linearly to zero. One block is in memory, and its recorded inputs and outputs. The best scales and codes
    that were seen are kept: the block is never worse than before. The authors start from the nearest codes and clip v
    and the ranges as here; from GPTQ's codes, v begins at zero at the point of each code's cell that is nearest to w.
    """

    name: ClassVar[str] = "signround"

    rate: float = 0.0
    """Of v and of the scales; 0: one over the steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rates(rate=self.rate)

    @property
    def motion(self) -> Motion:
        rate = self.rate or 1 / self.steps
        return Motion(rate, rate, signed=True, reach=0.5)
