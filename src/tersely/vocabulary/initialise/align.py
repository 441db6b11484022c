"""What the old tokenizer has in a text where the new one has a token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from tersely.vocabulary.initialise.protocol import Gap, Need, Rules, Tables, blend, uniform, weights
from tersely.vocabulary.pieces import Pieces


@dataclass(frozen=True)
class Align:
    """Learn from a text what stands in a token's place (Yamaguchi et al., 2024, arXiv 2406.11477).

    row(t) = sum over the tuples of old tokens that stood where t stands of count / total * mean of their rows

    A pair counts where the place of one contains that of the other. With `with_mean` the old tokenizer's cut of the
    token alone is one more tuple, as frequent as the most frequent. Tokens that the text lacks have no row by it.
    """

    with_mean: bool = False
    name: ClassVar[str] = "align"
    convex: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"alignments"})

    def __call__(self, gap: Gap, tables: Tables, donor: Tables | None, seed: int) -> Rules:  # noqa: ARG002 (protocol)
        assert gap.alignments is not None
        rows = []
        for found, cut in zip(gap.alignments, gap.cuts, strict=True):
            counted = list(found.items())
            if self.with_mean and cut:
                counted.append((cut, max(found.values(), default=1)))
            total = sum(count for _, count in counted)
            rows.append(blend([(count / total, uniform(ids)) for ids, count in counted]))
        return weights(rows)


def aligned(
    texts: Sequence[str], old: Pieces, new: Pieces, missing: Sequence[int]
) -> tuple[Mapping[tuple[int, ...], int], ...]:
    """For each of these tokens of the new vocabulary what the old one has in its place in texts, and how often."""
    found: dict[int, Counter[tuple[int, ...]]] = {i: Counter() for i in missing}
    for text in texts:
        old_ids, old_spans = _spans(old, text)
        at = 0
        for i, (start, end) in zip(*_spans(new, text), strict=True):
            while at < len(old_spans) and old_spans[at][1] <= start:
                at += 1
            if i not in found or at == len(old_spans):
                continue
            last = at
            while last < len(old_spans) and old_spans[last][1] <= end:
                last += 1
            first, after = old_spans[at]
            if last > at and first >= start:
                found[i][tuple(old_ids[at:last])] += 1
            elif first <= start and end <= after:
                found[i][old_ids[at],] += 1
    return tuple(found[i] for i in missing)


def _spans(pieces: Pieces, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and places; white space that a tokenizer leaves out of a place belongs to the token behind it."""
    encoded = pieces.tokenizer.encode(text, add_special_tokens=False)
    spans: list[tuple[int, int]] = []
    done = 0
    for start, end in encoded.offsets:
        gap = start > done and text[done:start].isspace()
        spans.append((done if gap else start, end))
        done = max(done, end)
    return encoded.ids, spans
