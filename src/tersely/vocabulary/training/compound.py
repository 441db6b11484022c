"""CompoundPiece (Minixhofer, Pfeiffer, Vulić, EMNLP 2023, arXiv 2305.14214): pieces that respect parts of compounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from tokenizers import Tokenizer

from tersely.errors import DataError, UsageError
from tersely.vocabulary.pieces import SIGNS, SPACE
from tersely.vocabulary.training.bpe import begun, words_of
from tersely.vocabulary.training.decompounding import Decompound, KnownWords, read_parts, surface_parts
from tersely.vocabulary.training.pipeline import Pipeline, assemble, pipeline
from tersely.vocabulary.training.protocol import Order, Training, completed
from tersely.vocabulary.training.unigram import Unigram, unigram_model

_SPACES = (SPACE, SIGNS[ord(" ")], " ")


@dataclass(frozen=True)
class CompoundPiece(Training):
    """A Unigram of the parts of compound words: no piece that it learns crosses from one part to the next.

    Words of at least `min_count` and under `max_bytes` are split, each kind once, and Unigram is trained on the parts,
    each as often as the count over `resolution` says. Parts that are not spelled as they stand in the word are aligned
    with it. The authors split with a ByT5 that they trained; here a table says how, or any function (`train`), or else
    words are split into words that the text knows (`KnownWords`), which is no match for it.

    What is written is a standard tokenizer.json, which cannot hold a decompounder: with it alone, a word is cut where
    its pieces are likeliest, which may cross parts where a learned piece happens to span them. To cut as the paper
    does, split words at run time too: `encode_parts`.
    """

    name: ClassVar[str] = "compound"
    table: str = ""
    """A file of words and their parts (`read_parts`)."""
    min_count: int = 16
    max_bytes: int = 32
    resolution: int = 16
    coverage: float = 0.9995
    """Share of the text whose characters have pieces, where these are not bytes."""

    def trained(self, order: Order) -> Tokenizer:
        return self._made(read_parts(self.table) if self.table else None, order)

    def train(self, split: Decompound, order: Order) -> Tokenizer:
        """With this decompounder in the place of a table."""
        return completed(self._made(split, order), order)

    def _made(self, split: Decompound | None, order: Order) -> Tokenizer:
        """With this decompounder; None: into words that the texts know."""
        if min(self.min_count, self.max_bytes, self.resolution) < 1:
            raise UsageError(
                f"min_count={self.min_count}, max_bytes={self.max_bytes}, resolution={self.resolution}: at least 1"
            )
        around = order.around or pipeline("metaspace")
        if around.atoms == "bytes":
            raise UsageError("compound splits words, not bytes; give a pre-tokenizer over characters: metaspace")
        texts, reserved, alphabet = begun(order, around, self.coverage)
        words = words_of(texts, around)
        order.say("splitting words", 0.2)
        parts = self.parts(words, split or known_words(words))
        if not parts:
            raise DataError(
                f"no word of under {self.max_bytes} bytes stands {self.min_count} times in the text; "
                "give more text or a lower min_count"
            )
        order.say("training", 0.5)
        # The parts are words already: nothing is to cut them again.
        bare = Pipeline(around.atoms, None, None, None)
        pieces = Unigram().pieces(_Repeated(parts), order.size - len(order.special) - len(reserved), alphabet, bare)
        return assemble(unigram_model(pieces, order.special, reserved, around), around, order.special)

    def parts(self, words: Mapping[str, int], split: Decompound) -> dict[str, int]:
        """Part -> how often it is trained on; the space before a word stays with its first part."""
        counts: Counter[str] = Counter()
        for word, count in words.items():
            if count >= self.min_count and len(word.encode("utf-8")) < self.max_bytes and count >= self.resolution:
                for part in split_word(word, split):
                    counts[part] += count // self.resolution
        return dict(sorted(counts.items()))


def known_words(words: Mapping[str, int]) -> KnownWords:
    """Splits into words of letters that a text has, by how often it has them."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        bare = _bare(word)[1]
        if bare.isalpha():
            counts[bare.lower()] += count
    return KnownWords(counts)


def split_word(word: str, split: Decompound) -> tuple[str, ...]:
    """The parts of a word as the pre-tokenizer gives it; only words of letters are split."""
    space, bare = _bare(word)
    if not bare.isalpha():
        return (word,)
    first, *others = surface_parts(bare, split(bare))
    return (space + first, *others)


def encode_parts(tokenizer: Tokenizer, text: str, split: Decompound) -> list[int]:
    """The ids of a text whose words are split into parts first, without special tokens."""
    normalizer, before, model = tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.model
    normal = text if normalizer is None else normalizer.normalize_str(text)
    words = [normal] if before is None else [word for word, _ in before.pre_tokenize_str(normal)]
    return [token.id for word in words for part in split_word(word, split) for token in model.tokenize(part)]


def _bare(word: str) -> tuple[str, str]:
    """The space in front of a word, as it is written there, and the word."""
    return (word[0], word[1:]) if word[:1] in _SPACES else ("", word)


class _Repeated:
    def __init__(self, counts: Mapping[str, int]) -> None:
        self._counts = counts

    def __iter__(self) -> Iterator[str]:
        for part, count in self._counts.items():
            for _ in range(count):
                yield part
