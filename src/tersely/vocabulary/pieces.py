"""Tokens in a form that compares across tokenizers: the bytes of text that each stands for.

Byte-level BPE writes " the" as Ġthe, SentencePiece as ▁the, WordPiece as the (and "the" inside a word as ##the). All
three stand for the same bytes, and a special token for a role: the start of a text, its end, padding ...
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tokenizers import Tokenizer

from tersely.errors import CheckpointError

Writing = Literal["bytes", "spaces", "words", "plain"]
"""How tokens are written: a sign for each byte; spaces as ▁; words, with a prefix inside of them; as they stand."""
ROLES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
SPACE = "\u2581"
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""A byte by its number, where characters have no token."""
_WORD = re.compile(r"\w+|[^\w\s]")
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTED]
SIGNS = {**{byte: chr(byte) for byte in _PRINTED}, **{byte: chr(256 + n) for n, byte in enumerate(_HIDDEN)}}
"""Byte -> its sign in byte-level BPE."""
BYTES = {sign: byte for byte, sign in SIGNS.items()}
"""The other way."""


@dataclass(frozen=True)
class Piece:
    """What one token stands for."""

    token: str
    """As the tokenizer writes it."""
    data: bytes
    """The text, with the space before a word; of a special token b""."""
    special: bool = False
    byte: bool = False
    """Written as a byte by its number: <0x41>."""


@dataclass(frozen=True, eq=False)
class Pieces:
    """The tokens of a tokenizer by id, and how it cuts a text that it has no token for."""

    by_id: Mapping[int, Piece]
    writing: Writing
    roles: Mapping[str, int]
    """bos, eos, ... -> id."""
    prefix: str
    """Of tokens inside a word; "" where there are none."""
    merges: tuple[tuple[str, str], ...] | None
    """Of a BPE, in their order; None for other models."""
    tokenizer: Tokenizer = field(repr=False)
    _ids: Mapping[str, int] = field(repr=False)

    @property
    def rows(self) -> int:
        """The largest id and one."""
        return max(self.by_id) + 1

    def id_of(self, token: str) -> int | None:
        """The id of a token as the tokenizer writes it; None for one that it does not have."""
        return self._ids.get(token)

    def cut(self, data: bytes) -> tuple[int, ...]:
        """The ids into which the model cuts this text, which need be no valid UTF-8; without those of unknown text."""
        match self.writing:
            case "bytes":
                return self._model("".join(SIGNS[byte] for byte in data))
            case "spaces":
                return tuple(i for text, raw in _valid(data) for i in self._spaced(text, raw))
            case "words":
                return tuple(i for word, inside in _words(data, self._normal) for i in self._longest(word, inside))
        return tuple(i for word in data.decode("utf-8", "replace").split() for i in self._model(word))

    def _model(self, text: str) -> tuple[int, ...]:
        unknown = self.roles.get("unk")
        return tuple(token.id for token in self.tokenizer.model.tokenize(text) if token.id != unknown) if text else ()

    def _spaced(self, text: str, raw: bytes) -> tuple[int, ...]:
        found = (self._ids.get(f"<0x{byte:02X}>") for byte in raw)
        return self._model(text.replace(" ", SPACE)) + tuple(i for i in found if i is not None)

    def _longest(self, word: str, inside: bool) -> tuple[int, ...]:
        """Greedy longest match; () where it ends nowhere."""
        found: list[int] = []
        start = 0
        while start < len(word):
            prefix = self.prefix if start or inside else ""
            for end in range(len(word), start, -1):
                own = self._ids.get(prefix + word[start:end])
                if own is not None:
                    found.append(own)
                    start = end
                    break
            else:
                return ()
        return tuple(found)

    def _normal(self, text: str) -> str:
        normalizer = self.tokenizer.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))


def read_pieces(tokenizer: Tokenizer, roles: Mapping[str, int] | None = None) -> Pieces:
    """The tokens of a tokenizer; roles: of special tokens, as `special_roles` finds them.

    CheckpointError: a BPE that marks the ends of words, or words that go on: how its tokens read is not known here.
    """
    plain = json.loads(tokenizer.to_str())
    model = plain["model"]
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model["type"] == "BPE" and model.get(key):
            raise CheckpointError(f"the tokenizer is a BPE with {key}={model[key]!r}; its tokens cannot be compared")
    writing = writing_of(plain)
    prefix = model.get("continuing_subword_prefix") or "" if model["type"] == "WordPiece" else ""
    ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    given = dict(roles or {})
    unknown = unknown_of(model, ids)
    if unknown is not None:
        given.setdefault("unk", unknown)
    added = {token["content"]: bool(token["special"]) for token in plain["added_tokens"]}
    special = set(given.values()) | {ids[content] for content, own in added.items() if own}
    by_id = {i: _piece(token, i in special, token in added, writing, prefix) for token, i in ids.items()}
    merges = tuple(pair(merge) for merge in model["merges"]) if model["type"] == "BPE" else None
    return Pieces(by_id, writing, given, prefix, merges, tokenizer, ids)


