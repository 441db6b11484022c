"""One micro-batch on its way through the model, and what is gathered from it on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from greenlet import greenlet
from torch import Tensor

from tersely.calibrate import MicroBatch


class CancelledError(BaseException):
    """Unwinds a flow that is no longer needed."""


class SeenError(BaseException):
    """Unwinds a block's forward once the statistics of a stage are complete."""


class Flow:
    """One micro-batch on its way through the model.

    A greenlet and not a thread: all flows share the one team of OpenMP threads and the one heap, where threads would
    each have their own, which made small jobs up to three times slower.
    """

    def __init__(self, batch: MicroBatch, run: Callable[[MicroBatch], Any], skipped: frozenset[str]) -> None:
        self.batch, self.skipped = batch, skipped
        self.result: Any = None
        self.watched: Watched | None = None
        self.arguments: tuple[tuple[Any, ...], Mapping[str, Any]] = ((), {})
        self.target: Tensor | None = None
        self.passed: tuple[Tensor, Tensor] | None = None
        """What came to the block that ran last, and what it gave."""
        self.here: Tensor | None = None
        """What the last block gave, as the model runs now."""
        self.parent: Tensor | None = None
        """What it gives in the model as it lies in the checkpoint."""
        self._run = run
        self._greenlet = greenlet(self._main)

    def advance(self) -> tuple[str, str] | None:
        """Run to the next pause and return where that is; None when the forward has ended."""
        place: tuple[str, str] | None = self._greenlet.switch()
        return place

    def pause(self, unit: str, place: str) -> None:
        """Called inside the flow: wait until it is told to go on."""
        parent = self._greenlet.parent
        assert parent is not None
        parent.switch((unit, place))

    def cancel(self) -> None:
        if not self._greenlet.dead:
            self._greenlet.throw(CancelledError)

    def _main(self) -> None:
        with suppress(CancelledError):
            self.result = self._run(self.batch)


@dataclass
class Watched:
    """What is gathered in a block: the inputs of the weights of these stages.

    With `awaited` the forward ends when all of these statistics have been seen; without, the flow pauses before the
    first weight of each stage, unless it is told not to.
    """

    unit: str
    stages: frozenset[str]
    awaited: frozenset[str] | None = None
    pauses: bool = True
    """Whether the flow waits at each stage."""
    seen: set[str] = field(default_factory=set)
