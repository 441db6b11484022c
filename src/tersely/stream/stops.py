"""The places where a paged forward stops, and what its reader gets there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tersely.graph import Weight
from tersely.measure import Statistics

SURVEY = "survey"
"""The stage before all others, where what was asked of a whole block is known and nothing in it has changed."""

TUNE = "tune"
"""The stage after all others, where a block has run as it is encoded and may yet be tuned."""

Measured = Mapping[str, frozenset[str]]
"""Stage -> what is gathered of its activations (MEASURES)."""


@dataclass(frozen=True)
class Stop:
    """A place where every flow stands: before a stage whose statistics are complete, or (stage None) behind a block."""

    unit: str
    stage: str | None
    statistics: Mapping[str, Statistics]
    """By the name of the activations (Weight.statistics)."""
    replace: Callable[[Weight, Value], None]
    """Put another tensor into the running model."""
    recorded: Recorded | None = None
    """At the stage TUNE."""
    passed: Sequence[tuple[Tensor, Tensor]] = ()
    """Behind a block: what came to it and what it gave, of each micro-batch."""


@dataclass(frozen=True)
class Recorded:
    """What a block got, what it should give, and how to ask what it would give."""

    inputs: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]
    """Positional and named arguments of its forward, one micro-batch each."""
    targets: Sequence[Tensor]
    """What it gives in the model as it lies in the checkpoint, in which nothing before it is encoded either (but for
    the encoder, where the block is a decoder's)."""
    forward: Callable[[Mapping[str, Tensor], tuple[tuple[Any, ...], Mapping[str, Any]]], Tensor]
    """Its output with other weights: by stored name, (outputs, inputs), of any float dtype; gradients flow to them."""


@dataclass(frozen=True)
class Value:
    """A tensor as it runs; linear weights as (outputs, inputs)."""

    tensor: Tensor
    rounded: Callable[[Tensor], Tensor] | None = None
    """What its inputs, (..., I), are rounded to."""
    full: Tensor | None = None
    """A share of it that meets the inputs before they are rounded."""
    factors: tuple[Tensor, Tensor] | None = None
    """a (R, I) and b (O, R) where it is b @ a and runs as two products."""
