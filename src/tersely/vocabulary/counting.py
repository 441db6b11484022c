"""How often each token stands in texts: over many files, larger than memory, by processes, and in steps.

V = rows of a tokenizer, its largest id and one.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from tersely.errors import CheckpointError, OutputError, UsageError
from tersely.vocabulary.corpus import Unit, check_file, identity, read, units

Progress = Callable[[str, float], None]
Ids = NDArray[np.int64]
UNIT = 16 << 20
"""Bytes of a unit of work: what is lost at most, for each process, when a count is killed."""
_WORD = re.compile(r"\S+")
_AHEAD = 2
"""Units for each process that are waiting or at work."""


@dataclass(frozen=True, eq=False)
class Counted:
    """What was found in some texts, without a tokenizer's special tokens at their ends."""

    tokens_V: Ids
    """int64: how often each token stands there."""
    texts: int = 0
    """Blocks or documents, each tokenized alone."""
    bytes: int = 0
    """Of UTF-8."""
    characters: int = 0
    words: int = 0
    """Runs of characters that are no white space."""
    whole: int = 0
    """Words that are one token, with the space before them or without it."""

    @property
    def tokens(self) -> int:
        """All together."""
        return int(self.tokens_V.sum())

    def __add__(self, other: Counted) -> Counted:
        return Counted(
            self.tokens_V + other.tokens_V,
            self.texts + other.texts,
            self.bytes + other.bytes,
            self.characters + other.characters,
            self.words + other.words,
            self.whole + other.whole,
        )


_NUMBERS = ("texts", "bytes", "characters", "words", "whole")


@dataclass(frozen=True)
class _Job:
    """What is counted, from the files themselves: a state of another job is refused."""

    tokenizer: str
    files: Mapping[str, Sequence[str]]
    """Group -> identities of its files."""
    unit: int

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def count_tokens(
    tokenizer: Path,
    groups: Mapping[str, Sequence[Path]],
    *,
    state: Path | None = None,
    processes: int = 1,
    unit: int = UNIT,
    say: Progress = lambda _what, _share: None,
) -> dict[str, Counted]:
    """Count the tokens of groups of files: group (a language, a domain) -> what was found there.

    tokenizer: a tokenizer.json. state: a .npz that is written after each unit of `unit` bytes and taken up again: a
    count that was killed goes on and ends with the same numbers, whatever the number of processes; one that is done
    is read only. Raises UsageError: no groups, processes or unit below 1; CheckpointError: not a tokenizer.json;
    DataError: files that are missing, of unknown form, or unreadable; OutputError: a state of other files, of another
    tokenizer or unit, or one that cannot be written.
    """
    if processes < 1 or unit < 1:
        raise UsageError(f"processes={processes}, unit={unit}: give at least 1")
    if not groups or not all(groups.values()):
        raise UsageError("there is nothing to count; give at least one group, each with at least one file")
    for path in (path for paths in groups.values() for path in paths):
        check_file(path)
    read_tokenizer = load(str(tokenizer))
    rows = rows_of(read_tokenizer)
    work = [(group, each) for group, paths in groups.items() for path in paths for each in units(path, unit)]
    job = _Job(
        hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
        {group: [identity(path) for path in paths] for group, paths in groups.items()},
        unit,
    )
    done: set[int] = set()
    found = {group: Counted(np.zeros(rows, np.int64)) for group in groups}
    if state is not None and state.exists():
        done, found = _resume(state, job, rows)
    waiting = [n for n in range(len(work)) if n not in done]
    for n, counted in _finished(str(tokenizer), {n: work[n][1] for n in waiting}, processes):
        group = work[n][0]
        found[group] += counted
        done.add(n)
        if state is not None:
            _write(state, job, done, found)
        say(f"counting {Path(work[n][1].path).name}", len(done) / len(work))
    return found


def count_unit(tokenizer: str, unit: Unit) -> Counted:
    """What is found in one unit by the tokenizer of a tokenizer.json."""
    return count_texts(load(tokenizer), read(unit))


