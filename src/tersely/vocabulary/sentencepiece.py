"""A SentencePiece model file with fewer pieces; every other byte of it stays as it is.

The file is a protobuf message: fields one after the other, each a key (number << 3 | wire type) and a value. Known are

    1 pieces          repeated message: 1 piece (text), 2 score, 3 type (1 by default: normal)
    2 trainer_spec    message: 4 vocab_size, 40 to 43 the ids of unknown, begin, end and padding
    4 self_test_data  texts with the pieces that they have been cut into: goes when pieces go
"""

from __future__ import annotations

import struct
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

_PIECE, _TRAINER, _SELF_TEST = 1, 2, 4
_SIZE = 4
_IDS = frozenset({40, 41, 42, 43})
NORMAL, UNKNOWN, CONTROL = 1, 2, 3
"""Types of pieces: found in texts; stands for what is not; never in a text."""
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class SentencePiece:
    """One piece; its place in the list is its id in the file."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class _Field:
    number: int
    wire: int
    value: int | bytes
    raw: bytes


def read_pieces(data: bytes) -> tuple[SentencePiece, ...]:
    """The pieces in order. ValueError: no SentencePiece model."""
    pieces = tuple(_piece(field.value) for field in _fields(data) if field.number == _PIECE)
    if not pieces:
        raise ValueError("no pieces")
    return pieces


def filtered(data: bytes, texts: Container[str]) -> bytes:
    """The model with the pieces of these texts, in their order, and the numbers that depend on them set."""
    pieces = read_pieces(data)
    places = [place for place, piece in enumerate(pieces) if piece.text in texts]
    if len(places) == len(pieces):
        return data
    new = {old: place for place, old in enumerate(places)}
    parts, place = [], 0
    for field in _fields(data):
        if field.number == _PIECE:
            if place in new:
                parts.append(field.raw)
            place += 1
        elif field.number == _TRAINER and isinstance(field.value, bytes):
            parts.append(_written(_TRAINER, _LENGTH, _trainer(field.value, new)))
        elif field.number != _SELF_TEST:
            parts.append(field.raw)
    return b"".join(parts)


def _trainer(data: bytes, new: Mapping[int, int]) -> bytes:
    parts = []
    for field in _fields(data):
        value = len(new) if field.number == _SIZE else new.get(int(field.value)) if field.number in _IDS else None
        parts.append(field.raw if value is None else _written(field.number, _VARINT, value))
    return b"".join(parts)


def _piece(data: int | bytes) -> SentencePiece:
    if not isinstance(data, bytes):
        raise ValueError("a piece that is a number")
    text, score, kind = "", 0.0, NORMAL
    for field in _fields(data):
        match field.number, field.value:
            case 1, bytes(value):
                text = value.decode()
            case 2, bytes(value):
                score = float(struct.unpack("<f", value)[0])
            case 3, int(value):
                kind = value
    return SentencePiece(text, score, kind)


def _fields(data: bytes) -> Iterator[_Field]:
    at = 0
    while at < len(data):
        start = at
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        value: int | bytes
        if wire == _VARINT:
            value, at = _varint(data, at)
        elif wire in (_FIXED64, _FIXED32, _LENGTH):
            length = {_FIXED64: 8, _FIXED32: 4}.get(wire)
            if length is None:
                length, at = _varint(data, at)
            value = data[at : at + length]
            at += length
        else:
            raise ValueError(f"a field of wire type {wire}")
        if not number or at > len(data):
            raise ValueError("a field that is cut off")
        yield _Field(number, wire, value, data[start:at])


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins there, and where it ends."""
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("a number that is cut off")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _written(number: int, wire: int, value: int | bytes) -> bytes:
    key = _number(number << 3 | wire)
    if isinstance(value, int):
        return key + _number(value)
    return key + _number(len(value)) + value


def _number(value: int) -> bytes:
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])
