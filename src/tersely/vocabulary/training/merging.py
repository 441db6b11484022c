"""Byte-pair merges learned on from a given state: pair counts in a heap, and the places where each pair stands.

The text is one array of cells, -1 between chunks. A token lies in as many cells as it had tokens at first: its id in
the first one, its number of cells in the first and in the last of `span`, so that both neighbours are found at once.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

Pair = tuple[int, int]
EDGE = -1
_TAKEN = -2
_SHIFT = 32
_LOW = (1 << _SHIFT) - 1


class Merging:
    """Tokens, their merges in order, and a text in these tokens, to be merged on.

    cells: ids, with EDGE before, between and behind chunks. tokens: by id. merged: pair -> result of the merges that
    the text went through, in their order. frequency: the least that a pair must have.

    Two pairs may spell one token; both then make it. A merge that is known already is applied again at once where its
    pair comes up anew, as encoding does: the text is always what encoding with the merges so far makes of it.
    """

    def __init__(self, cells: NDArray[np.int32], tokens: list[str], merged: Mapping[Pair, int], frequency: int) -> None:
        self.tokens = tokens
        self.merges: list[Pair] = list(merged)
        self._frequency = max(1, frequency)
        self._ids = {token: i for i, token in enumerate(tokens)}
        self._made = {first << _SHIFT | second: made for (first, second), made in merged.items()}
        self._rank = {key: rank for rank, key in enumerate(self._made)}
        self._barred: set[int] = set()
        self._count_pairs(cells)
        self._cells = array("i", cells.tobytes())
        self._span = array("i", np.ones(len(cells), np.int32).tobytes())
        self._later: dict[int, list[int]] = {}
        self._again: list[tuple[int, int, int]] = []
        self._grown: set[int] = set()

    @property
    def text(self) -> list[int]:
        """The ids as they stand, with EDGE between chunks."""
        return [cell for cell in self._cells if cell != _TAKEN]

    def extend(self, size: int, allowed: Callable[[str], bool], say: Callable[[float], None]) -> None:
        """Merge until there are `size` tokens, or until no pair is left that is allowed and frequent enough.

        Of pairs that are equally frequent, the one with the lower ids.
        """
        first = len(self.tokens)
        while len(self.tokens) < size and self._heap:
            less, key = heappop(self._heap)
            count = self._counts.get(key, 0)
            if count != -less:
                if self._frequency <= count < -less:
                    heappush(self._heap, (-count, key))
                continue
            if key in self._rank or key in self._barred:
                continue
            token = self.tokens[key >> _SHIFT] + self.tokens[key & _LOW]
            if not allowed(token):
                self._barred.add(key)
                continue
            self._merge(key, token)
            if len(self.tokens) % 256 == 0:
                say((len(self.tokens) - first) / (size - first))

    def _count_pairs(self, cells: NDArray[np.int32]) -> None:
        whole = (cells[:-1] >= 0) & (cells[1:] >= 0)
        places = np.flatnonzero(whole).astype(np.int32)
        keys = cells[:-1][whole].astype(np.int64) << _SHIFT | cells[1:][whole]
        order = np.argsort(keys, kind="stable")
        self._places = places[order]
        found, begins, counts = np.unique(keys[order], return_index=True, return_counts=True)
        # A rarer pair can grow only where another spells the same token: too rare a thing to hold all of them for.
        frequent = counts >= self._frequency
        kept = found[frequent].tolist()
        numbers = counts[frequent].tolist()
        self._counts: dict[int, int] = dict(zip(kept, numbers, strict=True))
        self._begins: dict[int, int] = dict(zip(kept, begins[frequent].tolist(), strict=True))
        self._lengths = dict(self._counts)
        self._heap = [(-number, key) for key, number in zip(kept, numbers, strict=True)]
        heapify(self._heap)

    def _merge(self, key: int, token: str) -> None:
        made = self._ids.setdefault(token, len(self.tokens))
        if made == len(self.tokens):
            self.tokens.append(token)
        self.merges.append((key >> _SHIFT, key & _LOW))
        self._made[key] = made
        self._rank[key] = len(self._rank)
        begin = self._begins.pop(key, 0)
        places = self._places[begin : begin + self._lengths.pop(key, 0)].tolist()
        places += self._later.pop(key, [])
        for place in sorted(places):
            self._merge_at(place, key)
            while self._again:
                _, other, known = heappop(self._again)
                self._merge_at(other, known)
        del self._counts[key]
        for grown in self._grown & self._counts.keys():
            count = self._counts[grown]
            if count >= self._frequency:
                heappush(self._heap, (-count, grown))
            else:
                del self._counts[grown]
                self._later.pop(grown, None)
        self._grown.clear()

    def _merge_at(self, place: int, key: int) -> None:
        cells, span, counts = self._cells, self._span, self._counts
        second = place + span[place]
        if cells[place] != key >> _SHIFT or cells[second] != key & _LOW:
            return
        behind = second + span[second]
        left = place - span[place - 1]
        before, after, made = cells[left], cells[behind], self._made[key]
        if before >= 0:
            gone = before << _SHIFT | cells[place]
            if gone in counts:
                counts[gone] -= 1
        if after >= 0:
            gone = cells[second] << _SHIFT | after
            if gone in counts:
                counts[gone] -= 1
        cells[place], cells[second] = made, _TAKEN
        span[place] = span[behind - 1] = behind - place
        if before >= 0:
            self._stand(before << _SHIFT | made, left)
        if after >= 0:
            self._stand(made << _SHIFT | after, place)

    def _stand(self, key: int, place: int) -> None:
        """A pair has come to stand at a place."""
        rank = self._rank.get(key)
        if rank is not None:
            heappush(self._again, (rank, place, key))
        elif key not in self._barred:
            self._counts[key] = self._counts.get(key, 0) + 1
            self._later.setdefault(key, []).append(place)
            self._grown.add(key)


def joined(chunks: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    """Pieces of cells as one array with an edge at either end."""
    edge = np.array([EDGE], np.int32)
    return np.concatenate([edge, *chunks, edge])
