"""The files beside tokenizer.json that hold tokens or ids, for the tokens that stay.

Each is written again in its own form, or named with the reason why it had to go: one that stays as it was would bring
tokens back, or give them other ids.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tersely.errors import UsageError
from tersely.vocabulary import sentencepiece
from tersely.vocabulary.pieces import SIGNS
from tersely.vocabulary.references import ADDED, CONFIGS, LISTS, NAMED, VOCAB, content, named_tokens, replaced_config
from tersely.vocabulary.tokenizer import Vocabulary

VOCABULARIES = re.compile(
    r".*\.(model|spm|tiktoken|bpe|codes)|tokenizer\.model.*|(vocab|encoder|tekken)\.json|(merges|vocab|dict)\.txt"
)
"""Files that hold a vocabulary of their own, beside that of tokenizer.json."""
_MODEL = re.compile(r".*\.(model|spm|tiktoken)|tokenizer\.model.*")
_INDENTED = re.compile(rb"\{\r?\n( +)")


@dataclass(frozen=True, eq=False)
class Renumbering:
    """Old ids -> new ids of the tokens that stay."""

    vocabulary: Vocabulary
    new: Mapping[int, int]
    """Rising with the old ids, from 0 without a hole."""
    tokens: frozenset[str]
    """Those that stay."""

    def merge_stays(self, first: str, second: str) -> bool:
        """Whether both parts of a merge stay, and what it makes."""
        made = first + second[len(self.vocabulary.prefix) :]
        return first in self.tokens and second in self.tokens and made in self.tokens

    def replace(self, where: str, i: int) -> int | None:
        """The new id; None for one that lay beyond all rows. UsageError: its token is to go, but is named here."""
        if i >= self.vocabulary.rows:
            return None
        if i not in self.new:
            raise UsageError(
                f"{where} names the token {self.vocabulary.tokens[i]!r} ({i}), which is not among those that stay; "
                "keep it, or take it out there"
            )
        return self.new[i]


class Removed(Exception):  # noqa: N818 (no error: a file that goes)
    """Why a file has to go."""


def rewritten(name: str, numbers: Renumbering) -> bytes:
    """A file of the vocabulary for the tokens that stay, byte for byte as it was where nothing changes.

    Raises Removed: it has to go. UsageError: it names a token that is to go.
    """
    data = numbers.vocabulary.files[name]
    if _MODEL.fullmatch(name):
        return _model(data, numbers)
    if name == "merges.txt":
        return _merges(data, numbers)
    if name == "vocab.txt":
        return _lines(data, numbers)
    changes: dict[str, Callable[[dict[str, Any], Renumbering, str], dict[str, Any]]] = {
        VOCAB: _ids,
        ADDED: _ids,
        **dict.fromkeys(CONFIGS, _config),
        **dict.fromkeys(NAMED, _names),
    }
    if name not in changes:
        if VOCABULARIES.fullmatch(name):
            raise Removed("its form is not one that is written here; engines read tokenizer.json instead")
        return data
    old = numbers.vocabulary.plain[name]
    return in_the_form_of(data, old, changes[name](old, numbers, name))


def in_the_form_of(data: bytes, old: Any, new: Any) -> bytes:
    """JSON as the file `data` has it: the same bytes for the same value, else its indent and its way with Unicode."""
    if new == old and json.dumps(new) == json.dumps(old):
        return data
    indented = _INDENTED.match(data)
    text = json.dumps(
        new, ensure_ascii=data.isascii() and rb"\u" in data, indent=len(indented[1]) if indented else None
    )
    return text.encode() + b"\n" * data.endswith(b"\n")


def _config(old: dict[str, Any], numbers: Renumbering, name: str) -> dict[str, Any]:
    changed: dict[str, Any] = replaced_config(old, numbers.replace, name)
    return changed


def _names(old: dict[str, Any], numbers: Renumbering, name: str) -> dict[str, Any]:
    ids = numbers.vocabulary.ids
    for key, token in named_tokens(old):
        if token in ids:
            numbers.replace(f"{name}: {key}", ids[token])
    changed = dict(old)
    for key in LISTS:
        if isinstance(old.get(key), list):
            changed[key] = [value for value in old[key] if content(value) in numbers.tokens]
    if old.get("added_tokens_decoder"):
        numbered = ((int(i), added) for i, added in old["added_tokens_decoder"].items())
        changed["added_tokens_decoder"] = {str(numbers.new[i]): held for i, held in numbered if i in numbers.new}
    return changed


def _ids(old: dict[str, Any], numbers: Renumbering, _: str) -> dict[str, Any]:
    """Of a file that is token -> id."""
    ids = numbers.vocabulary.ids
    for token, i in old.items():
        if ids.get(token) != i:
            raise Removed(
                f"it has {token!r} as {i}, tokenizer.json as {ids.get(token)}: the two are not of one tokenizer"
            )
    return {token: numbers.new[i] for token, i in old.items() if i in numbers.new}


def _merges(data: bytes, numbers: Renumbering) -> bytes:
    kept = []
    for at, line in enumerate(_text(data).split("\n")):
        parts = line.removesuffix("\r").split(" ")
        if (at == 0 and line.startswith("#version")) or parts == [""]:
            kept.append(line)
        elif len(parts) != 2:
            raise Removed(f"its line {at + 1} is no merge of two tokens")
        elif numbers.merge_stays(parts[0], parts[1]):
            kept.append(line)
    return "\n".join(kept).encode()


def _lines(data: bytes, numbers: Renumbering) -> bytes:
    """Of a file with the token of each id on its line."""
    *lines, rest = _text(data).split("\n")
    lines += [rest] if rest else []
    for i, line in enumerate(lines):
        if i >= numbers.vocabulary.rows or line.removesuffix("\r") != numbers.vocabulary.tokens[i]:
            raise Removed(f"its line {i + 1} is {line!r}, which is not the token {i} of tokenizer.json")
    kept = [line for i, line in enumerate(lines) if i in numbers.new]
    return "\n".join(kept if rest else [*kept, ""]).encode()


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Removed("it is not UTF-8") from error


def _model(data: bytes, numbers: Renumbering) -> bytes:
    ranks = _ranks(data)
    if ranks is not None:
        return _ranked(ranks, numbers)
    try:
        pieces = sentencepiece.read_pieces(data)
    except ValueError as error:
        raise Removed("it is neither a SentencePiece model nor a list of tokens with their ranks") from error
    ids = numbers.vocabulary.ids
    if lacking := next((piece.text for piece in pieces if piece.text not in ids), None):
        raise Removed(f"it has the piece {lacking!r}, which tokenizer.json lacks: the two are not of one tokenizer")
    kept = [piece.text for piece in pieces if piece.text in numbers.tokens]
    new = {token: numbers.new[ids[token]] for token in kept}
    normal = {piece.text for piece in pieces if piece.type not in (sentencepiece.UNKNOWN, sentencepiece.CONTROL)}
    before = {ids[piece.text] - place for place, piece in enumerate(pieces) if piece.text in normal}
    behind = {new[token] - place for place, token in enumerate(kept) if token in normal}
    if len(before) > 1 or not behind <= before:
        raise Removed("its pieces would have other places among the ids than before")
    return sentencepiece.filtered(data, numbers.tokens)


def _ranks(data: bytes) -> list[tuple[bytes, bytes, int]] | None:
    """The lines of a tiktoken file: as they stand, the token's bytes, its rank; None for another file."""
    found = []
    try:
        for line in data.splitlines():
            token, rank = line.split()
            found.append((token, base64.b64decode(token, validate=True), int(rank)))
    except (ValueError, binascii.Error):
        return None
    return found or None


def _ranked(ranks: list[tuple[bytes, bytes, int]], numbers: Renumbering) -> bytes:
    lines = []
    for written, token, rank in ranks:
        sign = "".join(SIGNS[byte] for byte in token)
        if numbers.vocabulary.ids.get(sign) != rank:
            raise Removed(f"it has {token!r} as {rank}, tokenizer.json as {numbers.vocabulary.ids.get(sign)}")
        if rank in numbers.new:
            lines.append(b"%s %d\n" % (written, numbers.new[rank]))
    return b"".join(lines)
