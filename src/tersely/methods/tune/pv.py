"""PV-Tuning (Malinovskii et al., NeurIPS 2024, arXiv 2405.14852)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from tersely.methods.tune.protocol import Motion, TuneModel, check_rates, check_share


@final
@dataclass(frozen=True)
class PV(TuneModel):
    """Tunes values (scales, codebooks) and codes in turns: values as usual, codes only a few at a time.

    P: Adam on the values, codes fixed. V: Adam on a copy of the weights gives where each code (each vector of codes)
    should lie; the share `change` of them that is farthest from there takes the nearest codes, all others keep
    theirs. So a step can be large enough to cross a cell, yet change little of the model. `forget` 0 keeps what has
    been gathered for the others, as the authors' recipe does; 1 starts anew in every step. The loss and the text are
    those of `distill`.
    """

    name: ClassVar[str] = "pv"

    rate: float = 0.003
    """Of the copies, in steps of their grids."""
    value_rate: float = 0.002
    """Of scales and codebooks, relative to their sizes."""
    change: float = 0.01
    """Share of the codes of a weight that may change in one step."""
    forget: float = 0.0
    """Share of its distance from its code that a copy forgets in each step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rates(rate=self.rate, value_rate=self.value_rate)
        check_share("change", self.change)
        check_share("forget", self.forget)

    @property
    def motion(self) -> Motion:
        return Motion(self.rate, self.value_rate, limit=self.change, forget=self.forget)
