"""Blocks that change what passes through them least (ShortGPT: Men et al., 2024, arXiv 2403.03853; spans: Gromov et
al., ICLR 2025, arXiv 2403.17887)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from tersely.methods.drop.protocol import Blocks


@dataclass(frozen=True)
class BlockSimilarity:
    """Remove the blocks whose output is most like their input.

    influence of block l = 1 - mean cos(h_l, h_(l+1))

    span: remove blocks in a row, those between the two states that are most alike (mean cos(h_l, h_(l+n))).
    """

    name: ClassVar[str] = "block_similarity"

    span: bool = False

    @property
    def similarity(self) -> bool:
        return True

    def losses(self, candidates: int, count: int) -> int:  # noqa: ARG002 (protocol)
        return 0

    def __call__(self, blocks: Blocks, count: int) -> frozenset[int]:
        alike = blocks.similarity_SS
        assert alike is not None
        if not self.span:
            ordered = sorted(blocks.candidates, key=lambda b: (-float(alike[b, b + 1]), b))
            return frozenset(ordered[:count])
        runs: list[Sequence[int]] = [
            blocks.candidates[i : i + count] for i in range(len(blocks.candidates) - count + 1)
        ]
        whole = [run for run in runs if all(b == a + 1 for a, b in pairwise(run))]
        if not whole:
            return BlockSimilarity()(blocks, count)
        _, first = max((float(alike[run[0], run[-1] + 1]), -run[0]) for run in whole)
        return frozenset(range(-first, -first + count))
