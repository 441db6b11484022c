"""What a tuning method is: settings of how parts move, and on what they are tuned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

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


class TuneModel(Protocol):
    """Tunes all parts at once towards the full-precision parent. A frozen dataclass of settings."""

    name: ClassVar[str]

    @property
    def motion(self) -> Motion: ...
    @property
    def tokens(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def own_texts(self) -> int: ...
    @property
    def held_out(self) -> int: ...
    @property
    def checks(self) -> int: ...
    @property
    def norm_rate(self) -> float: ...
    @property
    def autocast(self) -> bool: ...


class TuneBlock(Protocol):
    """Tunes the parts of one block towards its outputs. A frozen dataclass of settings."""

    name: ClassVar[str]

    @property
    def motion(self) -> Motion: ...
    @property
    def steps(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def held_out(self) -> int: ...
    @property
    def checks(self) -> int: ...


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
