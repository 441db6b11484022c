"""Every compression method, one file each. A new method is one file and one line in METHODS."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor

from tersely.codecs import Encoded
from tersely.codecs.integer import Clip
from tersely.measure import Statistics
from tersely.methods.encode.gptq import GPTQ
from tersely.methods.encode.rtn import RTN

__all__ = ["METHODS", "Encode"]


class Encode(Protocol):
    """Store a weight in fewer bits. A frozen dataclass whose fields are its hyper-parameters.

    `__call__` is pure: no model, no files, no device moves. The outputs (rows) of a weight are independent of one
    another, so that the engine may stack weights that share their inputs and statistics.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    """What the engine must measure: "gram"."""

    @property
    def bits(self) -> int:
        """Of a stored code."""

    @property
    def group(self) -> int:
        """Inputs that share a scale; 0: all of an output."""

    @property
    def symmetric(self) -> bool:
        """Whether the grid has no zero point of its own."""

    @property
    def clip(self) -> Clip:
        """How the range of a group is chosen."""

    @property
    def act_order(self) -> bool:
        """Whether columns are taken by the size of their inputs."""

    def check(self, columns: int) -> None:
        """UsageError where a weight with this number of inputs cannot be taken."""

    def __call__(self, weight_OI: Tensor, stats: Statistics) -> Encoded:
        """Encode a weight, (outputs, inputs), in its stored dtype."""


METHODS: tuple[type[Encode], ...] = (RTN, GPTQ)
