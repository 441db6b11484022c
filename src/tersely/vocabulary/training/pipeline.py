"""What a tokenizer does to a text before and after its model: normalize, cut into words, put together again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from tersely.errors import CheckpointError, UsageError
from tersely.vocabulary.pieces import SIGNS, SPACE, steps

Plain = Mapping[str, Any]
Atoms = Literal["bytes", "fallback", "characters"]
"""What any text can be written in: a sign for each byte; characters, and <0x41> for those that have no token;
characters, and <unk> for the others."""

ALPHABET = tuple(sorted(SIGNS.values()))
FALLBACK = tuple(f"<0x{byte:02X}>" for byte in range(256))
UNKNOWN = "<unk>"
PATTERNS = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt-4": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "gpt-4o": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen-2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
"""How a text falls into words, over bytes. gpt-4 is Llama 3's too."""
_SPACED = r" ?[\p{L}\p{M}]+| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s"
METASPACE = "metaspace"
"""The name of the one over characters: spaces as ▁ at the front of words, bytes for characters without a token."""


@dataclass(frozen=True)
class Pipeline:
    """The parts of tokenizer.json around the model, as it writes them; None for one that is not there."""

    atoms: Atoms
    normalizer: Plain | None
    pre_tokenizer: Plain | None
    decoder: Plain | None


def pipeline(name: str | Path) -> Pipeline:
    """That of a known model, by the names of PATTERNS or METASPACE, or that of a tokenizer.json.

    Raises UsageError: neither, or one whose tokens are marked inside or at the ends of words, which no method here
    does; CheckpointError: not a tokenizer.json.
    """
    if name in PATTERNS:
        return byte_level(PATTERNS[str(name)])
    if name == METASPACE:
        return Pipeline("fallback", None, _sequence(_split(_SPACED), _metaspace()), _after_metaspace())
    file = Path(name)
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        known = ", ".join((*PATTERNS, METASPACE))
        raise UsageError(f"{name}: no pre-tokenizer of that name, and no such file; give one of {known}, or a file")
    try:
        plain = json.loads(Tokenizer.from_file(str(file)).to_str())
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(f"{file}: not a tokenizer.json ({error}); give one that tokenizers reads") from error
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if mark := plain["model"].get(key):
            known = ", ".join((*PATTERNS, METASPACE))
            raise UsageError(f"{file}: {mark!r} marks its tokens, and no method here marks any; give one of {known}")
    return _read(plain)


def byte_level(pattern: str) -> Pipeline:
    """Words by a regular expression, written in signs for bytes."""
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return Pipeline("bytes", None, _sequence(_split(pattern), bytes_), {**bytes_, "use_regex": True})


def assemble(model: Plain, around: Pipeline, special: Sequence[str] = ()) -> Tokenizer:
    """A tokenizer of a model (as tokenizer.json writes it), whose first ids are the special tokens."""
    plain = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(number, token) for number, token in enumerate(special)],
        "normalizer": around.normalizer,
        "pre_tokenizer": around.pre_tokenizer,
        "post_processor": None,
        "decoder": around.decoder,
        "model": dict(model),
    }
    return Tokenizer.from_str(json.dumps(plain, ensure_ascii=False))


def _read(plain: Plain) -> Pipeline:
    atoms: Atoms = "characters"
    if any(step["type"] == "ByteLevel" for step in steps(plain, "pre_tokenizer")):
        atoms = "bytes"
    elif plain["model"].get("byte_fallback"):
        atoms = "fallback"
    before = plain["pre_tokenizer"]
    writes_spaces = any(SPACE in (step.get("content"), step.get("prepend")) for step in steps(plain, "normalizer"))
    if before is None and writes_spaces:
        # Llama 2's form leaves the text whole: its own trainer cut it into words, which the file does not say.
        before = {"type": "Split", "pattern": {"String": SPACE}, "behavior": "MergedWithNext", "invert": False}
    return Pipeline(atoms, plain["normalizer"], before, plain["decoder"])


def _added(number: int, token: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": token, **flags}


def _sequence(*steps: Plain) -> Plain:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _split(pattern: str) -> Plain:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _metaspace() -> Plain:
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": False}


def _after_metaspace() -> Plain:
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]}
