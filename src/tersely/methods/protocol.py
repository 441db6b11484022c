"""What a compression method is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from tersely.bases import Basis
from tersely.codecs import Encoded, Form
from tersely.measure import Statistics


@dataclass(frozen=True)
class Work:
    """What encoding one weight costs, beyond measuring its statistics."""

    flops: float = 0.0
    """Floating point operations of matrix products and factorizations."""
    passes: float = 1.0
    """Times that every element is read and worked on."""
    loops: int = 0
    """Steps of a loop in Python, each over a whole column or the like."""
    memory: int = 0
    """Bytes beyond the weight in float32 with two copies and its codes."""


def sum_work(*each: Work) -> Work:
    """Of one after the other."""
    return Work(
        flops=sum(w.flops for w in each),
        passes=sum(w.passes for w in each),
        loops=sum(w.loops for w in each),
        memory=max(w.memory for w in each),
    )


class Encode(Protocol):
    """Store a weight in fewer bits. A frozen dataclass whose fields are its hyper-parameters.

    `__call__` is pure: no model, no files, no device moves, no chance.
    """

    name: ClassVar[str]

    @property
    def needs(self) -> frozenset[str]:
        """What the engine must measure; MEASURES says what there is."""
        ...

    @property
    def row_wise(self) -> bool:
        """Whether the outputs (rows) of a weight are independent of one another, so that the engine may stack weights
        that share their inputs and statistics, and take a weight a few rows at a time where nothing is measured."""
        ...

    @property
    def keeps_zeros(self) -> bool:
        """Whether it decodes to exactly zero wherever `stats.kept_OI` does not hold and the weight is zero."""
        ...

    def check(self, columns: int) -> None:
        """UsageError where a weight with this number of inputs cannot be taken."""

    def forms(self, rows: int, columns: int) -> Sequence[Form]:
        """The parts that it leaves of a weight of this shape; where it decides by the values, the largest."""
        ...

    def work(self, rows: int, columns: int) -> Work:
        """What encoding a weight of this shape costs."""
        ...

    def __call__(self, weight_OI: Tensor, stats: Statistics) -> Encoded:
        """Encode a weight, (outputs, inputs), in its stored dtype."""
        ...


class Rebase(Protocol):
    """Choose another basis for a space, before anything is encoded. A frozen dataclass, pure, as all methods.

    The engine applies it to every weight that writes or reads the space, so that the model computes what it did.
    One that needs nothing measured is applied to the whole model first; the others block by block, on statistics of a
    block in which nothing is encoded yet.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]

    def check(self, columns: int) -> None:
        """UsageError where a space with this number of coordinates cannot be taken."""

    def __call__(self, readers: Sequence[Tensor], stats: Statistics, seed: int) -> Basis:
        """The basis for a space, given the weights that read it, (O, I) each, and the activations in it."""
        ...
