"""New tokens for a tokenizer, learnt from texts, behind those that it has: no id changes.

The tokenizer goes on from where its training ended: texts are cut into its own tokens, and the two neighbours that
stand together most often become one token, again and again. Of a BPE the new merges come after all old ones, so that a
text is first cut as before and only then joined further; what has none of the new pairs stays as it was. (Yamaguchi et
al., 2024, arXiv 2406.11477, put the merges of a second tokenizer first, which cuts old texts otherwise too.) Of a
Unigram a new piece scores a little more than its parts together, to the same end.
"""

from __future__ import annotations

import copy
import heapq
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer

from tersely.errors import CheckpointError, DataError, UsageError, first_line
from tersely.vocabulary.pieces import BYTE_TOKEN, SPACE, unknown_of, writing_of

Say = Callable[[str, float], None]
_SPACED_WORD = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")
_BONUS = 2.0**-10
"""By which the logarithm of a new unigram piece is above that of its parts: enough to win, too little for more."""
_ROUNDS = 10


@dataclass(frozen=True, eq=False)
class Extension:
    """A tokenizer with more tokens."""

    plain: dict[str, Any]
    """tokenizer.json."""
    first: int
    """The id of the first new token; the others follow."""
    tokens: tuple[str, ...]
    tokens_before: int
    """Of the texts, as the tokenizer cut them."""
    tokens_after: int
    notes: tuple[str, ...]
    """What becomes of texts that are not like these."""


@dataclass(frozen=True)
class Recut:
    """What a tokenizer makes of texts beside another."""

    texts: int
    changed: int
    """Texts with other tokens."""
    tokens_before: int
    tokens_after: int


def extend(
    plain: Mapping[str, Any], texts: Sequence[str], count: int, *, least: int = 2, say: Say = lambda *_: None
) -> Extension:
    """`count` more tokens for a tokenizer.json, each of which stands `least` times or more in the texts.

    Characters that the model lacks come first, at most half of the new tokens. Fewer come where the texts do not give
    as many; DataError: they give none. UsageError: a count below 1, or a model that is no BPE, Unigram or WordPiece.
    CheckpointError: a tokenizer that cannot be extended without changing what it has.
    """
    if count < 1 or least < 1:
        raise UsageError(f"count={count}, least={least}: expected 1 or more")
    kind = plain["model"]["type"]
    if kind not in ("BPE", "Unigram", "WordPiece"):
        raise UsageError(f"the tokenizer is a {kind}; BPE, Unigram and WordPiece can be extended")
    grown = _Grown.begin(plain)
    say("counting words", 0.0)
    counted = _words(grown, texts)
    for token in _characters(grown, counted, count, least):
        grown.add(token)
    say("learning tokens", 0.3)
    _learn(grown, counted, count, least, say)
    if not grown.tokens:
        raise DataError(
            f"no two tokens stand together {least} times or more in the texts, so there is none to add; give more text"
        )
    say("counting tokens", 0.9)
    before, after = (_total(tokenizer, texts) for tokenizer in (Tokenizer.from_str(json.dumps(plain)), grown.loaded()))
    return Extension(grown.written(), grown.first, tuple(grown.tokens), before, after, _notes(kind, grown))


def recut(before: Tokenizer, after: Tokenizer, texts: Sequence[str]) -> Recut:
    """How many texts an extended tokenizer cuts otherwise than the one before."""
    olds, news = (each.encode_batch(list(texts), add_special_tokens=False) for each in (before, after))
    changed = sum(old.tokens != new.tokens for old, new in zip(olds, news, strict=True))
    return Recut(len(texts), changed, *(sum(len(own.ids) for own in own_texts) for own_texts in (olds, news)))


