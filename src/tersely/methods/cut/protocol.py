"""What says which neurons, heads, experts or hidden coordinates of a model matter least.

Shapes: G structures (a neuron; a key/value head with all its query heads; an expert; a coordinate of the residual
stream), M elements that one weight has of each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from torch import Tensor

Kind = Literal["neurons", "heads", "hidden", "experts"]


@dataclass(frozen=True, eq=False)
class Member:
    """What one weight has of each structure: the rows that write it, or the columns that read it."""

    weight_GM: Tensor
    """float32."""
    gradient_GM: Tensor | None = None
    """Mean over sequences of the gradient of the loss, float32; None where none was asked for."""
    fisher_GM: Tensor | None = None
    """Mean over sequences of its square."""


@dataclass(frozen=True, eq=False)
class Structures:
    """The structures of one space: of one block, or of the whole model where it runs through it."""

    kind: Kind
    count: int
    """G."""
    members: Iterable[Member]
    """One for each weight; may be read anew, and holds one weight at a time."""
    activity_G: Tensor | None = None
    """sqrt(sum over sequences of (mean over tokens of |a|)^2) of its activations, Euclidean over those of a structure;
    for `hidden`, the sum of it over the outputs of all norms."""
    routed_G: Tensor | None = None
    """Of experts: sum over tokens of the size of what the expert adds, its router's weight included."""
    tokens_G: Tensor | None = None
    """Of experts: tokens that were routed to them."""
    gates_G: Tensor | None = None
    """log alpha of gates that were trained on them."""


class Importance(Protocol):
    """Scores structures: those with the lowest scores are removed. A frozen dataclass of hyper-parameters, pure."""

    name: ClassVar[str]

    @property
    def needs(self) -> frozenset[str]:
        """What of the structures must be measured on calibration text: "activity", "routed", "gradient", "fisher",
        "gates" (trained), "second_moments" (the structures are then those of the residual stream in its principal
        directions)."""
        ...

    @property
    def kinds(self) -> frozenset[Kind]:
        """Structures that it can score."""
        ...

    def __call__(self, structures: Structures, seed: int) -> Tensor:
        """(G,), float64, larger for what matters more."""
        ...
