"""A Hugging Face tokenizer in GGUF's terms: tokens, scores, merges, types, special ids, and what cuts words.

llama.cpp implements tokenizers itself and knows them by name, so what tokenizer.json says is matched, step by step,
with tokenizers.toml; one that has no match is an error, since a text that is cut differently ruins a model without a
word.
"""

from __future__ import annotations

import base64
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from gguf import TokenType

from tersely.errors import CheckpointError
from tersely.runtime import load_tokenizer

_SPACE = "\u2581"
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_FILES = ("tokenizer.json", "tokenizer_config.json")
_SPACES_BEFORE = (
    "llama.cpp puts a space before every text and after every special token, the tokenizer only before a text that "
    "begins without one"
)
_IDS = ("bos", "eos", "unk", "pad", "sep", "mask")


@dataclass(frozen=True)
class Tokens:
    """What a GGUF file says of a tokenizer."""

    model: str
    pre: str
    texts: tuple[str, ...]
    """One for each row of the embedding."""
    types: tuple[TokenType, ...]
    special: Mapping[str, int]
    """Ids by what they are: bos, eos, unk, pad, sep, mask."""
    templates: Mapping[str, str]
    """Chat templates; the usual one is "default"."""
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    charsmap: bytes = b""
    """The normalizer of a unigram tokenizer, compiled."""
    add_bos: bool = False
    add_eos: bool = False
    add_space: bool = False
    """A space goes before the text."""
    strips: bool = False
    """White space after special tokens is cut off."""
    notes: tuple[str, ...] = ()
    """What llama.cpp does otherwise."""


def read_tokens(folder: Path, config: Mapping[str, Any], rows: int) -> Tokens | None:
    """The tokenizer of a checkpoint folder for an embedding of so many rows; None where there is none.

    Special ids that the tokenizer does not name are those of the model's config.

    CheckpointError: it cannot be read, has more tokens than rows, or is one that llama.cpp does not implement.
    """
    if not any((folder / name).is_file() for name in _FILES):
        return None
    tokenizer: Any = load_tokenizer(folder)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise CheckpointError(f"{folder}: only tokenizers with a tokenizer.json can go to GGUF; save it as one")
    plain = json.loads(tokenizer.backend_tokenizer.to_str())
    model = plain["model"]
    added = {token["id"]: token for token in plain["added_tokens"]}
    words = {i: text for text, i in tokenizer.get_vocab().items()} | {i: t["content"] for i, t in added.items()}
    if max(words) >= rows:
        raise CheckpointError(f"{folder}: the tokenizer has the id {max(words)}, but the embedding only {rows} rows")
    steps = _steps(plain["pre_tokenizer"], "pretokenizers")
    normalizers = _steps(plain["normalizer"], "normalizers")
    where = f"{folder}: llama.cpp has no tokenizer like this one: "
    if model["type"] == "BPE" and any(step["type"] == "ByteLevel" for step in steps):
        kind = _byte_level(model, steps, normalizers, where)
    elif model["type"] == "BPE" and model.get("byte_fallback"):
        kind = _with_spaces(model, steps, normalizers, words, rows, where)
    elif model["type"] == "Unigram":
        kind = _unigram(model, steps, normalizers, rows, where)
    else:
        raise CheckpointError(
            where + f"its model is {model['type']}; BPE over bytes, SentencePiece and unigram are known"
        )
    texts, types = _typed(words, added, model, rows, spaces=kind.model == _table()["spaces"])
    special = {name: i for name in _IDS if (i := _special_id(tokenizer, config, name)) is not None}
    before, after = _around(tokenizer, special, where)
    templates = tokenizer.chat_template or {}
    notes = list(kind.notes)
    if any(token["lstrip"] or token["single_word"] for token in added.values()):
        notes.append("special tokens that take white space before them, or only stand alone, do not so in llama.cpp")
    if "eos" not in special:
        notes.append("the tokenizer names no end token, so llama.cpp takes one of its own choice")
    return Tokens(
        model=kind.model,
        pre=kind.pre,
        texts=texts,
        types=types,
        scores=kind.scores,
        merges=kind.merges,
        charsmap=kind.charsmap,
        special=special,
        add_bos=before,
        add_eos=after,
        add_space=kind.add_space,
        templates={"default": templates} if isinstance(templates, str) else templates,
        strips=any(token["rstrip"] for token in added.values()),
        notes=tuple(notes),
    )