class _Grown:
    """A tokenizer.json that gets new tokens."""

    def __init__(self, plain: dict[str, Any], ids: dict[str, int]) -> None:
        self._plain = plain
        self._ids = ids
        self.kind = str(plain["model"]["type"])
        self.first = max(ids.values()) + 1
        self.tokens: list[str] = []
        self._merges: list[tuple[str, str]] = []
        self._scores = dict(plain["model"]["vocab"]) if self.kind == "Unigram" else {}
        model = plain["model"]
        self.inner = model.get("continuing_subword_prefix") or ""
        if self.kind == "WordPiece":
            self.inner = model.get("continuing_subword_prefix", "##")
        self.last = model.get("end_of_word_suffix") or ""
        self.unknown = unknown_of(model, ids)
        self.spaced = writing_of(plain) == "spaces"
        added = {token["content"] for token in plain["added_tokens"]}
        self.pieces = tuple(token for token in ids if token not in added and not BYTE_TOKEN.fullmatch(token))
        digits = [token for token in self.pieces if _digits(token)]
        self.single_digits = not any(_digits(token) > 1 for token in digits)
        self.lonely_digits = not any(len(token.removeprefix(self.inner)) > 1 for token in digits)

    @staticmethod
    def begin(plain: Mapping[str, Any]) -> _Grown:
        """With every token at its real id in the model's own vocabulary, so that those behind it get no other."""
        try:
            ids = dict(Tokenizer.from_str(json.dumps(plain)).get_vocab(with_added_tokens=True))
        except Exception as error:
            raise CheckpointError(f"the tokenizer cannot be loaded: {first_line(error)}") from error
        own = copy.deepcopy(dict(plain))
        model = own["model"]
        listed = isinstance(model["vocab"], list)
        known = {piece for piece, _ in model["vocab"]} if listed else set(model["vocab"])
        outside = sorted((i, token) for token, i in ids.items() if token not in known)
        alone = [token["content"] for token in own["added_tokens"] if token["single_word"]]
        if model["type"] != "BPE" and not known.issuperset(alone):
            raise CheckpointError(
                "an added token that only stands alone (single_word) is outside the model's vocabulary; inside, it "
                "would be found within words: add it to the vocabulary by hand, or take single_word from it"
            )
        lowest = min(score for _, score in model["vocab"]) if listed else 0.0
        for i, token in outside:
            if not listed:
                model["vocab"][token] = i
                continue
            if i != len(model["vocab"]):
                raise CheckpointError(f"the tokenizer has no token {len(model['vocab'])}, but {token!r} at {i}")
            model["vocab"].append([token, lowest])
        return _Grown(own, ids)

    def __contains__(self, token: str) -> bool:
        return token in self._ids

    def joined(self, first: str, second: str) -> str | None:
        """What two tokens make; None where that is no token to have."""
        made = first + (second[len(self.inner) :] if self.inner else second)
        if made in self._ids or BYTE_TOKEN.fullmatch(first) or BYTE_TOKEN.fullmatch(second):
            return None
        if _digits(made) and (self.lonely_digits or (self.single_digits and _digits(made) > 1)):
            return None
        # SentencePiece never joins words with signs, and nothing else keeps them apart here.
        if self.spaced and len({_sort(sign) for sign in made.strip(SPACE)}) > 1:
            return None
        return made

    def is_letter(self, token: str) -> bool:
        return len(token.removeprefix(self.inner).removesuffix(self.last)) == 1

    def add(self, token: str) -> None:
        """A character."""
        self._put(token)
        if self.kind == "Unigram":
            self._scores[token] = min(self._scores.values())

    def add_pair(self, first: str, second: str, made: str) -> None:
        self._put(made)
        if self.kind == "BPE":
            self._merges.append((first, second))
        if self.kind == "Unigram":
            self._scores[made] = self._scores[first] + self._scores[second] + _BONUS

    def keep(self, tokens: Sequence[str]) -> None:
        """No other new tokens than these."""
        for token in self.tokens:
            del self._ids[token]
        self.tokens = []
        for token in tokens:
            self._put(token)

    def _put(self, token: str) -> None:
        self._ids[token] = self.first + len(self.tokens)
        self.tokens.append(token)

    def written(self) -> dict[str, Any]:
        """tokenizer.json."""
        own = copy.deepcopy(self._plain)
        model = own["model"]
        if self.kind == "Unigram":
            model["vocab"] += [[token, self._scores[token]] for token in self.tokens]
        else:
            model["vocab"].update({token: self._ids[token] for token in self.tokens})
        if self.kind == "BPE":
            as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
            model["merges"] += [" ".join(pair) if as_text else list(pair) for pair in self._merges]
        return own

    def loaded(self) -> Tokenizer:
        """What is loaded from it; CheckpointError where that has other ids."""
        tokenizer = Tokenizer.from_str(json.dumps(self.written()))
        if tokenizer.get_vocab(with_added_tokens=True) != self._ids:
            raise CheckpointError("the extended tokenizer gives old tokens other ids; its file contradicts itself")
        return tokenizer


