"""A tokenizer with fewer tokens, in all the files that say something of it.

Tokens keep their order and their merges, scores and settings; ids close up. Shapes: K rows that stay.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tersely.errors import CheckpointError, UsageError, first_line
from tersely.vocabulary.companions import Removed, Renumbering, in_the_form_of, rewritten
from tersely.vocabulary.pieces import pair
from tersely.vocabulary.references import TOKENIZER, replaced_config, replaced_processor
from tersely.vocabulary.tokenizer import Vocabulary

_SIZE = re.compile(r"(?!type_).*vocab_size.*")
MAP = "vocabulary-map.json"
"""Which row of the old embedding each new one was: {"rows_before": V, "old_ids": [of row 0, of row 1 ...]}."""


@dataclass(frozen=True, eq=False)
class Trimmed:
    """What a checkpoint has instead once its rows are cut. Files that are neither here nor removed stay as they are."""

    kept_old_ids_K: Tensor
    """int64, ascending: new row i is the old row kept_old_ids_K[i]."""
    tokenizer: Mapping[str, Any]
    """tokenizer.json."""
    config: Mapping[str, Any]
    """config.json."""
    files: Mapping[str, bytes]
    """The other files whose bytes change, by name, tokenizer.json and the map of the ids among them."""
    removed: Mapping[str, str]
    """Files that go, with the reason."""
    notes: tuple[str, ...]

    @property
    def rows(self) -> int:
        """Of the new embedding: one for each token."""
        return len(self.kept_old_ids_K)


def trimmed(vocabulary: Vocabulary, kept_old_ids_K: Tensor) -> Trimmed:
    """The tokenizer and its companions with these tokens only: `choose(...).kept_old_ids_K`, or any closed set.

    With all tokens, every file stays as it is. A text whose tokens all stay is cut into the same tokens as before,
    but for words that WordPiece had no pieces for, which may now find some.

    UsageError: ids that are not ascending or of no token, or a token that a file names is not among them;
    CheckpointError: a tokenizer.json that loads otherwise than it is written.
    """
    kept: list[int] = kept_old_ids_K.tolist()
    if kept != sorted(set(kept)) or not kept:
        raise UsageError("the ids that stay must be given in rising order, each once, and there must be some")
    if strange := [i for i in kept if not 0 <= i < vocabulary.rows or vocabulary.tokens[i] is None]:
        raise UsageError(f"{strange[0]} is to stay, but no token has that id; choose among the tokens")
    new = {old: i for i, old in enumerate(kept)}
    numbers = Renumbering(vocabulary, new, frozenset(str(vocabulary.tokens[i]) for i in kept))
    config = resized(replaced_config(vocabulary.config, numbers.replace, "config.json"), vocabulary.rows, len(kept))
    tokenizer = _tokenizer(numbers)
    notes = [*vocabulary.notes, *_other_sizes(config, len(kept))]
    files, removed = {}, {}
    for name in vocabulary.files.keys() - {"config.json", TOKENIZER}:
        try:
            files[name] = rewritten(name, numbers)
        except Removed as reason:
            removed[name] = str(reason)
    if kept == list(range(len(vocabulary.ids))):
        removed = {}
    else:
        files[TOKENIZER] = in_the_form_of(vocabulary.files[TOKENIZER], vocabulary.plain[TOKENIZER], tokenizer)
        _check_loaded(files[TOKENIZER], numbers)
        files[MAP] = json.dumps({"rows_before": vocabulary.rows, "old_ids": kept}).encode()
    changed = {name: data for name, data in sorted(files.items()) if data != vocabulary.files.get(name)}
    return Trimmed(kept_old_ids_K.to(torch.int64), tokenizer, config, changed, removed, tuple(notes))


def _tokenizer(numbers: Renumbering) -> dict[str, Any]:
    old = numbers.vocabulary.plain[TOKENIZER]
    changed = {**old, "model": _model(old["model"], numbers)}
    if added := old.get("added_tokens"):
        ids = numbers.vocabulary.ids
        own = [(ids[token["content"]], token) for token in added]
        changed["added_tokens"] = [{**token, "id": numbers.new[i]} for i, token in own if i in numbers.new]
    if old.get("post_processor"):
        changed["post_processor"] = replaced_processor(old["post_processor"], numbers.replace)
    if padding := old.get("padding"):
        changed["padding"] = {**padding, "pad_id": numbers.replace(f"{TOKENIZER}: padding", padding["pad_id"])}
    return changed


def _model(old: Mapping[str, Any], numbers: Renumbering) -> dict[str, Any]:
    vocabulary, new = numbers.vocabulary, numbers.new
    if vocabulary.kind == "unigram":
        unknown = old.get("unk_id")
        number = None if unknown is None else numbers.replace(f"{TOKENIZER}: unk_id", unknown)
        pieces = [piece for i, piece in enumerate(old["vocab"]) if i in new]
        return {**old, "vocab": pieces} | ({"unk_id": number} if "unk_id" in old else {})
    vocab = {token: new[i] for token, i in old["vocab"].items() if i in new}
    inside = max(vocab.values(), default=-1)
    # The loader numbers tokens outside the vocabulary behind it: one that stood within goes into it.
    within = {token: new[i] for token, i in vocabulary.ids.items() if i in new and new[i] < inside}
    changed = {**old, "vocab": vocab if within.keys() <= vocab.keys() else {**vocab, **within}}
    if old.get("merges"):
        changed["merges"] = [merge for merge in old["merges"] if numbers.merge_stays(*pair(merge))]
    return changed


def resized(config: Any, before: int, rows: int) -> Any:
    """A config in which every size that is that of the vocabulary is the new one."""
    if isinstance(config, list):
        return [resized(part, before, rows) for part in config]
    if not isinstance(config, dict):
        return config
    return {
        key: rows if _SIZE.fullmatch(key) and value == before else resized(value, before, rows)
        for key, value in config.items()
    }


def _other_sizes(config: Any, rows: int, where: str = "config.json") -> list[str]:
    if isinstance(config, list):
        return [note for part in config for note in _other_sizes(part, rows, where)]
    if not isinstance(config, dict):
        return []
    found = [
        f"{where}: {key} is {value}, which was not the number of rows, and stays"
        for key, value in config.items()
        if _SIZE.fullmatch(key) and isinstance(value, int) and value != rows
    ]
    return found + [note for key, value in config.items() for note in _other_sizes(value, rows, f"{where}: {key}")]


def _check_loaded(text: bytes, numbers: Renumbering) -> None:
    try:
        loaded = Tokenizer.from_str(text.decode()).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(
            f"{TOKENIZER} cannot be loaded without the tokens that go: {first_line(error)}; keep more of them"
        ) from error
    wanted = {str(numbers.vocabulary.tokens[old]): i for old, i in numbers.new.items()}
    if loaded != wanted:
        token = next(token for token in {**wanted, **loaded} if loaded.get(token) != wanted.get(token))
        raise CheckpointError(
            f"{TOKENIZER} without the tokens that go loads with {token!r} as {loaded.get(token)} instead of "
            f"{wanted.get(token)}; keep the added tokens, or load and save the tokenizer with transformers first"
        )
