"""Words -> the words that they are made of: by a table, or by which words a text knows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tersely.errors import DataError

Decompound = Callable[[str], Sequence[str]]
"""Word -> its parts; of a word that is not compound, the word alone."""


@dataclass(frozen=True)
class KnownWords:
    """Splits a word into words that are more frequent than it (Koehn & Knight, EACL 2003).

    Of all splits into at most `parts` known words of at least `shortest` letters, and the word itself, the one whose
    parts have the highest geometric mean of frequencies. A part but the last may end in a linking letter that the known
    word lacks (Hemd-s-kragen); it stays with the part. Case is ignored.

    It knows no grammar and no meaning: it also splits what only looks compound into frequent words ("car-pets"), and
    leaves compounds whole whose parts the text does not know. A trained decompounder does better.
    """

    counts: Mapping[str, int]
    """Lower-case word -> how often it stands in a text."""
    links: tuple[str, ...] = ("s", "es")
    shortest: int = 3
    parts: int = 4

    def __call__(self, word: str) -> tuple[str, ...]:
        lower = word.lower()
        if len(lower) != len(word) or len(word) < 2 * self.shortest:
            return (word,)
        best, cut = self._logarithm(lower), [len(word)]
        length = len(word)
        # sums[n][end]: the highest sum of logarithms of n parts that end there, and where the last of them begins.
        sums: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
        for n in range(1, self.parts + 1):
            row: dict[int, tuple[float, int]] = {}
            for begin, (total, _) in sums[-1].items():
                for end in range(begin + self.shortest, length + 1):
                    part = self._part(lower[begin:end], last=end == length)
                    if part > -math.inf and total + part > row.get(end, (-math.inf, 0))[0]:
                        row[end] = (total + part, begin)
            sums.append(row)
            if n > 1 and length in row and row[length][0] / n > best:
                best, cut = row[length][0] / n, _cuts(sums, length)
        return tuple(word[begin:end] for begin, end in pairwise([0, *cut]))

    def _logarithm(self, word: str) -> float:
        count = self.counts.get(word, 0)
        return math.log(count) if count else -math.inf

    def _part(self, part: str, *, last: bool) -> float:
        found = self._logarithm(part)
        if not last:
            for link in self.links:
                if part.endswith(link) and len(part) - len(link) >= self.shortest:
                    found = max(found, self._logarithm(part[: -len(link)]))
        return found


def read_parts(path: str | Path) -> Decompound:
    """A table of words and their parts: lines `word<TAB>part part ...`, or of JSON: {"word": ..., "parts": [...]}.

    Words that it lacks stay whole. Raises DataError: missing, not UTF-8, a line of neither form.
    """
    file = Path(path)
    try:
        lines = file.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: byte {error.start} is not UTF-8; convert the file to UTF-8") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); give a table of words and their parts") from error
    table = dict(_rows(file, lines))
    return lambda word: table.get(word, (word,))


def surface_parts(word: str, parts: Sequence[str]) -> tuple[str, ...]:
    """The parts as they stand in the word: "".join of the result is the word.

    A decompounder may give other letters than stand there (Kinder-garten: "Kind", "Garten"): the word is cut where an
    alignment with the joined parts, of the fewest edits, passes from one to the next. The word whole where a part
    would be empty, or more than half of its letters would be edited.
    """
    parts = [part for part in parts if part]
    joined = "".join(parts)
    if joined == word or len(parts) < 2:
        return tuple(parts) if joined == word and parts else (word,)
    edits, ends = _aligned(word, joined)
    cuts, length = [0], 0
    for part in parts[:-1]:
        length += len(part)
        cuts.append(ends[length])
    cuts.append(len(word))
    if edits > len(word) / 2 or any(begin >= end for begin, end in pairwise(cuts)):
        return (word,)
    return tuple(word[begin:end] for begin, end in pairwise(cuts))


def _cuts(sums: Sequence[Mapping[int, tuple[float, int]]], end: int) -> list[int]:
    cuts = []
    for row in reversed(sums[1:]):
        cuts.append(end)
        end = row[end][1]
    return cuts[::-1]


def _rows(file: Path, lines: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            if line.startswith("{"):
                record = json.loads(line)
                word, parts = record["word"], tuple(record["parts"])
            else:
                word, text = line.split("\t")
                parts = tuple(text.split())
            if not word or not parts or not all(isinstance(each, str) for each in (word, *parts)):
                raise ValueError("empty, or no text")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'{file}: line {number} is neither word<TAB>parts nor {{"word": ..., "parts": [...]}} ({error})'
            ) from error
        yield word, parts


def _aligned(word: str, other: str) -> tuple[int, list[int]]:
    """Edits from one to the other, and for each length of the other, how much of the word stands for it: the longest
    stretch on a cheapest path."""
    cost = [[i + j for j in range(len(other) + 1)] for i in range(len(word) + 1)]
    for i, own in enumerate(word, 1):
        for j, letter in enumerate(other, 1):
            change = cost[i - 1][j - 1] + (own.lower() != letter.lower())
            cost[i][j] = min(change, cost[i - 1][j] + 1, cost[i][j - 1] + 1)
    ends = [0] * (len(other) + 1)
    i, j = len(word), len(other)
    ends[j] = i
    while i or j:
        if i and j and cost[i][j] == cost[i - 1][j - 1] + (word[i - 1].lower() != other[j - 1].lower()):
            i, j = i - 1, j - 1
            ends[j] = i
        elif i and cost[i][j] == cost[i - 1][j] + 1:
            i -= 1
        else:
            j -= 1
            ends[j] = i
    return cost[-1][-1], ends
