"""What chooses the blocks that a model can do without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of one list of a model, by number, and what may be asked of them.

    Shapes: L blocks; state i is what comes to block i, state L what the last one gives.
    """

    candidates: Sequence[int]
    """Blocks that may go, ascending."""
    similarity_SS: Tensor | None
    """Mean over tokens of the cosine of states i and j, (L + 1, L + 1) float64; where `similarity` was asked for."""
    losses: Callable[[Sequence[frozenset[int]]], Sequence[float]]
    """Loss of the model on the calibration text, nats a token, without each of these sets of blocks."""


class BlockChoice(Protocol):
    """Chooses blocks. A frozen dataclass of hyper-parameters, pure."""

    name: ClassVar[str]

    @property
    def similarity(self) -> bool:
        """Whether the similarity of states must be measured."""
        ...

    def losses(self, candidates: int, count: int) -> int:
        """How many sets of blocks it will ask the loss of."""
        ...

    def __call__(self, blocks: Blocks, count: int) -> frozenset[int]:
        """`count` of the candidates, to be removed."""
        ...
