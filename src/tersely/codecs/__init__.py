"""Storage forms: how the parts of an encoded weight are held, decoded and written.

An encoded weight is a sum of parts, each of which decodes to the whole shape:

    W_hat = decode(part 1) + decode(part 2) + ...
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tersely.codecs.integer import Integers

__all__ = ["Encoded", "Integers", "Part"]


class Part(Protocol):
    """One summand of an encoded weight."""

    def decode(self) -> Tensor:
        """The weight, (O, I), in the dtype that a reader of the stored form computes."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """What is stored, by the name that follows the weight's path."""
        ...

    def split(self, rows: list[int]) -> list[Integers]:
        """Cut along the outputs."""
        ...


@dataclass(frozen=True)
class Encoded:
    """A weight as a method leaves it: a sum of parts, and what the method has to say about it."""

    parts: tuple[Integers, ...]
    note: str = ""
    """What the user should know ("too few tokens: rounded to nearest")."""

    def decode(self) -> Tensor:
        total = self.parts[0].decode()
        for part in self.parts[1:]:
            total = total + part.decode()
        return total

    def tensors(self) -> dict[str, Tensor]:
        return {name: t for part in self.parts for name, t in part.tensors().items()}

    def sample(self, start: int, step: int) -> Encoded:
        """Every `step`-th output from `start`."""
        return Encoded(tuple(part.sample(start, step) for part in self.parts), self.note)

    def split(self, rows: list[int]) -> list[Encoded]:
        """Cut along the outputs, into weights of the given numbers of rows."""
        pieces = zip(*(part.split(rows) for part in self.parts), strict=True)
        return [Encoded(tuple(parts), self.note) for parts in pieces]
