"""Text -> fixed token sequences -> micro-batches: the same data for every run, named by a hash.

B = sequences of a micro-batch, L = tokens of its longest sequence.
"""

import hashlib
import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from tersely.errors import DataError, UsageError

DOCUMENT_SEPARATOR = "<|endoftext|>"
_CHARACTERS_A_TOKEN = 16  # more than almost any text has
_LONG = 2_000_000  # characters; a shorter text is tokenized whole
_SPACE = re.compile(r"\s")

_SLICED = re.compile(r"(?P<path>.+)\[(?P<slice>[^\[\]]*)\]")
_SLICE = re.compile(r"\s*(-?\d+)?\s*:\s*(-?\d+)?\s*")


class Tokenizer(Protocol):
    """What is asked of a tokenizer: the call of a fast Hugging Face tokenizer.

    `tokenizer(text, return_offsets_mapping=True, verbose=False)` gives "input_ids" (with the tokenizer's own
    special tokens) and "offset_mapping" ((first, last + 1) character of each token; (0, 0) for special ones).
    """

    @property
    def is_fast(self) -> bool:
        """Whether it can say where its tokens stand."""
        ...

    def __call__(self, text: str, *, return_offsets_mapping: bool, verbose: bool) -> Mapping[str, Any]: ...


@dataclass(frozen=True, eq=False)
class Sequences:
    """Token sequences of one text.

    ids: 1-D int64 tensors, each of 2 to `context` tokens.
    kind: "documents" (each tokenized alone) or "windows" (consecutive cuts of one text).
    nbytes: for each sequence, the UTF-8 bytes of the text that its predicted tokens stand for: from the end
        of the first token (which nothing predicts; a BOS stands for no text) to the end of the last one.
    sha256: of kind, context, the windows taken and the text taken: equal hashes mean equal data.
    """

    ids: tuple[Tensor, ...]
    kind: Literal["documents", "windows"]
    nbytes: tuple[int, ...]
    sha256: str

    @property
    def tokens(self) -> int:
        """Tokens of all sequences together."""
        return sum(len(ids_L) for ids_L in self.ids)


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Sequences that run together, padded on the right.

    index: which sequences these rows are. ids_BL: int64. keep_BL: bool, False on padding; None without it.
    """

    index: tuple[int, ...]
    ids_BL: Tensor
    keep_BL: Tensor | None


def documents(text: str) -> tuple[str, ...]:
    """The documents of a text: what stands between separators, stripped, without the empty ones."""
    return tuple(document for part in text.split(DOCUMENT_SEPARATOR) if (document := part.strip()))


def select(text: str, documents_slice: str) -> str:
    """The documents `a:b` of a text, counted as Python slices count: ":256", "-200:", "10:20".

    The result is a text of documents again. Raises DataError: no documents in the text, or none in the slice;
    UsageError: not a slice.
    """
    bounds = _SLICE.fullmatch(documents_slice)
    if bounds is None:
        raise UsageError(f"[{documents_slice}] is not a slice of documents; write it as [:256], [-200:] or [10:20]")
    if DOCUMENT_SEPARATOR not in text:
        raise DataError(
            f"[{documents_slice}] selects documents, but the text has no {DOCUMENT_SEPARATOR}; "
            "separate the documents with it, or leave the slice out"
        )
    first, last = (None if bound is None else int(bound) for bound in bounds.groups())
    found = documents(text)
    chosen = found[first:last]
    if not chosen:
        raise DataError(f"[{documents_slice}] selects none of the {len(found)} documents; choose a slice within them")
    return "".join(f"{document}\n{DOCUMENT_SEPARATOR}\n" for document in chosen)


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file; `sample.txt[:256]` reads only those documents of it (see `select`).

    A file whose own name ends in brackets is taken as it stands. Raises DataError: missing, not UTF-8, empty.
    """
    file = Path(path)
    sliced = None if file.is_file() else _SLICED.fullmatch(str(path))
    if sliced is not None:
        file = Path(sliced["path"])
    if not file.is_file():
        raise DataError(f"{file}: no such text file; give the path of a UTF-8 text")
    try:
        text = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: byte {error.start} is not UTF-8; convert the file to UTF-8") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); give a file that can") from error
    if not text.replace(DOCUMENT_SEPARATOR, "").strip():
        raise DataError(f"{file}: the file holds no text; give one that does")
    if sliced is None:
        return text
    try:
        return select(text, sliced["slice"])
    except DataError as error:
        raise DataError(f"{file}: {error}") from error


