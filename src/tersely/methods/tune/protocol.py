"""What a tuning method is: settings of how parts move, and on what they are tuned."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from tersely.errors import UsageError

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, 0 to 1."""


@dataclass(frozen=True)
class Motion:
    """How parts move in a step of the descent."""

    rate: float
    """Of latents, in steps of their grids."""
    value_rate: float
    """Of scales and codebooks, relative to their sizes."""
    signed: bool = False
    """Only the signs of the gradients count; else Adam."""
    limit: float = 1.0
    """Share of the codes of a part that may change in one step."""
    forget: float = 0.0
    """Share of its distance from its code that a latent forgets in each step."""
    reach: float = math.inf
    """How far latents may go from where they began, in steps of their grids."""


@dataclass(frozen=True)
class TuneModel(ABC):
    """Tunes all parts at once towards the full-precision parent. Frozen dataclasses of settings, which share these."""

    name: ClassVar[str]

    tokens: int = 1_000_000
    """That pass through the model, over all steps."""
    batch: int = 2048
    """Tokens of a step."""
    own_texts: int = 1024
    """Sequences that the parent writes, at temperature 1."""
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
        check_rates(norm_rate=self.norm_rate)

    @property
    @abstractmethod
    def motion(self) -> Motion:
        """How parts move."""


@dataclass(frozen=True)
class TuneBlock(ABC):
    """Tunes the parts of one block towards its outputs. Frozen dataclasses of settings, which share these."""

    name: ClassVar[str]

    steps: int = 200
    batch: int = 8
    """Sequences of a step."""
    held_out: int = 16
    """Sequences that only choose the best; 0: it is chosen on those that it is tuned on."""
    checks: int = 10
    """Times that the best is looked for."""

    def __post_init__(self) -> None:
        check_counts(0, held_out=self.held_out)
        check_counts(1, steps=self.steps, batch=self.batch, checks=self.checks)

    @property
    @abstractmethod
    def motion(self) -> Motion:
        """How parts move."""


def check_share(name: str, value: float) -> None:
    """UsageError for what is not a share."""
    if not 0 <= value <= 1:
        raise UsageError(f"{name}={value}: expected a share, 0 to 1")


def check_rates(**rates: float) -> None:
    """UsageError for a rate below zero."""
    for name, rate in rates.items():
        if not 0 <= rate < math.inf:
            raise UsageError(f"{name}={rate}: expected 0 (nothing moves) or more")


def check_counts(least: int, **counts: int) -> None:
    """UsageError for a count below the least."""
    for name, count in counts.items():
        if count < least:
            raise UsageError(f"{name}={count}: expected {least} or more")