def absent() -> str:
    """llama.cpp's name for no tokenizer."""
    return str(_table()["absent"])


def named_stripping(name: str) -> bool:
    """Whether llama.cpp cuts off white space after the special tokens of a model of this name."""
    return any(word in name.lower() for word in _table()["stripping"])


@dataclass(frozen=True)
class _Kind:
    model: str
    pre: str
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    charsmap: bytes = b""
    add_space: bool = False
    notes: tuple[str, ...] = ()


def _byte_level(model: Any, steps: Sequence[Any], normalizers: Sequence[Any], where: str) -> _Kind:
    notes = []
    for normalizer in normalizers:
        if normalizer["type"] != "NFC":
            raise CheckpointError(where + f"it normalizes by {normalizer['type']}")
        notes.append("llama.cpp does not bring texts into Unicode's normal form C, as the tokenizer does")
    if any(step.get("add_prefix_space") for step in steps):
        raise CheckpointError(where + "it puts a space before the text (add_prefix_space)")
    if any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout")):
        raise CheckpointError(where + "its BPE marks continued words, or drops merges")
    found, whole = [described for step in steps if (described := _describe(step))], bool(model.get("ignore_merges"))
    for known in _table()["pre"]:
        if known["steps"] == found and known.get("whole", False) == whole:
            merges = tuple(" ".join(_pair(merge)) for merge in model["merges"])
            notes += [known["note"]] if "note" in known else []
            return _Kind(_table()["byte_level"], known["name"], merges=merges, notes=tuple(notes))
    raise CheckpointError(
        where + f"its pre-tokenizer is {json.dumps(found, ensure_ascii=False)}"
        f"{' with ignore_merges' if whole else ''}; known are {', '.join(sorted({k['name'] for k in _table()['pre']}))}"
    )


def _with_spaces(
    model: Any, steps: Sequence[Any], normalizers: Sequence[Any], words: Mapping[int, str], rows: int, where: str
) -> _Kind:
    """SentencePiece's BPE: the merge whose token has the highest score comes first."""
    ids = {text: i for i, text in words.items()}
    if missing := [name for name in _BYTES if name not in ids]:
        raise CheckpointError(where + f"it has no token for {len(missing)} of the 256 bytes")
    scores = [0.0] * rows
    order: list[str] = []
    for rank, merge in enumerate(model["merges"]):
        made = "".join(_pair(merge))
        if not order or order[-1] != made:
            order.append(made)
            scores[ids[made]] = -float(rank + 1)
    notes = [_SPACES_BEFORE] if _prepends(steps) else []
    # SentencePiece's runs of spaces come last and in no order; llama.cpp cuts them alike all the same.
    words_made = [made for made in order if made.strip(_SPACE)]
    if len(set(words_made)) < len(words_made):
        notes.append("its merges are not in the order of their tokens, so llama.cpp may cut some words differently")
    add_space = any(n["type"] == "Prepend" for n in normalizers) or _prepends(steps)
    spaced = [n for n in normalizers if n["type"] == "Replace" and n["pattern"] == {"String": " "}]
    strange = [n["type"] for n in normalizers if n["type"] != "Prepend" and n not in spaced]
    strange += [s["type"] for s in steps if s["type"] == "Metaspace" and s["split"]]
    # Gemma's splits at spaces, of which the normalizer has left none.
    useless = [s for s in steps if spaced and s.get("pattern") == {"String": " "}]
    strange += [s["type"] for s in steps if s["type"] != "Metaspace" and s not in useless]
    if strange:
        raise CheckpointError(where + f"its steps are {', '.join(strange)}")
    return _Kind(_table()["spaces"], "default", tuple(scores), add_space=add_space, notes=tuple(notes))


