"""The tokenizer of a checkpoint as facts: its tokens by the ids that they really have, and who names them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tersely.checkpoint import Checkpoint, refuse_foreign_link, stream
from tersely.checkpoint.files import json_object
from tersely.errors import CheckpointError, first_line
from tersely.vocabulary.agreement import check_declared, loaded_ids, named_ids, special_ids
from tersely.vocabulary.pieces import BYTE_TOKEN, BYTES, pair, steps
from tersely.vocabulary.references import ADDED, CONFIGS, NAMED, TEMPLATES, TOKENIZER, VOCAB

__all__ = ["TOKENIZER", "Kind", "Vocabulary", "forms", "read_tokenizer", "read_tokenizer_folder"]

_JSON = frozenset({TOKENIZER, ADDED, VOCAB, *CONFIGS, *NAMED, *TEMPLATES})
Kind = Literal["bpe", "unigram", "wordpiece"]
_KINDS: Mapping[str, Kind] = {"BPE": "bpe", "Unigram": "unigram", "WordPiece": "wordpiece"}
_PREFIXES: Mapping[Kind, str] = {"wordpiece": "##"}
"""Where tokenizer.json does not say."""
_PUT = ("content", "prepend", "replacement")
"""What steps of a normalizer or pre-tokenizer call the text that they put."""
_READ = re.compile(r".*\.(json|jinja|txt|model|tiktoken|spm|bpe|codes)|tokenizer\.model.*")
_TEXT_CONFIGS = ("text_config", "language_config", "llm_config", "decoder")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of a checkpoint, and all that its files say of them."""

    kind: Kind
    tokens: tuple[str | None, ...] = field(repr=False)
    """By id, one for each row of the embedding; None: a row that no token has."""
    ids: Mapping[str, int] = field(repr=False)
    """Of all tokens."""
    model_ids: Mapping[str, int] = field(repr=False)
    """Of those in the model's own vocabulary; the others are outside of it, added."""
    added_ids: frozenset[int] = field(repr=False)
    """Of added tokens and other special ones: found in a text before it is cut."""
    merges: tuple[tuple[str, str], ...] = field(repr=False)
    scores: tuple[float, ...] = field(repr=False)
    """Of a unigram model, by id."""
    prefix: str
    """Of tokens inside a word."""
    suffix: str
    """Of tokens that end a word."""
    byte_fallback: bool
    takes_whole_words: bool
    """A word that is a token is not merged (ignore_merges)."""
    unknown: int | None
    atoms: frozenset[int] = field(repr=False)
    """The tokens for single bytes, and for characters that the tokenizer itself puts into texts."""
    writes_all: bool
    """Every text can be written in atoms."""
    named: Mapping[int, tuple[str, ...]] = field(repr=False)
    """Ids that files name, with the places where they do; lists of special tokens do not count."""
    config: Mapping[str, Any] = field(repr=False)
    """config.json."""
    plain: Mapping[str, Any] = field(repr=False)
    """The JSON files that may name tokens, by name; config.json aside."""
    files: Mapping[str, bytes] = field(repr=False)
    """The files beside the weights that may hold tokens or ids, by name."""
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of the embedding."""
        return len(self.tokens)

    def forms(self, characters: Iterable[str]) -> set[int]:
        """The tokens that are one of these characters: alone, inside a word, or at its end."""
        return forms(characters, self.model_ids, self.prefix, self.suffix)


def forms(characters: Iterable[str], model_ids: Mapping[str, int], prefix: str, suffix: str) -> set[int]:
    """See Vocabulary.forms."""
    marks = {(before, behind) for before in ("", prefix) for behind in ("", suffix)}
    found = (model_ids.get(before + one + behind) for one in characters for before, behind in marks)
    return {i for i in found if i is not None}


def read_tokenizer(checkpoint: Checkpoint) -> Vocabulary:
    """The tokenizer of a checkpoint whose embedding has as many rows as its config says (vocab_size).

    CheckpointError: no tokenizer.json, one of another kind than BPE, unigram and WordPiece, ids on which files
    disagree, an id that two tokens have, or one that the embedding has no row for.
    """
    return _read(checkpoint.path, ("config.json", *checkpoint.companions))


def read_tokenizer_folder(folder: Path) -> Vocabulary:
    """The tokenizer of a folder that need not hold a model: without config.json it has a row for each id.

    CheckpointError: as `read_tokenizer`, or no such folder.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no folder {folder}; give the folder of a tokenizer")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file() and _READ.fullmatch(entry.name))
    for name in names:
        refuse_foreign_link(folder, folder / name)
    return _read(folder, names)


