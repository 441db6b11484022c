"""What makes a mixture of experts of the MLP of a block.

Shapes: T tokens, I inputs of the MLP, N its neurons (inputs of its last weight), O outputs, E experts, K neurons of an
expert, S texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Block:
    """The MLP of a block without experts, and what comes to it."""

    x_TI: Tensor
    """What its first weights and a router multiply, any float dtype."""
    neurons: Callable[[Tensor], Tensor]
    """Inputs (T, I) -> the neurons' activations (T, N), float32."""
    down_ON: Tensor
    """Its last weight, float32."""
    activity_EN: Tensor | None
    """Mean over the tokens of each domain of texts of |activation|, float32; None without such domains."""
    dtype: torch.dtype
    """In which weights are stored."""


@dataclass(frozen=True, eq=False)
class Experts:
    """What it becomes."""

    kept_EK: Tensor
    """Neurons of each expert, ascending, int64."""
    router_EI: Tensor
    """Weight of the router, float32."""
    down_EOK: Tensor
    """Last weight of each expert, float32; the others are rows of the block's."""
    share_E: Tensor
    """Share of the tokens that reach each expert."""


class Split(Protocol):
    """Shares the neurons of dense blocks among experts. A frozen dataclass of hyper-parameters, pure."""

    name: ClassVar[str]

    @property
    def experts(self) -> int:
        """E."""
        ...

    @property
    def top_k(self) -> int:
        """Experts that a token is given to; their weights sum to 1."""
        ...

    @property
    def needs(self) -> frozenset[str]:
        """What must be measured on calibration text."""
        ...

    @property
    def by_text(self) -> bool:
        """Whether experts are for domains of texts, which `group` finds."""
        ...

    def width(self, neurons: int) -> int:
        """K of a block with so many neurons. UsageError where none would be left."""
        ...

    def group(self, activity: Sequence[Tensor], seed: int) -> Tensor:
        """Domain of each text, (S,) int64, 0 to E - 1, none empty; activity: of each block, mean |activation| of each
        text, (S, N). UsageError where texts are too few."""
        ...

    def __call__(self, block: Block) -> Experts:
        """The experts of a block and their router."""
        ...
