"""What a tuning method is: settings of how parts move, and on what they are tuned."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor

from tersely.codecs import Encoded, Form
from tersely.errors import UsageError
from tersely.methods.tune.trainable import Parts, movable

Loss = Literal["parent", "text"]
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
    betas: tuple[float, float] = (0.9, 0.99)
    """Of Adam: what it keeps of the averages of gradients, and of their squares, in each step."""
    epsilon: float = 1e-12
    """Of Adam. Gradients are means over tokens and may be small; its own 1e-8 would still some."""
    decay: float = 0.0
    """What latents lose in each step, relative to themselves and to their rate (AdamW)."""
    energy: float = 0.0
    """Taken off the loss for each unit of the sum of squares of all tuned weights; falls linearly to zero."""


class View(Protocol):
    """A tuned weight, and what may move of it."""

    @property
    def latents(self) -> Sequence[Tensor]:
        """What moves without units."""
        ...

    @property
    def values(self) -> Sequence[Tensor]:
        """What moves relative to its size."""
        ...

    def begin(self, share: float) -> None:
        """Before each step: `share` of all steps are done."""
        ...

    def moving(self) -> Tensor:
        """The weight, (O, I) float32, as it runs in a step; differentiable."""
        ...

    def settle(self, limit: float, forget: float) -> None:
        """After each step, with what the motion says."""
        ...

    def stored(self) -> Encoded:
        """As it would be stored now."""
        ...


@dataclass(frozen=True)
class TuneModel(ABC):
    """Tunes all weights at once towards the full-precision parent. Frozen dataclasses of settings that share these."""

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
    loss: Loss = "parent"
    """KL(parent || model), or the cross-entropy of the "text" itself."""

    def __post_init__(self) -> None:
        check_counts(0, own_texts=self.own_texts)
        check_counts(1, tokens=self.tokens, batch=self.batch, held_out=self.held_out, checks=self.checks)
        check_rates(norm_rate=self.norm_rate)
        if self.loss not in get_args(Loss):
            raise UsageError(f"loss={self.loss!r}: expected {' or '.join(map(repr, get_args(Loss)))}")

    @property
    @abstractmethod
    def motion(self) -> Motion:
        """How parts move."""

    @property
    def copies(self) -> float:
        """Float32 copies of a tuned weight in memory: of parts these are their latents, the gradients and both averages
        of Adam, where they began, their codes, and what waits for the backward pass."""
        return 10

    def check(self, columns: int, forms: Sequence[Form]) -> None:  # noqa: ARG002 (widths do not matter here)
        """UsageError where a weight with so many inputs, encoded in these forms, cannot be tuned."""
        if not self.norm_rate:
            check_moves(self.name, forms)

    def view(self, encoded: Encoded, weight_OI: Tensor, draw: torch.Generator) -> View:  # noqa: ARG002 (no chance here)
        """What moves of a weight that was encoded so; draw: for choices made by chance, on the weight's device."""
        return Parts(encoded, weight_OI, self.motion.reach)


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

    def check(self, columns: int, forms: Sequence[Form]) -> None:  # noqa: ARG002 (widths do not matter here)
        """UsageError where a weight with so many inputs, encoded in these forms, cannot be tuned."""
        check_moves(self.name, forms)


def check_moves(name: str, forms: Sequence[Form]) -> None:
    """UsageError for forms of which nothing can move."""
    if not movable(forms):
        raise UsageError(
            f"{name} moves integers, trits, tables and codebooks, and finds {', '.join(form.kind for form in forms)}; "
            "leave out weights that are stored so"
        )


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
