"""Where the files of a model name tokens: by id in its configs and in tokenizer.json, by string beside it.

One walk serves to find the ids and to change them: `replaced_*` asks `replace(where, id)` for each, and puts there
what it answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tersely.vocabulary.pieces import ROLES

Replace = Callable[[str, int], int | None]
"""(where, id) -> the id to write there; None: none (null, and nothing in a list)."""

TOKENIZER = "tokenizer.json"
ADDED = "added_tokens.json"
VOCAB = "vocab.json"
CONFIGS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
NAMED = ("tokenizer_config.json", "special_tokens_map.json")
LISTS = ("additional_special_tokens", "extra_special_tokens")
"""Lists of special tokens in the files NAMED, from which one may go."""
TEMPLATES = ("chat_template.json", "processor_config.json", "tokenizer_config.json")
"""JSON files with a chat template under "chat_template"."""

_IDS = re.compile(
    r".*_token_ids?|.*_token_index|(bos|eos|pad|unk|mask)_index|(begin_)?suppress_tokens|bad_words_ids|force_words_ids"
    r"|lang_to_id|task_to_id"
)


def replaced_config(value: Any, replace: Replace, where: str) -> Any:
    """A config with other ids, in the same order: of `*_token_id`, `suppress_tokens`, `bad_words_ids` ... at any depth.

    Numbers below 0 mean no token and stay. Nothing but ids changes.
    """
    if isinstance(value, list):
        return [replaced_config(part, replace, where) for part in value]
    if not isinstance(value, dict):
        return value
    return {key: _replaced_key(key, part, replace, f"{where}: {key}") for key, part in value.items()}


def _replaced_key(key: str, value: Any, replace: Replace, where: str) -> Any:
    if _IDS.fullmatch(key):
        return _replaced_ids(value, replace, where)
    if key == "forced_decoder_ids" and isinstance(value, list):
        return [[place, _replaced_ids(i, replace, where)] for place, i in value]
    if key == "sequence_bias" and isinstance(value, list):
        return [[_replaced_ids(ids, replace, where), bias] for ids, bias in value]
    return replaced_config(value, replace, where)


def _replaced_ids(value: Any, replace: Replace, where: str) -> Any:
    if isinstance(value, list):
        parts = [_replaced_ids(part, replace, where) for part in value]
        return [part for old, part in zip(value, parts, strict=True) if part is not None or old is None]
    if isinstance(value, dict):
        return {key: _replaced_ids(part, replace, where) for key, part in value.items()}
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return replace(where, value)
    return value


def replaced_processor(step: Any, replace: Replace, where: str = "tokenizer.json: post_processor") -> Any:
    """A post_processor of tokenizer.json, nested ones too, with other ids."""
    if not step:
        return step
    match step["type"]:
        case "Sequence":
            return {**step, "processors": [replaced_processor(part, replace, where) for part in step["processors"]]}
        case "TemplateProcessing":
            own = step["special_tokens"]
            special = {name: {**held, "ids": [replace(where, i) for i in held["ids"]]} for name, held in own.items()}
            return {**step, "special_tokens": special}
        case "BertProcessing" | "RobertaProcessing":
            return {**step, **{key: [step[key][0], replace(where, step[key][1])] for key in ("sep", "cls")}}
    return step


def processor_tokens(step: Any) -> Iterator[tuple[str, int]]:
    """The tokens that a post_processor puts around a text, as it writes them, with their ids."""
    if not step:
        return
    match step["type"]:
        case "Sequence":
            for part in step["processors"]:
                yield from processor_tokens(part)
        case "TemplateProcessing":
            for held in step["special_tokens"].values():
                yield from zip(held["tokens"], held["ids"], strict=True)
        case "BertProcessing" | "RobertaProcessing":
            yield from ((step[key][0], step[key][1]) for key in ("sep", "cls"))


def named_tokens(plain: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, token) of what tokenizer_config.json or special_tokens_map.json calls bos_token, image_token ..."""
    for key, value in plain.items():
        if key.endswith("_token") and (token := content(value)):
            yield key, token
    named = plain.get("extra_special_tokens")
    if isinstance(named, dict):
        yield from ((key, token) for key, value in named.items() if (token := content(value)))


def listed_tokens(plain: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, token) of the lists of special tokens there."""
    for key in LISTS:
        if isinstance(plain.get(key), list):
            yield from ((key, token) for value in plain[key] if (token := content(value)))


def is_role(key: str) -> bool:
    """Whether transformers adds the token of this key to a tokenizer that lacks it."""
    return key.removesuffix("_token") in ROLES or key in LISTS


def content(value: Any) -> str | None:
    """A token that is written as a string, or as an object with a content."""
    held = value.get("content") if isinstance(value, dict) else value
    return held if isinstance(held, str) else None


def templates(name: str, plain: Mapping[str, Any]) -> Iterator[str]:
    """The chat templates in a JSON file: one, or several named ones."""
    held = plain.get("chat_template") if name in TEMPLATES else None
    if isinstance(held, str):
        yield held
    elif isinstance(held, list):
        yield from (part["template"] for part in held)
    elif isinstance(held, dict):
        yield from held.values()