def sequences(
    text: str,
    tokenizer: Tokenizer,
    *,
    context: int,
    samples: int | None = None,
    seed: int = 0,
    purpose: str = "this",
    settings: str = "",
    at_most: bool = False,
) -> Sequences:
    """Tokenize a text into sequences of at most `context` tokens.

    A text with separators: each document alone, cut at `context`, those under 2 tokens dropped; `samples`
    takes the first ones. Otherwise: the text whole, cut into consecutive windows of `context` tokens, the
    last partial one dropped unless it is the only one; of N windows `samples` takes n, the i-th drawn by
    `seed` from the i-th of n equal stretches, so that they are spread evenly and stand in order. Of a text
    of over 2 million characters, much longer than n windows, only these are tokenized: each from the
    first white space behind a character drawn by `seed` from its stretch.

    purpose: what the data are for ("calibration"), for messages; settings: what stands before the name of a
    setting there ("--set calibration."). at_most: fewer than `samples` will do. Raises UsageError: context < 2 or
    samples < 1; DataError: fewer sequences than samples, or none.
    """
    if context < 2:
        raise UsageError(f"context={context}: a sequence needs at least 2 tokens, one to predict from the other")
    if samples is not None and samples < 1:
        raise UsageError(f"samples={samples}: take at least 1, or leave it out to take all")
    wanted = _Wanted(context, samples, seed, purpose, settings, at_most)
    if DOCUMENT_SEPARATOR in text:
        return _from_documents(text, tokenizer, wanted)
    if samples is not None and len(text) > max(_LONG, 2 * samples * context * _CHARACTERS_A_TOKEN):
        return _from_places(text, tokenizer, wanted, samples)
    return _from_windows(text, tokenizer, wanted)


@dataclass(frozen=True)
class _Wanted:
    """What is asked of a text; see `sequences`."""

    context: int
    samples: int | None
    seed: int
    purpose: str
    settings: str
    at_most: bool

    def require(self, found: int, what: str) -> None:
        """Raises DataError: fewer found than are needed."""
        if found >= (1 if self.samples is None or self.at_most else self.samples):
            return
        if self.samples is None or self.at_most:
            raise DataError(f"{self.purpose} needs text, but no {what} were found; give more text")
        fewer = f"use {self.settings}samples={found}, a shorter context" if found else "use a shorter context"
        raise DataError(
            f"{self.purpose} asks for {self.samples} samples, but there are only {found} {what}; {fewer} or more text"
        )


def _from_documents(text: str, tokenizer: Tokenizer, wanted: _Wanted) -> Sequences:
    context = wanted.context
    ids: list[Tensor] = []
    nbytes: list[int] = []
    used: list[str] = []
    for document in documents(text):
        if len(ids) == wanted.samples:
            break
        ids_L, ends = _tokenize(document, tokenizer)
        if len(ids_L) < 2:
            continue
        ids.append(ids_L[:context].clone())
        nbytes.append(_predicted_bytes(document, ends[:context]))
        used.append(document)
    wanted.require(len(ids), "documents of 2 tokens or more")
    name = _sha256({"kind": "documents", "context": context}, DOCUMENT_SEPARATOR.join(used))
    return Sequences(tuple(ids), "documents", tuple(nbytes), name)


