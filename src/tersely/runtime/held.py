"""One stored weight in memory, as it lies, and the place of it in a parameter.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tersely.codecs import Encoded
from tersely.codecs.entrance import Entrance
from tersely.codecs.low_rank import LowRank, factors_of, is_product
from tersely.hadamard import hadamard
from tersely.stored import Entry

_BLOCK = 1 << 24
"""Weights that are decoded together: methods of decoding need some times their memory."""


@dataclass(frozen=True, eq=False)
class Held:
    """An encoded weight as it lies."""

    name: str
    entry: Entry
    leaves: Mapping[str, Tensor]
    """Its stored tensors, by leaf."""

    def to(self, device: torch.device) -> Held:
        return replace(self, leaves={leaf: tensor.to(device) for leaf, tensor in self.leaves.items()})

    def copied(self) -> Held:
        return replace(self, leaves={leaf: tensor.clone() for leaf, tensor in self.leaves.items()})

    @property
    def entrance(self) -> Entrance:
        return self.entry.entrance(self.leaves)

    def multiplied(self) -> Tensor:
        """What its inputs multiply behind their entrance, as the model holds a weight."""
        return self._oriented(self._decoded())

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """a (R, I), and b as the model holds a weight of R inputs, where it is their product and nothing else."""
        if not is_product(self.entry.scheme.parts) or (found := factors_of(self._encoded().parts)) is None:
            return None
        a_RI, b_OR = found
        return a_RI, b_OR.t() if self.entry.transposed else b_OR

    def full(self) -> Tensor | None:
        """The share (O, I) that meets inputs before they are rounded."""
        return self._encoded().full() if self.entry.scheme.activations else None

    def value(self) -> Tensor:
        """The weight that it stands for, in the source's basis, as the model holds it."""
        decoded, order = self._decoded(), self.entry.scheme.hadamard
        return self._oriented(hadamard(decoded, order) if order else decoded)

    def _encoded(self) -> Encoded:
        return self.entry.read(self.leaves, self.name)

    def _decoded(self) -> Tensor:
        """The sum of all parts, (O, I), some rows at a time where that gives the same: a product's bits depend on how
        many rows it has."""
        encoded, rows = self._encoded(), self.entry.rows
        count = max(1, _BLOCK // self.entry.columns)
        if rows <= count or any(isinstance(part, LowRank) for part in encoded.parts):
            return encoded.decode()
        counts = [min(count, rows - start) for start in range(0, rows, count)]
        blocks = encoded.split(counts)
        first = blocks[0].decode()
        decoded = first.new_empty((rows, self.entry.columns))
        for place, block in zip(decoded.split(counts), blocks, strict=True):  # type: ignore[no-untyped-call]
            place.copy_(block.decode())
        return decoded

    def _oriented(self, decoded_OI: Tensor) -> Tensor:
        return decoded_OI.t().contiguous() if self.entry.transposed else decoded_OI


@dataclass(eq=False)
class Cell:
    """A place for one stored weight. What is in it can be exchanged, and all views of the parameter see it."""

    held: Held | Tensor
    shape: tuple[int, int]
    """As the model holds it."""

    @property
    def entrance(self) -> Entrance:
        return self.held.entrance if isinstance(self.held, Held) else Entrance()

    @property
    def is_product(self) -> bool:
        """Whether it is two factors, and runs as two products."""
        return isinstance(self.held, Held) and is_product(self.held.entry.scheme.parts)

    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(self.held.leaves.values()) if isinstance(self.held, Held) else (self.held,)

    def multiplied(self, dtype: torch.dtype) -> Tensor:
        return (self.held.multiplied() if isinstance(self.held, Held) else self.held).to(dtype)

    def value(self, dtype: torch.dtype) -> Tensor:
        return (self.held.value() if isinstance(self.held, Held) else self.held).to(dtype)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        found = self.held.factors() if isinstance(self.held, Held) else None
        return None if found is None else (found[0].to(dtype), found[1].to(dtype))

    def full(self) -> Tensor | None:
        return self.held.full() if isinstance(self.held, Held) else None