def count_texts(tokenizer: Tokenizer, texts: Iterable[str]) -> Counted:
    """What is found in texts that are at hand, each whole even where the tokenizer would cut or pad it."""
    if tokenizer.truncation or tokenizer.padding:
        tokenizer = Tokenizer.from_str(tokenizer.to_str())
        tokenizer.no_truncation()
        tokenizer.no_padding()
    rows = rows_of(tokenizer)
    tokens_V = np.zeros(rows, np.int64)
    numbers = dict.fromkeys(_NUMBERS, 0)
    for text in texts:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        tokens_V += np.bincount(encoding.ids, minlength=rows)
        words, whole = _words(text, encoding)
        own = (1, len(text.encode("utf-8")), len(text), words, whole)
        for name, number in zip(_NUMBERS, own, strict=True):
            numbers[name] += number
    return Counted(tokens_V, **numbers)


@lru_cache(maxsize=1)
def load(path: str) -> Tokenizer:
    """Reads a tokenizer.json, once for all units of a process. CheckpointError: it is none."""
    try:
        return Tokenizer.from_file(path)
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(f"{path}: not a tokenizer.json ({error}); give one that tokenizers reads") from error


def rows_of(tokenizer: Tokenizer) -> int:
    """V."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _words(text: str, encoding: Encoding) -> tuple[int, int]:
    """How many words a text has, and how many of them are one token."""
    spans = np.array([word.span() for word in _WORD.finditer(text)], np.int64).reshape(-1, 2)
    if not len(spans) or not encoding.ids:
        return len(spans), 0
    begins, ends = spans.T
    edges = np.zeros(len(text) + 1, np.int8)
    edges[begins] = 1
    edges[ends] = -1
    blank = np.cumsum(edges, dtype=np.int8) == 0
    end_at = np.full(len(text) + 1, -1, np.int64)
    end_at[begins] = ends
    first, last = np.array(encoding.offsets, np.int64).T
    first = first + (blank[first] & (last > first))
    # The bytes of one character share its place: none of them is the word alone.
    shared = (first[1:] == first[:-1]) & (last[1:] == last[:-1])
    alone = np.ones(len(first), bool)
    alone[1:] &= ~shared
    alone[:-1] &= ~shared
    return len(begins), int(((end_at[first] == last) & alone).sum())


def _finished(tokenizer: str, work: Mapping[int, Unit], processes: int) -> Iterator[tuple[int, Counted]]:
    """Units by number as they come to be done, in any order."""
    if processes == 1 or len(work) < 2:
        for n, unit in work.items():
            yield n, count_unit(tokenizer, unit)
        return
    left = iter(work.items())
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(count_unit, tokenizer, unit): n for n, unit in islice(left, _AHEAD * processes)}
        try:
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
                    running |= {pool.submit(count_unit, tokenizer, unit): n for n, unit in islice(left, 1)}
        finally:
            for future in running:
                future.cancel()


def _write(state: Path, job: _Job, done: set[int], found: Mapping[str, Counted]) -> None:
    arrays: dict[str, NDArray[np.generic]] = {
        "job": np.array(job.to_json()),
        "done": np.array(sorted(done), np.int64),
        "groups": np.array(json.dumps(list(found))),
    }
    for n, own in enumerate(found.values()):
        arrays[f"tokens_{n}"] = own.tokens_V
        arrays[f"numbers_{n}"] = np.array([getattr(own, name) for name in _NUMBERS], np.int64)
    partial = state.with_name(state.name + ".partial")
    try:
        with partial.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(state)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise OutputError(f"{state}: cannot be written ({error.strerror}); choose another place") from error


def _resume(state: Path, job: _Job, rows: int) -> tuple[set[int], dict[str, Counted]]:
    try:
        with state.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            own = json.loads(str(stored["job"]))
            done = {int(n) for n in stored["done"]}
            found = {}
            for n, group in enumerate(json.loads(str(stored["groups"]))):
                numbers = (int(number) for number in stored[f"numbers_{n}"])
                found[group] = Counted(stored[f"tokens_{n}"], *numbers)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise OutputError(f"{state}: not the state of a count ({error}); choose another place") from error
    asked = json.loads(job.to_json())
    if own != asked:
        what = [name for name in asked if own.get(name) != asked[name]]
        names = {"tokenizer": "another tokenizer", "files": "other files or groups", "unit": "another size of unit"}
        raise OutputError(
            f"{state}: the state of a count with {' and '.join(names[name] for name in what)}; "
            "choose another place, or remove it to count anew"
        )
    assert all(len(counted.tokens_V) == rows for counted in found.values())
    return done, found
