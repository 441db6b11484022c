"""Whether all files of a tokenizer give a token the same id, and which tokens they name.

What they give differently goes unnoticed where tokenizers are loaded, and ruins a model whose rows are cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from tersely.errors import CheckpointError, first_line
from tersely.vocabulary.references import (
    ADDED,
    CONFIGS,
    NAMED,
    TOKENIZER,
    VOCAB,
    content,
    is_role,
    listed_tokens,
    named_tokens,
    processor_tokens,
    replaced_config,
    templates,
)


def loaded_ids(text: bytes, rows: int | None) -> dict[str, int]:
    """Token -> id as the loader of tokenizer.json gives them, by rising ids.

    CheckpointError: one that two tokens have, or that the embedding has no row for.
    """
    try:
        loaded = Tokenizer.from_str(text.decode())
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(f"{TOKENIZER} cannot be loaded: {first_line(error)}; download it again") from error
    ids: dict[str, int] = dict(sorted(loaded.get_vocab(with_added_tokens=True).items(), key=lambda item: item[::-1]))
    of: dict[int, str] = {}
    for token, i in ids.items():
        if i in of:
            raise CheckpointError(
                f"{TOKENIZER} loads with the id {i} for two tokens, {of[i]!r} and {token!r}: its vocabulary has holes; "
                "give every token of model.vocab an id without leaving one out, and added tokens the ids behind them"
            )
        of[i] = token
        if rows is not None and i >= rows:
            raise CheckpointError(
                f"{TOKENIZER} gives {token!r} the id {i}, but the embedding has only {rows} rows; add rows to the "
                "model, or take the token out"
            )
    return ids


def check_declared(plain: Mapping[str, Mapping[str, Any]], ids: Mapping[str, int]) -> None:
    """CheckpointError: a file gives a token another id than it has."""
    for token, i, where in _declared(plain):
        _check(token, i, ids, where)


def _declared(plain: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, int, str]]:
    """(token, id, place) of all that give a token an id of its own."""
    own = plain[TOKENIZER]
    for added in own.get("added_tokens") or ():
        yield added["content"], added["id"], f"{TOKENIZER}: added_tokens"
    for token, i in processor_tokens(own.get("post_processor")):
        yield token, i, f"{TOKENIZER}: post_processor"
    if padding := own.get("padding"):
        yield padding["pad_token"], padding["pad_id"], f"{TOKENIZER}: padding"
    for i, added in (plain.get("tokenizer_config.json", {}).get("added_tokens_decoder") or {}).items():
        yield content(added) or "", int(i), "tokenizer_config.json: added_tokens_decoder"
    for token, i in plain.get(ADDED, {}).items():
        yield token, i, ADDED


def _check(token: str, i: int, ids: Mapping[str, int], where: str) -> None:
    if token not in ids:
        raise CheckpointError(
            f"{where} has {token!r} as {i}, but no token of {TOKENIZER} is that; load the tokenizer with transformers "
            "and save it, or take the entry out"
        )
    if ids[token] != i:
        raise CheckpointError(
            f"{where} has {token!r} as {i}, but {TOKENIZER} loads with {token!r} as {ids[token]}; "
            "correct the one that the model was not trained with"
        )


def special_ids(plain: Mapping[str, Mapping[str, Any]], ids: Mapping[str, int]) -> frozenset[int]:
    """Added tokens, and those that a file names or lists as special. CheckpointError: one that does not exist."""
    found = {ids[added["content"]] for added in plain[TOKENIZER].get("added_tokens") or ()}
    found |= {ids[token] for token in plain.get(ADDED, {})}
    for name in NAMED:
        own = plain.get(name, {})
        for key, token in (*named_tokens(own), *listed_tokens(own)):
            if token in ids:
                found.add(ids[token])
            elif is_role(key):
                raise CheckpointError(
                    f"{name}: {key} is {token!r}, which {TOKENIZER} lacks, so that loaders would give it an id behind "
                    "all others; add it with its own id, or take the entry out"
                )
    return frozenset(found)


def named_ids(
    plain: Mapping[str, Mapping[str, Any]],
    files: Mapping[str, bytes],
    config: Mapping[str, Any],
    ids: Mapping[str, int],
    tokens: Sequence[str | None],
) -> tuple[dict[int, tuple[str, ...]], tuple[str, ...]]:
    """Ids with the places that name them, and a note for each that lies beyond all rows.

    CheckpointError: an id that no token has.
    """
    found: dict[int, list[str]] = {}
    notes: list[str] = []

    def add(where: str, i: int) -> int:
        if i >= len(tokens):
            notes.append(f"{where} was {i}, but the embedding has only {len(tokens)} rows: it named no token")
        elif tokens[i] is None:
            raise CheckpointError(f"{where} is {i}, which is the id of no token; name one that the tokenizer has")
        else:
            found.setdefault(i, []).append(where)
        return i

    own = plain[TOKENIZER]
    for name, held in {"config.json": config, **plain}.items():
        if name in CONFIGS:
            replaced_config(held, add, name)
        for key, token in named_tokens(held) if name not in (TOKENIZER, ADDED, VOCAB) else ():
            if token in ids:
                add(f"{name}: {key}", ids[token])
    for token, i in processor_tokens(own.get("post_processor")):
        add(f"{TOKENIZER}: post_processor ({token})", i)
    if padding := own.get("padding"):
        add(f"{TOKENIZER}: padding", padding["pad_id"])
    model = own["model"]
    if (unknown := model.get("unk_id", ids.get(model.get("unk_token") or ""))) is not None:
        add(f"{TOKENIZER}: the model", unknown)
    texts = [(name, text) for name, held in plain.items() for text in templates(name, held)]
    texts += [(name, held.decode(errors="replace")) for name, held in files.items() if name.endswith(".jinja")]
    for added in own.get("added_tokens") or ():
        for name, text in texts:
            if added["content"] in text:
                add(f"{name}: the chat template", ids[added["content"]])
    return {i: tuple(places) for i, places in found.items()}, tuple(notes)
