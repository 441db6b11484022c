"""Which tokens stay: the ones that a text needs most, within as many rows as may be.

Shapes: V rows of the embedding, K rows that stay, P points of a curve.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tersely.errors import UsageError
from tersely.vocabulary.closure import Closure
from tersely.vocabulary.mandatory import asked, dropped, mandatory, sentinel
from tersely.vocabulary.tokenizer import Vocabulary


@dataclass(frozen=True, eq=False)
class Choice:
    """Tokens that stay."""

    kept_old_ids_K: Tensor
    """int64, ascending; the row in the new embedding is the place in here."""
    coverage: float
    """Share of the counted tokens that stay."""
    mandatory: int
    """Rows that stay whatever is counted."""
    uncounted: int
    """Further rows that were not counted: needed to make others, or to fill the number of rows."""
    unreachable: tuple[str, ...]
    """Tokens that were counted or asked for, but left out: the tokenizer never gives them."""

    @property
    def rows(self) -> int:
        """How many tokens stay."""
        return len(self.kept_old_ids_K)


@dataclass(frozen=True, eq=False)
class Curve:
    """How much of a text is covered by how many rows, each choice within the next."""

    rows_P: Tensor
    """int64, rising; the first are the mandatory ones."""
    coverage_P: Tensor
    """float64: the share of the counted tokens that these rows hold."""


def choose(
    vocabulary: Vocabulary,
    counts_V: Tensor,
    *,
    rows: int | None = None,
    coverage: float | None = None,
    minimum_count: int | None = None,
    multiple: int = 1,
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
    closure: Closure | None = None,
) -> Choice:
    """Chooses the tokens that stay by how often each occurs in a text (`counts_V`).

    rows: at most so many, with all that they need to be made; as many are taken. coverage: the fewest that hold this
    share of the text. minimum_count: those that occur so often. One of the three must be given. The number is brought
    to a multiple of `multiple`, below `rows`, or else above the number found as far as there are tokens, with those
    that come next, so that no row stands for nothing. Tokens are taken by the occurrences that each row which they add
    brings,

        (counts of the token and of what it needs, not yet taken) / (rows of these),  highest first

    Always stay: special and added tokens, tokens that a file of the model names, those for single bytes, or else the
    single characters of the text; the unknown token; of a unigram model one piece with the lowest score, from which
    the cost of unknown characters is reckoned; and `keep`, token strings. drop: added tokens that go nevertheless,
    with * for any characters. closure: of this vocabulary, where it is at hand.

    UsageError: a setting that cannot be met (with the smallest number of rows that can), an unknown token, or one to
    drop that a file names.
    """
    if (rows is not None) + (coverage is not None) + (minimum_count is not None) != 1:
        raise UsageError("give one of rows, coverage and minimum_count: which tokens stay is decided by one of them")
    if coverage is not None and not 0 < coverage <= 1:
        raise UsageError(f"coverage={coverage}: expected a share of the text, above 0 and at most 1")
    if minimum_count is not None and minimum_count < 1:
        raise UsageError(f"minimum_count={minimum_count}: expected 1 or more")
    if multiple < 1:
        raise UsageError(f"multiple={multiple}: expected 1 or more")
    growing = _Growing(vocabulary, closure, _counts(vocabulary, counts_V), keep, drop, minimum_count or 1)
    available = len(vocabulary.ids) - len(growing.dropped)
    if rows is not None:
        _require_rows(rows, multiple, growing, available)
        growing.fill(rows // multiple * multiple)
    elif minimum_count is not None:
        growing.add_all(i for i, count in enumerate(growing.counts) if count >= minimum_count)
    elif coverage is not None and not growing.reach(coverage):
        raise UsageError(
            f"coverage={coverage} cannot be reached: all tokens that can stay hold {growing.coverage:.6f} of the text"
        )
    if rows is None:
        growing.fill(min(len(growing.kept) + -len(growing.kept) % multiple, available))
    return growing.choice()


def curve(
    vocabulary: Vocabulary,
    counts_V: Tensor,
    *,
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
    closure: Closure | None = None,
) -> Curve:
    """All choices by `choose`, from the mandatory rows to every token of the text; the settings as there."""
    growing = _Growing(vocabulary, closure, _counts(vocabulary, counts_V), keep, drop, 1)
    points = [(len(growing.kept), growing.coverage)]
    points += ((len(growing.kept), growing.coverage) for _ in growing.by_gain(vocabulary.rows))
    rows, shares = zip(*points, strict=True)
    return Curve(torch.tensor(rows), torch.tensor(shares, dtype=torch.float64))


def _counts(vocabulary: Vocabulary, counts_V: Tensor) -> list[int]:
    if counts_V.shape != (vocabulary.rows,) or counts_V.is_floating_point():
        raise ValueError(f"counts of {vocabulary.rows} tokens are whole numbers, not {counts_V.dtype} {counts_V.shape}")
    counts: list[int] = counts_V.tolist()
    if sum(counts) < 1:
        raise UsageError("no token was counted; give a text in which some occur")
    return counts


def _require_rows(rows: int, multiple: int, growing: _Growing, available: int) -> None:
    smallest = len(growing.kept) + -len(growing.kept) % multiple
    if rows < smallest:
        raise UsageError(
            f"rows={rows}: at least {smallest} must stay: tokens that files name, added ones, those for single "
            "bytes or characters, and what these need; use that many or more, or drop added tokens"
        )
    if rows > available:
        raise UsageError(f"rows={rows}: the tokenizer has only {available} tokens that can stay; use fewer")


class _Growing:
    """A choice that grows, closed at every time."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        closure: Closure | None,
        counts: list[int],
        keep: Sequence[str],
        drop: Sequence[str],
        minimum_count: int,
    ) -> None:
        self.counts = counts
        self.dropped = dropped(vocabulary, drop)
        self.kept: set[int] = set()
        self.covered, self._total = 0, sum(counts)
        self._vocabulary = vocabulary
        self._closure = closure or Closure(vocabulary)
        self._asked = asked(vocabulary, keep)
        for token in mandatory(vocabulary, counts, minimum_count) - self.dropped:
            self._add(self._closure.parts(token) or {token})  # one that a file names stays even if nothing makes it
        for token in self._asked:
            self._add(self._closure.parts(token) or ())
        if lost := self.kept & self.dropped:
            needed = sorted(str(vocabulary.tokens[i]) for i in lost)
            raise UsageError(f"drop: {', '.join(needed)} cannot go: tokens that stay are made of it")
        self.add_all(sentinel(vocabulary, counts, self.kept, self.dropped))
        self._mandatory = frozenset(self.kept)

    @property
    def coverage(self) -> float:
        return self.covered / self._total

    def add_all(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self._add(self._missing(token) or ())

    def by_gain(self, budget: int) -> Iterator[Literal[True]]:
        """Adds one counted token after the other, the most gainful first, while they fit."""
        missing: dict[int, set[int]] = {}
        needed_by: dict[int, list[int]] = {}
        gains: dict[int, int] = {}
        for token, count in enumerate(self.counts):
            if count and (parts := self._missing(token)):
                missing[token] = parts
                gains[token] = sum(self.counts[i] for i in parts)
                for i in parts:
                    needed_by.setdefault(i, []).append(token)

        def entry(token: int) -> tuple[float, int, int, int]:
            return -gains[token] / len(missing[token]), token, gains[token], len(missing[token])

        heap = [entry(token) for token in missing]
        heapq.heapify(heap)
        while heap:
            _, token, gain, size = heapq.heappop(heap)
            if token in self.kept or (gain, size) != (gains[token], len(missing[token])):
                continue  # what it needs has changed since: there is another entry
            if len(self.kept) + size > budget:
                continue  # one that shares its parts may still fit, and then it gets another entry
            group = set(missing[token])
            self._add(group)
            changed = set()
            for i in group:
                for other in needed_by[i]:
                    if other not in self.kept:
                        missing[other].discard(i)
                        gains[other] -= self.counts[i]
                        changed.add(other)
            for other in changed:
                heapq.heappush(heap, entry(other))
            yield True

    def reach(self, coverage: float) -> bool:
        """Adds the most gainful tokens until they hold this share of the text; whether they do."""
        adding = self.by_gain(self._vocabulary.rows)
        while self.coverage < coverage and next(adding, False):
            pass
        return self.coverage >= coverage

    def fill(self, rows: int) -> None:
        """Adds tokens up to this number: the most gainful that fit, then by their ids."""
        for _ in self.by_gain(rows):
            pass
        while len(self.kept) < rows:
            before = len(self.kept)
            for token in self._vocabulary.ids.values():
                if len(self.kept) == rows:
                    break
                parts = self._missing(token)
                if parts and len(self.kept) + len(parts) <= rows:
                    self._add(parts)
            if len(self.kept) == before:
                raise UsageError(f"only {before} tokens can be reached, fewer than {rows}; ask for fewer rows")

    def choice(self) -> Choice:
        kept = sorted(self.kept)
        wanted = self._asked | {i for i, count in enumerate(self.counts) if count}
        lost = sorted(i for i in wanted if not self._closure.parts(i))
        return Choice(
            kept_old_ids_K=torch.tensor(kept),
            coverage=self.coverage,
            mandatory=len(self._mandatory),
            uncounted=sum(not self.counts[i] for i in self.kept - self._mandatory),
            unreachable=tuple(str(self._vocabulary.tokens[i]) for i in lost),
        )

    def _add(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            if token not in self.kept:
                self.kept.add(token)
                self.covered += self.counts[token]

    def _missing(self, token: int) -> set[int] | None:
        """What a token would add; None for one that cannot be made."""
        parts = self._closure.parts(token)
        return None if parts is None or parts & self.dropped else set(parts - self.kept)
