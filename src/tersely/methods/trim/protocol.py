"""What says which tokens of a vocabulary are wanted.

Shapes: V rows of the embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of a model."""

    data: Sequence[bytes | None] | None
    """By id, the text that each stands for, which need be no valid UTF-8; None for added ones and for rows without."""
    counts_V: Tensor | None
    """int64: how often each occurs in the corpus; None where no text was counted."""


class TokenChoice(Protocol):
    """Says how much each token is wanted. A frozen dataclass of hyper-parameters, pure."""

    name: ClassVar[str]

    @property
    def needs(self) -> frozenset[str]:
        """What of the tokens it looks at: "counts", "data"."""
        ...

    def __call__(self, tokens: Tokens) -> Tensor:
        """(V,) int64: how much each token is wanted, as a count; 0: not."""
        ...
