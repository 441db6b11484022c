"""PV-Tuning (Malinovskii et al., NeurIPS 2024, arXiv 2405.14852)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tersely.methods.tune.protocol import Motion, check_counts, check_rates, check_share


@dataclass(frozen=True)
class PV:
    """Tunes values (scales, codebooks) and codes in turns: values as usual, codes only a few at a time.

    P: Adam on the values, codes fixed. V: Adam on a copy of the weights gives where each code (each vector of codes)
    should lie; the share `change` of them that is farthest from there takes the nearest codes, all others keep
    theirs. So a step can be large enough to cross a cell, yet change little of the model. `forget` 0 keeps what has
    been gathered for the others, as the authors' recipe does; 1 starts anew in every step. The loss and the text are
    those of `distill`.
    """

    name: ClassVar[str] = "pv"

    tokens: int = 1_000_000
    """That pass through the model, over all steps."""
    batch: int = 2048
    """Tokens of a step."""
    own_texts: int = 1024
    """Sequences that the parent writes, at temperature 1."""
    rate: float = 0.003
    """Of the copies, in steps of their grids."""
    value_rate: float = 0.002
    """Of scales and codebooks, relative to their sizes."""
    change: float = 0.01
    """Share of the codes of a weight that may change in one step."""
    forget: float = 0.0
    """Share of its distance from its code that a copy forgets in each step."""
    norm_rate: float = 0.0
    """Of the norms' weights and biases; 0: they stay as they are."""
    held_out: int = 16
    """Calibration sequences that only choose the best."""
    checks: int = 8
    """Times that the best is looked for."""
    autocast: bool = False
    """Products in bfloat16: faster on GPUs, and on CPUs that multiply it; what moves stays in float32."""

    def __post_init__(self) -> None:
        check_counts(0, own_texts=self.own_texts)
        check_counts(1, tokens=self.tokens, batch=self.batch, held_out=self.held_out, checks=self.checks)
        check_rates(rate=self.rate, value_rate=self.value_rate, norm_rate=self.norm_rate)
        check_share("change", self.change)
        check_share("forget", self.forget)

    @property
    def motion(self) -> Motion:
        return Motion(self.rate, self.value_rate, limit=self.change, forget=self.forget)