def _from_windows(text: str, tokenizer: Tokenizer, wanted: _Wanted) -> Sequences:
    context = wanted.context
    ids_T, ends = _tokenize(text, tokenizer)
    whole = len(ids_T) // context
    count = whole or int(len(ids_T) >= 2)
    wanted.require(count, f"windows of {context} tokens (the text has {len(ids_T)} tokens)")
    chosen = list(range(count))
    if wanted.samples is not None and wanted.samples < count:
        samples, draw = wanted.samples, random.Random(wanted.seed)
        chosen = [draw.randrange(i * count // samples, (i + 1) * count // samples) for i in range(samples)]
    cuts = [slice(window * context, (window + 1) * context) for window in chosen]
    ids = tuple(ids_T[cut].clone() for cut in cuts)
    nbytes = tuple(_predicted_bytes(text, ends[cut]) for cut in cuts)
    name = _sha256({"kind": "windows", "context": context, "windows": chosen}, text)
    return Sequences(ids, "windows", nbytes, name)


def _from_places(text: str, tokenizer: Tokenizer, wanted: _Wanted, samples: int) -> Sequences:
    context, draw = wanted.context, random.Random(wanted.seed)
    stretch = len(text) / samples
    ids: list[Tensor] = []
    nbytes: list[int] = []
    places: list[int] = []
    for i in range(samples):
        first = int(i * stretch) + draw.randrange(int(stretch / 2))
        space = _SPACE.search(text, first)
        begin = space.start() if space else first
        length = context * _CHARACTERS_A_TOKEN
        while True:
            piece = text[begin : begin + length]
            ids_T, ends = _tokenize(piece, tokenizer)
            if len(ids_T) >= context or begin + length >= len(text):
                break
            length *= 2
        if len(ids_T) >= context:
            ids.append(ids_T[:context].clone())
            nbytes.append(_predicted_bytes(piece, ends[:context]))
            places.append(begin)
    wanted.require(len(ids), f"stretches of the text with {context} tokens")
    name = _sha256({"kind": "windows", "context": context, "places": places}, text)
    return Sequences(tuple(ids), "windows", tuple(nbytes), name)


def _tokenize(text: str, tokenizer: Tokenizer) -> tuple[Tensor, list[int]]:
    """int64 ids, and for each token the character where it ends (never before the end of an earlier one)."""
    if not tokenizer.is_fast:
        raise DataError(
            "the tokenizer cannot say where its tokens stand in the text; use a fast tokenizer (a tokenizer.json)"
        )
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    ends: list[int] = []
    end = 0
    for _, last in encoded["offset_mapping"]:
        end = max(end, last)
        ends.append(end)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64), ends


def _predicted_bytes(text: str, ends: list[int]) -> int:
    return len(text[ends[0] : ends[-1]].encode())


def _sha256(facts: dict[str, object], text: str) -> str:
    header = json.dumps(facts, sort_keys=True).encode()
    return hashlib.sha256(header + b"\n" + text.encode()).hexdigest()


def micro_batches(sequences: Sequences, *, tokens: int, pad: bool, pad_id: int = 0) -> tuple[MicroBatch, ...]:
    """Group sequences, longest first (ties in order), so that rows * longest <= tokens: B * L <= tokens.

    A sequence longer than `tokens` runs alone. With `pad`, shorter rows are padded on the right with
    `pad_id`; without it only sequences of equal length go together. Each is in exactly one micro-batch.
    Raises UsageError: tokens < 1.
    """
    if tokens < 1:
        raise UsageError(f"a micro-batch of {tokens} tokens holds nothing; give at least 1")
    lengths = [len(ids_L) for ids_L in sequences.ids]
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups:
            longest = lengths[groups[-1][0]]
            fits = (len(groups[-1]) + 1) * longest <= tokens
            if fits and (pad or lengths[i] == longest):
                groups[-1].append(i)
                continue
        groups.append([i])
    return tuple(_micro_batch(sequences, tuple(group), pad_id) for group in groups)


def _micro_batch(sequences: Sequences, index: tuple[int, ...], pad_id: int) -> MicroBatch:
    rows = [sequences.ids[i] for i in index]
    ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    lengths_B = torch.tensor([len(row) for row in rows])
    keep_BL = torch.arange(ids_BL.shape[1]) < lengths_B[:, None]
    return MicroBatch(index, ids_BL, None if bool(keep_BL.all()) else keep_BL)
