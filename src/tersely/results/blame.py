"""Where in a model quality was lost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tersely.results.estimate import Estimate
from tersely.results.evaluation import Setting, Subject
from tersely.results.plain import Measurement


@dataclass(frozen=True)
class Site:
    """A block, a role in a block or a weight, and what it costs.

    cost: nats a token of KL(base || model). Direction "restore": by how much the KL falls when this site alone gets
    the base's weights back; "spoil": the KL of the base with this site alone compressed. Paired over documents.
    """

    name: str
    """Of the block ("model.layers.3"), or of the weight as the base stores it."""
    level: Literal["block", "weight"]
    block: int | None
    role: str
    """attention, mlp, ...; "block" for a whole block."""
    parameters: int
    bits: float | None
    """Stored bits a weight of the compressed site, scales included; None where the folder does not say."""
    cost: Estimate


@dataclass(frozen=True)
class Depth:
    """The hidden states behind a block, model against base, on the same tokens.

    error: sqrt(sum |h_model - h_base|^2 / sum |h_base|^2) over all tokens but the first; cosine: mean over tokens.
    """

    name: str
    block: int
    error: float
    cosine: float


@dataclass(frozen=True)
class Blame(Measurement):
    """What each site of a compressed model costs, dearest first, and how the error grows along the depth."""

    model: Subject
    base: Subject
    setting: Setting = field(compare=False)
    direction: Literal["restore", "spoil"]
    text: str
    sha256: str
    documents: int
    tokens: int
    context: int
    kl: Estimate
    """Of the whole model, on these tokens."""
    sites: tuple[Site, ...]
    depth: tuple[Depth, ...]
    notes: tuple[str, ...]
    """What could not be swapped, or was not reached in the time given."""
    budget: float | None = None
    seconds: float = field(default=0.0, compare=False)
