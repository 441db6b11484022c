"""Byte-pair encoding (Sennrich et al., ACL 2016, arXiv 1508.07909)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tokenizers import Tokenizer, trainers

from tersely.errors import UsageError
from tersely.vocabulary.training.pipeline import ALPHABET, FALLBACK, UNKNOWN, Pipeline, assemble, pipeline
from tersely.vocabulary.training.protocol import Order, Training, checked


@dataclass(frozen=True)
class BPE(Training):
    """Merge the most frequent pair of neighbours, again and again.

    A text falls into words by the pre-tokenizer; no merge crosses them. Of pairs that are equally frequent, the one
    whose parts came first. The same text gives the same bytes.
    """

    name: ClassVar[str] = "bpe"
    min_frequency: int = 2
    """Of a pair that is merged: a token that is seen once saves nothing anywhere else."""
    coverage: float = 0.9995
    """Share of the text whose characters have tokens, where these are not bytes: the rest is written in bytes, or
    unknown (SentencePiece's default)."""

    def trained(self, order: Order) -> Tokenizer:
        around = order.around or pipeline("gpt-4")
        texts, reserved, alphabet = begun(order, around, self.coverage)
        tokenizer = assemble({"type": "BPE", "vocab": {}, "merges": []}, around)
        trainer = trainers.BpeTrainer(
            vocab_size=order.size - len(order.special) - len(reserved),
            min_frequency=self.min_frequency,
            initial_alphabet=list(alphabet),
            limit_alphabet=len(alphabet),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        trained = json.loads(tokenizer.to_str())["model"]
        tokens = sorted(trained["vocab"], key=trained["vocab"].__getitem__)
        made = bpe_model([*order.special, *reserved, *tokens], trained["merges"], around)
        return assemble(made, around, order.special)


def begun(order: Order, around: Pipeline, coverage: float) -> tuple[Iterable[str], tuple[str, ...], Sequence[str]]:
    """The texts, checked; the tokens that come before what is learnt; and the alphabet that is learnt from."""
    reserved, whole = atoms_of(around, order.special), around.atoms == "bytes"
    texts = checked(order.texts, order.special, order.size, len(ALPHABET) if whole else len(reserved) + 1)
    order.say("reading the text", 0.0)
    return texts, reserved, ALPHABET if whole else covering(texts, around, coverage)


def atoms_of(around: Pipeline, special: Sequence[str]) -> tuple[str, ...]:
    """The tokens that stand behind the special ones where the alphabet is not bytes."""
    unknown = () if UNKNOWN in special else (UNKNOWN,)
    return {"bytes": (), "fallback": (*unknown, *FALLBACK), "characters": unknown}[around.atoms]


def bpe_model(tokens: Sequence[str], merges: Sequence[Sequence[str]], around: Pipeline) -> dict[str, Any]:
    """A BPE as tokenizer.json writes it."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None if around.atoms == "bytes" else UNKNOWN,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": around.atoms == "fallback",
        "byte_fallback": around.atoms == "fallback",
        "ignore_merges": False,
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": [list(merge) for merge in merges],
    }


def covering(texts: Iterable[str], around: Pipeline, coverage: float) -> tuple[str, ...]:
    """The most frequent characters that make up this share of the text, as the pre-tokenizer writes each."""
    if not 0 < coverage <= 1:
        raise UsageError(f"coverage={coverage}: a share above 0, of at most 1")
    raw: Counter[str] = Counter()
    for text in texts:
        raw.update(text)
    counts: Counter[str] = Counter()
    for character, count in raw.items():
        for written in "".join(words_of([character], around)):
            counts[written] += count
    left = coverage * counts.total()
    chosen = []
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if left <= 0:
            break
        chosen.append(character)
        left -= count
    return tuple(sorted(chosen))


def words_of(texts: Iterable[str], around: Pipeline) -> Counter[str]:
    """How often each word stands in the texts, as the model is given it."""
    tokenizer = assemble({"type": "BPE", "vocab": {}, "merges": []}, around)
    normalizer, before = tokenizer.normalizer, tokenizer.pre_tokenizer
    counts: Counter[str] = Counter()
    for text in texts:
        normal = text if normalizer is None else normalizer.normalize_str(text)
        counts.update([normal] if before is None else [word for word, _ in before.pre_tokenize_str(normal)])
    return counts
