"""A stored tensor and its place in the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tersely.checkpoint import TensorSpec
from tersely.families import Axis

Kind = Literal["linear", "norm", "lookup", "bias"]


@dataclass(frozen=True)
class Weight:
    """A stored tensor and its place in the model."""

    name: str
    """As stored; may lack the family's prefix, which `path`, `stack` and `unit` always have."""
    path: str
    """Path inside the block (or the whole path, outside), expert number filled in, without the leaf."""
    leaf: str
    """"weight", "bias", or "" where the path is the whole name."""
    stack: str
    """The block list it belongs to ("model.layers"), or "" outside the blocks."""
    block: int | None
    expert: int | None
    reads: Axis
    writes: Axis
    kind: Kind
    role: str
    """attention, mlp, expert, router, head, embedding, norm or other."""
    spec: TensorSpec
    transposed: bool
    """Stored as (inputs, outputs)."""

    @property
    def unit(self) -> str:
        """What is paged in as a whole: "model.layers.3", or "" outside the blocks."""
        return "" if self.block is None else f"{self.stack}.{self.block}"

    @property
    def parameter(self) -> str:
        """Name inside the block (or whole, outside), under which transformers knows it unless it renames."""
        return f"{self.path}.{self.leaf}" if self.leaf else self.path

    @property
    def statistics(self) -> str:
        """Name of the activations that it multiplies; two weights of a block share them iff it is equal."""
        part = self.reads.parts[0]
        moment = f"@{part.moment}" if part.moment else ""
        return f"{part.space}{moment}" + ("" if self.expert is None else f" of expert {self.expert}")

    @property
    def stage(self) -> str:
        """Name of the step in a block at which it is compressed (experts go together)."""
        return self.statistics.partition(" of expert ")[0]

    @property
    def rows(self) -> int:
        """Outputs of a linear weight."""
        return self.spec.shape[1 if self.transposed else 0]

    @property
    def columns(self) -> int:
        """Inputs of a linear weight."""
        return self.spec.shape[0 if self.transposed else 1]
