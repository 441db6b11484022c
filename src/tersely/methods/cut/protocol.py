"""What says which neurons, heads, experts or hidden coordinates of a model matter least.

Shapes: G structures (a neuron; a key/value head with all its query heads; an expert; a coordinate of the residual
stream), M elements that one weight has of each, D coordinates of the residual stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
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
        "gates" (see Gating), "second_moments" (see Turning)."""
        ...

    @property
    def kinds(self) -> frozenset[Kind]:
        """Structures that it can score."""
        ...

    def __call__(self, structures: Structures, seed: int) -> Tensor:
        """(G,), float64, larger for what matters more."""
        ...


class Turning(ABC):
    """Scores the coordinates of the residual stream in a basis of its own, into which the model is turned first."""

    @abstractmethod
    def basis(self, moments_DD: Tensor, kept: int, *, centred: bool) -> Tensor:
        """An orthogonal matrix, (D, D) float32, in whose coordinates x @ basis the structures lie.

        moments_DD: second moments of what the norms give, their gains taken out, summed over the norms. centred:
        for LayerNorm, which subtracts the mean over coordinates, before and after.
        """
        ...


@dataclass(frozen=True)
class Gating(ABC):
    """Scores structures by gates that are trained on them, with adapters of the weights beside them. Frozen dataclasses
    of settings that share these."""

    name: ClassVar[str]

    tokens: int = 300_000
    """That pass through the model while gates are learned."""
    recovery_tokens: int = 150_000
    """That pass through it afterwards, with gates that stand still."""
    batch: int = 512
    """Tokens of a step."""
    warm_up: float = 0.5
    """Share of the tokens over which the share to cut grows."""
    start: float = 2.5
    """log alpha at the start."""
    gate_rate: float = 0.1
    """Of log alpha."""
    penalty_rate: float = 0.1
    """Of both lambdas."""
    rate: float = 0.001
    """Of the adapters while gates are learned."""
    recovery_rate: float = 0.001
    """Of the adapters afterwards, where it falls to zero along half a cosine."""
    rank: int = 8
    """Of the adapters; 0: none."""
    scale: float = 1.0
    """Of what an adapter adds (the authors' alpha over rank)."""
    all_linear: bool = False
    """Adapters of all linear weights of the blocks, not of queries and values only."""
    prompt: str = ""
    """Text that stands before every sequence and may say that the model is being cut; it is not predicted."""
    autocast: bool = False
    """Products in bfloat16: faster on GPUs, and on CPUs that multiply it."""

    @property
    @abstractmethod
    def limit(self) -> float:
        """Within which log alpha stays, on both sides of zero."""
        ...

    @abstractmethod
    def drawn(self, log_alpha_G: Tensor, uniform_G: Tensor) -> Tensor:
        """Gates (G,), of uniform numbers that are above 0 and below 1; gradients flow to log alpha."""
        ...

    @abstractmethod
    def open_chance(self, log_alpha_G: Tensor) -> Tensor:
        """The chance that each gate is not zero, (G,); gradients flow to log alpha."""
        ...

    @abstractmethod
    def settled(self, log_alpha_G: Tensor, keep: int) -> Tensor:
        """Gates (G,) that are no longer drawn: zero but for the `keep` largest log alpha (of equals, the first)."""
        ...