def special_roles(tokenizer_config: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, int]:
    """Role -> id, from tokenizer_config.json and token -> id. What it names but the tokenizer lacks is left out."""
    found = {}
    for role in ROLES:
        named = tokenizer_config.get(f"{role}_token")
        content = named.get("content") if isinstance(named, Mapping) else named
        if isinstance(content, str) and content in ids:
            found[role] = ids[content]
    return found


def match(old: Pieces, new: Pieces) -> dict[int, int]:
    """New id -> the old id that stands for the same text or role, for all that have one.

    Where several old tokens do, the one that is written the same way: as itself, then not as a byte's number.
    """
    texts: dict[tuple[bytes, bool | None], int] = {}
    contents: dict[str, int] = {}
    for i, piece in sorted(old.by_id.items()):
        if piece.special:
            contents[piece.token] = i
        elif piece.data:
            texts.setdefault((piece.data, piece.byte), i)
    for (data, byte), i in list(texts.items()):
        if not byte or (data, False) not in texts:
            texts[data, None] = i
    roles: dict[int, list[str]] = {}
    for role in ROLES:
        if role in new.roles:
            roles.setdefault(new.roles[role], []).append(role)
    found: dict[int, int] = {}
    alike = old.writing == new.writing and old.prefix == new.prefix
    for i, piece in new.by_id.items():
        own: int | None
        if piece.special:
            named = (old.roles[role] for role in roles.get(i, ()) if role in old.roles)
            own = next(named, contents.get(piece.token))
        else:
            own = old.id_of(piece.token) if alike else None
            if own is None or old.by_id[own].special:
                own = texts.get((piece.data, piece.byte), texts.get((piece.data, None)))
        if own is not None:
            found[i] = own
    return found


def steps(plain: Mapping[str, Any], key: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer, pre_tokenizer, decoder or post_processor of tokenizer.json, nested ones too."""
    waiting: list[Any] = [plain.get(key)]
    while waiting:
        step = waiting.pop(0)
        if not step:
            continue
        if step["type"] != "Sequence":
            yield step
            continue
        inside: Sequence[Any] = next(own for own in step.values() if isinstance(own, list))
        waiting[:0] = inside


def writing_of(plain: Mapping[str, Any]) -> Writing:
    """How a tokenizer.json writes its tokens."""
    keys = ("normalizer", "pre_tokenizer", "decoder")
    found = [step for key in keys for step in steps(plain, key)]
    if any(step["type"] == "ByteLevel" for step in found):
        return "bytes"
    if plain["model"]["type"] == "WordPiece":
        return "words"
    if any(step["type"] == "Metaspace" or SPACE in (step.get("content"), step.get("prepend")) for step in found):
        return "spaces"
    return "plain"


def unknown_of(model: Mapping[str, Any], ids: Mapping[str, int]) -> int | None:
    """The id that stands for text without a token, in tokenizer.json's `model`; ids: token -> id."""
    if model["type"] == "Unigram":
        unknown: int | None = model["unk_id"]
        return unknown
    return ids.get(model.get("unk_token") or "")


def _piece(token: str, special: bool, added: bool, writing: Writing, prefix: str) -> Piece:
    if special:
        return Piece(token, b"", special=True)
    if added:
        return Piece(token, token.encode("utf-8"))
    if writing == "bytes":
        # A sign that stands for no byte can only be what somebody put there by hand.
        own = bytes(BYTES[sign] for sign in token) if all(sign in BYTES for sign in token) else token.encode("utf-8")
        return Piece(token, own)
    if (byte := BYTE_TOKEN.fullmatch(token)) is not None:
        return Piece(token, bytes([int(byte[1], 16)]), byte=True)
    if writing == "spaces":
        return Piece(token, token.replace(SPACE, " ").encode("utf-8"))
    if writing == "words":
        inside = bool(prefix) and token.startswith(prefix) and token != prefix
        text = token.removeprefix(prefix) if inside else token
        return Piece(token, (" " * (not inside and text[:1].isalnum()) + text).encode("utf-8"))
    return Piece(token, token.encode("utf-8"))


def _valid(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Stretches of valid UTF-8, each with the bytes behind it that are not."""
    text = data.decode("utf-8", "surrogateescape")
    for stretch in re.finditer("([^\udc80-\udcff]*)([\udc80-\udcff]*)", text):
        yield stretch[1], stretch[2].encode("utf-8", "surrogateescape")


def _words(data: bytes, normal: Any) -> Iterator[tuple[str, bool]]:
    """The words of a text, and whether each goes on one that was begun before the text."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return
    begun = text[:1].isalnum()
    for word in _WORD.findall(normal(text)):
        yield word, begun
        begun = False


def pair(merge: Any) -> tuple[str, str]:
    """A merge as tokenizer.json writes it: a pair, or both with a space between them."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second
