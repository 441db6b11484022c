"""Keep the tokens that a text is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tersely.methods.trim.protocol import Tokens


@dataclass(frozen=True)
class Frequency:
    """Tokens stay by how often the corpus has them. (Vocabulary trimming: Ushio, Zhou and Camacho-Collados, Findings of
    EMNLP 2023, arXiv 2305.15020.)"""

    name: ClassVar[str] = "frequency"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"counts"})

    def __call__(self, tokens: Tokens) -> Tensor:
        assert tokens.counts_V is not None
        return tokens.counts_V
