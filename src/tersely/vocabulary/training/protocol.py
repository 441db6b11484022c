"""What trains a tokenizer, and what all that do ask of their texts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from tokenizers import Tokenizer

from tersely.errors import DataError, UsageError
from tersely.vocabulary.training.pipeline import Pipeline

Progress = Callable[[str, float], None]
"""Told what is done now, and which share of it."""


def silent(what: str, share: float) -> None:
    """Progress that nobody asked for."""


@dataclass(frozen=True, eq=False)
class Order:
    """What a tokenizer is made of."""

    texts: Iterable[str]
    """May be read several times, in the same order, and need not fit into memory."""
    size: int
    """Tokens, the special ones included."""
    special: Sequence[str] = ()
    """They come first."""
    around: Pipeline | None = None
    """What is done to a text before and after; None for the method's own."""
    say: Progress = silent


class Training(ABC):
    """Makes a tokenizer of texts. A frozen dataclass of settings, with the authors' defaults."""

    name: ClassVar[str]

    def __call__(
        self,
        texts: Iterable[str],
        size: int,
        *,
        special: Sequence[str] = (),
        around: Pipeline | None = None,
        say: Progress = silent,
    ) -> Tokenizer:
        """A tokenizer of exactly `size` tokens, the special ones among them and first.

        It may be saved as tokenizer.json as it is. Raises UsageError: settings that cannot be, a size below that of the
        alphabet; DataError: no text, or too little of it for `size`.
        """
        order = Order(texts, size, special, around, say)
        return completed(self.trained(order), order)

    @abstractmethod
    def trained(self, order: Order) -> Tokenizer:
        """Train; how many tokens there are is looked at by the caller."""
        ...


def completed(made: Tokenizer, order: Order) -> Tokenizer:
    """The tokenizer itself. Raises DataError: it has fewer tokens than were asked for; UsageError: more."""
    require_size(made.get_vocab_size(with_added_tokens=True), order.size)
    order.say("trained", 1.0)
    return made


def checked(texts: Iterable[str], special: Sequence[str], size: int, atoms: int) -> Iterable[str]:
    """The texts, empty ones left out. `atoms`: tokens that there must be beside the special ones.

    Raises UsageError: texts that can be read once only, doubled special tokens, too small a size; while they are
    read, DataError: all are empty.
    """
    if iter(texts) is texts:
        raise UsageError("the texts can be read only once; give a list, or an object whose iter() begins anew")
    if len(set(special)) < len(special) or "" in special:
        raise UsageError(f"special tokens {list(special)}: give each once, and none that is empty")
    if size < len(special) + atoms:
        raise UsageError(
            f"size={size} is less than the alphabet: {atoms} tokens and {len(special)} special ones; "
            f"use {len(special) + atoms} or more"
        )
    return _NotEmpty(texts)


def require_size(found: int, size: int) -> None:
    """Raises DataError: fewer tokens than were asked for; UsageError: more."""
    if found < size:
        raise DataError(f"the text yields only {found} of {size} tokens; give more text, or size={found}")
    if found > size:
        raise UsageError(f"size={size} is less than the alphabet of this text, {found} tokens; use more")


class _NotEmpty:
    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts

    def __iter__(self) -> Iterator[str]:
        found = False
        for text in self._texts:
            if text and not text.isspace():
                found = True
                yield text
        if not found:
            raise DataError("there is no text to train a tokenizer on; give files that hold some")
