"""The halves out of which the new tokenizer merges a token, and their halves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tersely.errors import UsageError
from tersely.vocabulary.initialise.protocol import Gap, Need, Rules, Tables, blend, weights


@dataclass(frozen=True)
class Merge:
    """Follow the new tokenizer's own merges down to tokens that have a row (Yamaguchi et al., 2024, arXiv 2406.11477).

    row(t) = mean over merges (a, b) that make t of (row(a) + row(b)) / 2

    so that a piece n merges down has a weight of 2^-n. Other than by the mean, the last piece that was joined, often
    half of the word, counts as much as all before it. For tokenizers with merges only.
    """

    name: ClassVar[str] = "merge"
    convex: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset()

    def __call__(self, gap: Gap, tables: Tables, donor: Tables | None, seed: int) -> Rules:  # noqa: ARG002 (protocol)
        """UsageError: the new tokenizer has no merges."""
        if gap.new.merges is None:
            raise UsageError("merge follows the merges of a BPE, and the new tokenizer is none; use mean or align")
        missing = {gap.new.by_id[i].token for i in gap.missing_N.tolist()}
        known = {piece.token: {gap.match[i]: 1.0} for i, piece in gap.new.by_id.items() if i in gap.match}
        halves: dict[str, list[tuple[str, str]]] = {}
        for first, second in gap.new.merges:
            if first + second in missing:
                halves.setdefault(first + second, []).append((first, second))
        # Parts are shorter than what they make.
        for token in sorted(halves, key=len):
            found = [(known[a], known[b]) for a, b in halves[token] if a in known and b in known]
            if found:
                share = 0.5 / len(found)
                known[token] = blend([(share, half) for both in found for half in both])
        return weights([known.get(gap.new.by_id[i].token, {}) for i in gap.missing_N.tolist()])