def _words(grown: _Grown, texts: Sequence[str]) -> Counter[str]:
    """What the model cuts by itself, in its own signs, and how often."""
    tokenizer = grown.loaded()
    added = [token["content"] for token in json.loads(tokenizer.to_str())["added_tokens"]]
    apart = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True)))) if added else None
    normalizer, cutter = tokenizer.normalizer, tokenizer.pre_tokenizer
    counted: Counter[str] = Counter()
    for text in texts:
        for stretch in apart.split(text) if apart else [text]:
            normal = normalizer.normalize_str(stretch) if normalizer else stretch
            words = [word for word, _ in cutter.pre_tokenize_str(normal)] if cutter else [normal]
            if grown.spaced:
                words = [part for word in words for part in _SPACED_WORD.findall(word)]
            counted.update(words)
    return counted


def _characters(grown: _Grown, counted: Mapping[str, int], count: int, least: int) -> list[str]:
    """Characters that texts have and the model lacks; of a WordPiece also those that it lacks inside words."""
    often: Counter[str] = Counter()
    for word, times in counted.items():
        for place, sign in enumerate(word):
            marked = (grown.inner if place else "") + sign + (grown.last if place == len(word) - 1 else "")
            often[marked] += times
    model = grown.loaded().model
    lost = [(sign, times) for sign, times in often.items() if times >= least and sign not in grown]
    lost = [(sign, times) for sign, times in lost if not BYTE_TOKEN.fullmatch(_alone(model, sign))]
    chosen = [sign for sign, _ in sorted(lost, key=lambda pair: (-pair[1], pair[0]))[: count // 2]]
    if grown.kind != "WordPiece":
        return chosen
    # A longer match may end before any such sign, where a word must go on or be lost as a whole.
    inner = grown.inner
    stems = (piece.removeprefix(inner) if piece.startswith(inner) else piece[1:] for piece in grown.pieces)
    needed = sorted(inner + sign for sign in set("".join(stems)) if inner + sign not in grown)
    if len(needed) > count:
        raise UsageError(
            f"the vocabulary lacks {len(needed)} of its letters inside words ({inner}x), without which longer "
            f"tokens would make words unknown; ask for more than {len(needed)} tokens"
        )
    return [*needed, *[sign for sign in chosen if sign not in needed][: (count - len(needed)) // 2]]


def _alone(model: Any, sign: str) -> str:
    """The token of one byte that stands for a sign, or ""."""
    found = model.tokenize(sign) if len(sign.encode("utf-8")) == 1 else []
    return str(found[0].value) if len(found) == 1 else ""


def _learn(grown: _Grown, counted: Mapping[str, int], count: int, least: int, say: Say) -> None:
    """Pairs until there are as many tokens; those of a Unigram or WordPiece that no text has make room for others."""
    pairs = _pairs(grown, counted, least)
    for _ in range(_ROUNDS):
        while len(grown.tokens) < count and (found := next(pairs, None)) is not None:
            grown.add_pair(*found)
            if len(grown.tokens) % 256 == 0:
                say("learning tokens", 0.3 + 0.6 * len(grown.tokens) / count)
        if grown.kind == "BPE":
            return
        model = grown.loaded().model
        used = {token.value for word in counted for token in model.tokenize(word)}
        kept = [token for token in grown.tokens if token in used or grown.is_letter(token)]
        if len(kept) == len(grown.tokens):
            return
        grown.keep(kept)


def _pairs(grown: _Grown, counted: Mapping[str, int], least: int) -> Iterator[tuple[str, str, str]]:
    """The most frequent pair of neighbours and what it makes, the texts joined accordingly before the next."""
    words, times = _cut(grown, counted)
    together: Counter[tuple[str, str]] = Counter()
    where: dict[tuple[str, str], set[int]] = {}
    for n, word in enumerate(words):
        _count(word, times[n], n, together, where)
    waiting = [(-often, pair) for pair, often in together.items() if often >= least]
    heapq.heapify(waiting)
    while waiting:
        often, pair = heapq.heappop(waiting)
        now = together[pair]
        if now != -often:
            if now >= least:
                heapq.heappush(waiting, (-now, pair))
            continue
        made = grown.joined(*pair)
        if made is None:
            continue
        yield *pair, made
        changed: set[tuple[str, str]] = set()
        for n in where.pop(pair):
            _count(words[n], -times[n], n, together, where)
            words[n] = _join(words[n], pair, made)
            changed |= _count(words[n], times[n], n, together, where)
        for other in changed:
            if together[other] >= least:
                heapq.heappush(waiting, (-together[other], other))


def _cut(grown: _Grown, counted: Mapping[str, int]) -> tuple[list[list[str | None]], list[int]]:
    """Words in tokens, None where there is one for nothing that the text has; and how often each comes."""
    model = grown.loaded().model
    words: list[list[str | None]] = []
    for word in counted:
        own: list[str | None] = []
        done = 0
        for token in model.tokenize(word):
            start, end = token.offsets
            own += [None] * (start > done)
            own.append(None if token.id == grown.unknown else token.value)
            done = end
        words.append(own)
    return words, list(counted.values())


def _count(
    word: Sequence[str | None],
    times: int,
    n: int,
    together: Counter[tuple[str, str]],
    where: dict[tuple[str, str], set[int]],
) -> set[tuple[str, str]]:
    pairs = [(a, b) for a, b in pairwise(word) if a is not None and b is not None]
    for pair in pairs:
        together[pair] += times
        where.setdefault(pair, set()).add(n)
    return set(pairs)


def _join(word: list[str | None], pair: tuple[str, str], made: str) -> list[str | None]:
    joined: list[str | None] = []
    for token in word:
        if joined and (joined[-1], token) == pair:
            joined[-1] = made
        else:
            joined.append(token)
    return joined


def _digits(token: str) -> int:
    return sum(map(str.isdigit, token))


def _sort(sign: str) -> str:
    """Letters with their marks, digits, other signs."""
    if sign.isdigit():
        return "digit"
    return "letter" if unicodedata.category(sign)[0] in "LM" or sign in "\u200c\u200d" else "other"


def _total(tokenizer: Tokenizer, texts: Sequence[str]) -> int:
    return sum(len(each.ids) for each in tokenizer.encode_batch(list(texts), add_special_tokens=False))


def _notes(kind: str, grown: _Grown) -> tuple[str, ...]:
    letters = [token for token in grown.tokens if grown.is_letter(token)]
    note = {
        "BPE": "texts are cut as before and then joined further, wherever the two halves of a new token stand",
        "Unigram": "the parts of a new token are joined wherever they were the best cut; other texts are cut as before",
        "WordPiece": "words in which a new token is the longest match are cut otherwise; no known word becomes unknown",
    }[kind]
    return (
        (note, f"{len(letters)} new tokens are characters: texts with them are cut otherwise") if letters else (note,)
    )
