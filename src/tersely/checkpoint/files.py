"""Files of a checkpoint, read in pieces; what cannot be read is a CheckpointError."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersely.errors import CheckpointError

CHUNK = 8 << 20  # bytes held while a file is streamed


def stream(path: Path, offset: int = 0, nbytes: int | None = None) -> Iterator[memoryview]:
    """`nbytes` bytes (all by default) of a file from `offset`, in chunks; each is valid until the next but one, so that
    one can be worked on while the next is read."""
    with reading(path) as descriptor:
        end = os.fstat(descriptor).st_size if nbytes is None else offset + nbytes
        size = min(CHUNK, end - offset)
        buffers = cycle([memoryview(bytearray(size)) for _ in range(1 + (offset + size < end))])
        while offset < end:
            chunk = next(buffers)[: end - offset]
            fill(descriptor, chunk, offset, path)
            offset += len(chunk)
            yield chunk


def is_plain_name(name: str) -> bool:
    """Whether `name` is the name of a file in a folder, not a path that could lead elsewhere."""
    return name not in {"", ".", ".."} and not re.search(r"[/\\\0]", name)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for chunk in stream(path):
        digest.update(chunk)
    return digest.hexdigest()


def read_bytes(path: Path, offset: int, nbytes: int) -> Tensor:
    data = torch.empty(nbytes, dtype=torch.uint8)
    with reading(path) as descriptor:
        fill(descriptor, data.numpy().data, offset, path)
    return data


def read_text(path: Path) -> bytes:
    return b"".join(bytes(chunk) for chunk in stream(path))


@contextmanager
def reading(path: Path) -> Iterator[int]:
    """A descriptor to read from; an OSError inside is a CheckpointError."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}; check that it is there and readable"
        ) from error


def fill(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise CheckpointError(
                f"{path} ends at byte {offset + done}, {len(view) - done} bytes short: it has changed since "
                "it was opened; restore it and start again"
            )
        done += count


def json_object(text: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} does not hold valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object; download it again")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError for a key that occurs twice (readers differ on it) or is no text."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key occurs twice")
    "".join(value).encode()
    return value
