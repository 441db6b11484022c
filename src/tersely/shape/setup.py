"""What every step runs on that leaves a smaller shape, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersely.calibrate import MicroBatch, Sequences
from tersely.graph import Graph
from tersely.plan.cost import calibration_batches


@dataclass(frozen=True, eq=False)
class Setup:
    """How a step runs."""

    data: Sequences | None
    """The calibration text; None where no step of the job measures anything."""
    facts: Mapping[str, Any]
    """Of the job, which writers are told."""
    dtype: torch.dtype
    """In which the text runs."""
    device: torch.device
    seed: int
    resume: bool
    say: Callable[[str, float], None]

    @property
    def ids(self) -> tuple[Tensor, ...]:
        """Token ids of the calibration sequences."""
        return self.data.ids if self.data is not None else ()

    def batches(self, graph: Graph) -> tuple[MicroBatch, ...]:
        """The text in micro-batches; none without text."""
        return () if self.data is None else calibration_batches(self.data, graph, self.dtype)


@dataclass(frozen=True)
class Written:
    """What a step has written of a smaller model."""

    units: Sequence[str]
    """Names of the writer's units, in order."""
    config: dict[str, Any]
    scores: dict[str, list[float]]
    """What structures were chosen by: place -> the score of each, larger for what matters more."""
    notes: Sequence[str]
    """What the user should know."""