def _unigram(model: Any, steps: Sequence[Any], normalizers: Sequence[Any], rows: int, where: str) -> _Kind:
    strange = [n["type"] for n in normalizers if n["type"] != "Precompiled"]
    strange += [s["type"] for s in steps if s["type"] != "Metaspace"]
    if strange or model.get("byte_fallback"):
        raise CheckpointError(where + f"it is a unigram model with {', '.join(strange) or 'byte_fallback'}")
    scores = [score for _, score in model["vocab"]]
    return _Kind(
        _table()["unigram"],
        "default",
        (*scores, *[0.0] * (rows - len(scores))),
        charsmap=b"".join(base64.b64decode(n["precompiled_charsmap"]) for n in normalizers),
        add_space=_prepends(steps),
        notes=(_SPACES_BEFORE,) if _prepends(steps) else (),
    )


def _typed(
    words: Mapping[int, str], added: Mapping[int, Any], model: Any, rows: int, *, spaces: bool
) -> tuple[tuple[str, ...], tuple[TokenType, ...]]:
    """Text and type of every row; rows without a token get a name that no other has."""
    unknown = model.get("unk_id", model.get("unk_token"))
    texts, types = [], []
    for i in range(rows):
        text = words.get(i)
        if text is None:
            texts.append(f"[PAD{i}]")
            types.append(TokenType.UNUSED)
            continue
        if unknown in (i, text):
            types.append(TokenType.UNKNOWN)
        elif i in added and added[i]["special"]:
            types.append(TokenType.CONTROL)
        elif i in added:
            # These are sought in the text before its spaces are replaced.
            text = text.replace(_SPACE, " ")
            types.append(TokenType.USER_DEFINED)
        elif spaces and text in _BYTES:
            types.append(TokenType.BYTE)
        else:
            types.append(TokenType.NORMAL)
        texts.append(text)
    if len(set(texts)) < rows:
        twice = next(text for i, text in enumerate(texts) if text in texts[:i])
        raise CheckpointError(f"two tokens have the text {twice!r}; llama.cpp needs a text of its own for each")
    return tuple(texts), tuple(types)


def _special_id(tokenizer: Any, config: Mapping[str, Any], name: str) -> int | None:
    found = getattr(tokenizer, f"{name}_token_id", None)
    if found is None:
        found = config.get(f"{name}_token_id")
    return found[0] if isinstance(found, list) else found


def _around(tokenizer: Any, ids: Mapping[str, int], where: str) -> tuple[bool, bool]:
    """Whether a text is put between the start token and the end token."""
    inner, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    bos, eos = ids.get("bos"), ids.get("eos")
    for before in (False, True):
        for after in (False, True):
            if whole == [bos] * before + inner + [eos] * after:
                return before, after
    raise CheckpointError(where + f"it puts other tokens around a text than its start and end token ({whole})")


def _steps(plain: Any, inside: str) -> list[Any]:
    """A pre-tokenizer or normalizer as a flat list."""
    if plain is None:
        return []
    if plain["type"] == "Sequence":
        return [step for part in plain[inside] for step in _steps(part, inside)]
    return [plain]


def _describe(step: Any) -> str:
    """A step as tokenizers.toml writes it; "" for one that cuts nothing."""
    match step:
        case {"type": "ByteLevel", "use_regex": False}:
            return ""
        case {"type": "Digits", "individual_digits": True} | {"type": "ByteLevel"}:
            return str(step["type"])
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return str(regex)
    return json.dumps(step, ensure_ascii=False)


def _prepends(steps: Sequence[Any]) -> bool:
    return any(step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in steps)


def _pair(merge: Any) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads((resources.files("tersely") / "export" / "gguf" / "tokenizers.toml").read_text("utf-8"))
