"""Blocks by search: the loss is measured anew after each removal (SLEB: Song et al., ICML 2024, arXiv 2402.09025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tersely.errors import UsageError
from tersely.methods.drop.protocol import Blocks


@dataclass(frozen=True)
class BlockSearch:
    """Remove one block after another, and look at the loss of the model without them all.

    After each removal the `beam` best sets go on; 1 is the greedy search of SLEB.
    """

    name: ClassVar[str] = "block_search"

    beam: int = 1

    def __post_init__(self) -> None:
        if self.beam < 1:
            raise UsageError(f"beam={self.beam}: at least 1 set must go on")

    @property
    def similarity(self) -> bool:
        return False

    def losses(self, candidates: int, count: int) -> int:
        return sum(min(self.beam, candidates**done) * (candidates - done) for done in range(count))

    def __call__(self, blocks: Blocks, count: int) -> frozenset[int]:
        best: list[frozenset[int]] = [frozenset()]
        for _ in range(count):
            grown = sorted(
                {own | {b} for own in best for b in blocks.candidates if b not in own}, key=lambda own: sorted(own)
            )
            losses = blocks.losses(grown)
            ranked = sorted(zip(losses, map(sorted, grown), strict=True))
            best = [frozenset(own) for _, own in ranked[: self.beam]]
        return best[0]
