"""Blocks without which the loss rises least, each by itself (SLEB's and Shortened LLaMA's criterion: Kim et al., 2024,
arXiv 2402.02834)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tersely.methods.drop.protocol import Blocks


@dataclass(frozen=True)
class BlockLoss:
    """Remove the blocks without which, one at a time, the model's loss on the calibration text is lowest."""

    name: ClassVar[str] = "block_loss"

    @property
    def similarity(self) -> bool:
        return False

    def losses(self, candidates: int, count: int) -> int:  # noqa: ARG002 (protocol)
        return candidates

    def __call__(self, blocks: Blocks, count: int) -> frozenset[int]:
        losses = blocks.losses([frozenset({b}) for b in blocks.candidates])
        ordered = sorted(zip(losses, blocks.candidates, strict=True))
        return frozenset(block for _, block in ordered[:count])