def _read(folder: Path, names: Sequence[str]) -> Vocabulary:
    files = {name: b"".join(map(bytes, stream(folder / name))) for name in names if _READ.fullmatch(name)}
    if TOKENIZER not in files:
        raise CheckpointError(
            f'{folder} has no {TOKENIZER}; where its tokenizer can be loaded, write one: python -c "from transformers '
            f"import AutoTokenizer as T; T.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    plain = {name: json_object(files[name], folder / name) for name in files if name in _JSON}
    try:
        return _understood(plain.pop("config.json", None), plain, files)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the tokenizer's files in {folder} are not of the form that transformers writes ({first_line(error)}); "
            "load the tokenizer with transformers and save it"
        ) from error


def _understood(config: dict[str, Any] | None, plain: Mapping[str, Any], files: Mapping[str, bytes]) -> Vocabulary:
    own = plain[TOKENIZER]
    model = own.get("model") or {}
    kind = _KINDS.get(str(model.get("type")))
    if kind is None:
        raise CheckpointError(
            f"{TOKENIZER} holds a model of type {model.get('type')!r}; its vocabulary can be changed where that is "
            f"{', '.join(_KINDS)}: load and save the tokenizer with a newer transformers if the type is missing"
        )
    rows = None if config is None else _rows(config)
    ids = loaded_ids(files[TOKENIZER], rows)
    check_declared(plain, ids)
    tokens: list[str | None] = [None] * (max(ids.values(), default=-1) + 1 if rows is None else rows)
    for token, i in ids.items():
        tokens[i] = token
    named, notes = named_ids(plain, files, config or {}, ids, tokens)
    unigram = kind == "unigram"
    model_ids = _model_ids(model["vocab"])
    prefix = "" if unigram else model.get("continuing_subword_prefix", _PREFIXES.get(kind)) or ""
    suffix = model.get("end_of_word_suffix") or "" if kind == "bpe" else ""
    byte_fallback = bool(model.get("byte_fallback"))
    cutting = [step for key in ("normalizer", "pre_tokenizer") for step in steps(own, key)]
    single = {i for token, i in model_ids.items() if byte_fallback and BYTE_TOKEN.fullmatch(token)}
    if any(step["type"] == "ByteLevel" for step in cutting):
        single |= forms(BYTES, model_ids, prefix, suffix)
    # Spaces are put as another character, which read from its bytes would not become a space again.
    put = "".join(step[key] for step in cutting for key in _PUT if isinstance(step.get(key), str))
    return Vocabulary(
        kind=kind,
        tokens=tuple(tokens),
        ids=ids,
        model_ids=model_ids,
        added_ids=special_ids(plain, ids),
        merges=tuple(pair(merge) for merge in model.get("merges", ())),
        scores=tuple(score for _, score in model["vocab"]) if unigram else (),
        prefix=prefix,
        suffix=suffix,
        byte_fallback=byte_fallback,
        takes_whole_words=bool(model.get("ignore_merges")),
        unknown=model.get("unk_id") if unigram else ids.get(model.get("unk_token") or ""),
        atoms=frozenset(single | forms(put, model_ids, prefix, suffix)),
        writes_all=len(single) >= 256,
        named=named,
        config=config or {},
        plain=plain,
        files=files,
        notes=notes,
    )


def _model_ids(vocab: Any) -> dict[str, int]:
    if isinstance(vocab, dict):
        return vocab
    found = {piece: i for i, (piece, _) in enumerate(vocab)}
    if len(found) < len(vocab):
        twice = next(piece for i, (piece, _) in enumerate(vocab) if found[piece] != i)
        raise CheckpointError(f"{TOKENIZER} has the piece {twice!r} twice; which of the two rows it means is open")
    return found


def _rows(config: Mapping[str, Any]) -> int:
    for held in (config, *(config.get(name) for name in _TEXT_CONFIGS)):
        if isinstance(held, dict) and isinstance(held.get("vocab_size"), int):
            return int(held["vocab_size"])
    raise CheckpointError("config.json has no vocab_size; add it: the rows of the embedding")
