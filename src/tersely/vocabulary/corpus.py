"""Texts in files larger than memory: read in blocks, cut into units of work that are the same for every run.

.txt: UTF-8, or documents between <|endoftext|>. .jsonl: an object with a "text" on each line. .json: SQuAD's form
(paragraphs and questions), or a list of texts or of objects with a "text". Each also as .gz.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from tersely.calibrate import DOCUMENT_SEPARATOR
from tersely.errors import DataError

FORMS = (".txt", ".jsonl", ".json")
_BLOCK = 1 << 16
"""Bytes of a text that are tokenized at once, at least."""
_LARGE = 16 * _BLOCK
"""After which it is cut before any line."""
_END = 1 << 20
"""Bytes at either end of a file that it is known by."""
_BOM = b"\xef\xbb\xbf"
_SPACES = b" \t\r\n\v\f"


@dataclass(frozen=True)
class Unit:
    """Part of a file: what begins in its bytes first .. last."""

    path: str
    first: int
    last: int


@dataclass(frozen=True)
class Texts:
    """The texts of some files, in order; may be read again and again, and holds one block at a time."""

    paths: tuple[Path, ...]

    def __iter__(self) -> Iterator[str]:
        for path in self.paths:
            for unit in units(path, path.stat().st_size + 1):
                yield from read(unit)


def open_texts(paths: Sequence[str | Path]) -> Texts:
    """Raises DataError: a file that is missing, empty or of unknown form. What is within is seen when it is read."""
    if not paths:
        raise DataError("there are no texts; give files of " + ", ".join(FORMS))
    for path in paths:
        check_file(Path(path))
    return Texts(tuple(Path(path) for path in paths))


def check_file(path: Path) -> None:
    """Raises DataError: missing, empty, or of an unknown form."""
    if not path.is_file():
        raise DataError(f"{path}: no such text file; give one of {', '.join(FORMS)}, or one of these with .gz")
    if _form(path) not in FORMS:
        raise DataError(f"{path}: unknown form of text; give one of {', '.join(FORMS)}, or one of these with .gz")
    if not path.stat().st_size:
        raise DataError(f"{path}: the file holds no text; give one that does")


def identity(path: Path) -> str:
    """SHA-256 (hex) of a file's size and of a megabyte at either end."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_END))
        file.seek(max(0, size - _END))
        digest.update(file.read())
    return digest.hexdigest()


def units(path: Path, nbytes: int) -> Iterator[Unit]:
    """A file in units of so many bytes; as one where it cannot be entered in the middle."""
    size = path.stat().st_size
    step = nbytes if path.suffix != ".gz" and _form(path) != ".json" else size
    for first in range(0, size, step):
        yield Unit(str(path), first, min(first + step, size))


def read(unit: Unit) -> Iterator[str]:
    """The texts of a unit, none of them empty. A .txt is cut before lines, where there are such, that do not begin with
    white space, or with a single space at most.

    Raises DataError: not UTF-8 (which byte), not JSON or without a text (which line).
    """
    path = Path(unit.path)
    try:
        match _form(path):
            case ".txt":
                texts = _plain(path, unit)
            case ".jsonl":
                texts = _records(path, unit)
            case _:
                texts = _whole(path)
        yield from (text for text in texts if text)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); give a file that can") from error


def _form(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _open(path: Path) -> BufferedIOBase:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _lines(path: Path, unit: Unit, within: int) -> Iterator[tuple[int, bytes]]:
    """The lines of a unit, with the bytes at which they begin."""
    with _open(path) as file:
        if path.suffix == ".gz":
            place, last = 0, math.inf
        else:
            last = _cut(file, unit.last, within)
            place = _cut(file, unit.first, within)
            file.seek(place)
        while place < last and (line := file.readline()):
            yield place, line
            place += len(line)


def _cut(file: BufferedIOBase, place: int, within: int) -> int:
    """Where a unit ends that was to end at a place: before the first line there that a text may begin with, or before
    the first of all where there is none within so many bytes."""
    if not place:
        return 0
    file.seek(place - 1)
    first = here = place - 1 + len(file.readline())
    while here - first < within:
        line = file.readline()
        if not line or _begins(line):
            return here
        here += len(line)
    return first


def _begins(line: bytes) -> bool:
    """Whether a text may be cut before a line: no pre-tokenizer reaches across from there."""
    return line[:1] not in _SPACES or (line[:1] == b" " and line[1:2] not in _SPACES)


def _plain(path: Path, unit: Unit) -> Iterator[str]:
    held: list[bytes] = []
    first = nbytes = 0
    separated = False
    for place, line in _lines(path, unit, _BLOCK):
        if nbytes >= _LARGE or (nbytes >= _BLOCK and _begins(line)):
            separated = separated or any(DOCUMENT_SEPARATOR.encode() in each for each in held)
            yield from _documents(_text(b"".join(held), path, first), separated)
            held, nbytes = [], 0
        if not held:
            first = place
        held.append(line)
        nbytes += len(line)
    yield from _documents(_text(b"".join(held), path, first), separated)


def _documents(text: str, separated: bool) -> Iterator[str]:
    if separated or DOCUMENT_SEPARATOR in text:
        yield from (part.strip() for part in text.split(DOCUMENT_SEPARATOR))
    else:
        yield text


def _records(path: Path, unit: Unit) -> Iterator[str]:
    for place, line in _lines(path, unit, 0):
        if line.isspace():
            continue
        try:
            yield _text_of(json.loads(_text(line, path, place)))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f'{path}: the line at byte {place} is no JSON object with a "text" ({error})') from error


def _whole(path: Path) -> Iterator[str]:
    with _open(path) as file:
        content = file.read()
    try:
        plain = json.loads(_text(content, path, 0))
        yield from list(_squad(plain["data"]) if isinstance(plain, dict) else (_text_of(each) for each in plain))
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f'{path}: no JSON in the form of SQuAD, nor a list of texts or of objects with a "text" ({error!r})'
        ) from error


def _squad(articles: Iterable[Any]) -> Iterator[str]:
    for article in articles:
        for paragraph in article["paragraphs"]:
            yield str(paragraph["context"])
            yield from (str(question["question"]) for question in paragraph["qas"])


def _text_of(record: Any) -> str:
    text = record if isinstance(record, str) else record["text"]
    if not isinstance(text, str):
        raise TypeError(f"its text is {type(text).__name__}")
    text.encode("utf-8")  # JSON can hold halves of characters, which no text has
    return text


def _text(content: bytes, path: Path, place: int) -> str:
    if not place and content.startswith(_BOM):
        content, place = content[len(_BOM) :], len(_BOM)
    try:
        return content.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {place + error.start} is not UTF-8; convert the file to UTF-8") from error
