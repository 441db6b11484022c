"""Keep the tokens that are written with the letters of some languages; and in which language a text is.

Shapes: V rows of the embedding.
"""

from __future__ import annotations

import difflib
import re
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import ClassVar

import torch
from torch import Tensor

from tersely.errors import UsageError
from tersely.methods.trim.protocol import Tokens

_WORD = re.compile(r"[^\W\d_]+")
_FEW = 50
"""Words of a text below which its language is not asked for."""


@dataclass(frozen=True)
class Language:
    """What is known of a language."""

    code: str
    """ISO 639-1."""
    name: str
    ranges: tuple[tuple[int, int], ...]
    """First and last code points of the scripts it is written in."""
    letters: frozenset[str]
    """Letters beside those, small and large."""
    words: frozenset[str]
    """Its commonest short words; none where its script tells it from the others."""

    def writes(self, character: str) -> bool:
        """Whether a letter is one of its own."""
        point = ord(character)
        return character in self.letters or any(first <= point <= last for first, last in self.ranges)


@dataclass(frozen=True)
class Languages:
    """Tokens stay that are written with the letters of these languages; so do digits, signs and spaces, and parts of
    characters.

    No text is needed, and little goes where languages share a script: all plain words of Latin script stay for any
    language that is written in it. With a corpus, `frequency` chooses better.
    """

    name: ClassVar[str] = "languages"

    languages: str = "en"
    """ISO 639-1 codes with commas between them: en,de."""

    def __post_init__(self) -> None:
        languages_of(self.languages)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"data"})

    def __call__(self, tokens: Tokens) -> Tensor:
        """1 for each token that stays."""
        assert tokens.data is not None
        own = languages_of(self.languages)
        wanted = [int(data is not None and _written(data, own)) for data in tokens.data]
        return torch.tensor(wanted, dtype=torch.int64)


@cache
def known_languages() -> Mapping[str, Language]:
    """Code -> language."""
    table = tomllib.loads((resources.files("tersely.methods.trim") / "languages.toml").read_text("utf-8"))
    found = {}
    for code, own in table["languages"].items():
        bounds = [bound for script in own["scripts"] for bound in table["scripts"][script]]
        letters = own.get("letters", "")
        found[code] = Language(
            code,
            own["name"],
            tuple(zip(bounds[::2], bounds[1::2], strict=True)),
            frozenset(letters) | frozenset(letters.upper()),
            frozenset(own.get("words", "").split()),
        )
    return found


def languages_of(codes: str) -> tuple[Language, ...]:
    """The languages of `en,de`. UsageError: none, or an unknown one."""
    known = known_languages()
    found = []
    for code in (part.strip().lower() for part in codes.split(",")):
        if code not in known:
            named = {language.name.lower(): language.code for language in known.values()}
            near = named.get(code) or next(iter(difflib.get_close_matches(code, known, n=1)), "")
            hint = f"did you mean {near!r}? " if near else ""
            raise UsageError(f"languages: no language {code!r}; {hint}known are {', '.join(known)}")
        found.append(known[code])
    return tuple(found)


def foreign_share(text: str, languages: Sequence[Language]) -> float:
    """Share of the letters of a text that none of these languages has; 0 for a text without letters."""
    counts = Counter(text)
    letters = {c: n for c, n in counts.items() if _is_letter(c)}
    total = sum(letters.values())
    return sum(n for c, n in letters.items() if not any(own.writes(c) for own in languages)) / max(1, total)


def read_as(text: str) -> Language | None:
    """The language whose commonest words a text has most of, among those that are told by words; None: too few."""
    words = Counter(word.lower() for word in _WORD.findall(text))
    total = sum(words.values())
    shares = {
        code: sum(words[word] for word in language.words) / max(1, total)
        for code, language in known_languages().items()
        if language.words
    }
    best = max(shares, key=lambda code: shares[code])
    return known_languages()[best] if total >= _FEW and shares[best] > 0.08 else None


def _written(data: bytes, languages: Sequence[Language]) -> bool:
    """Whether all letters of a token are of these languages; bytes that are no whole character count for nothing."""
    text = unicodedata.normalize("NFC", data.decode("utf-8", "ignore"))
    return all(any(own.writes(c) for own in languages) for c in text if _is_letter(c))


def _is_letter(character: str) -> bool:
    return unicodedata.category(character)[0] in "LM" and unicodedata.category(character) != "Lm"
