"""Unigram language model (Kudo, ACL 2018, arXiv 1804.10959), as SentencePiece trains it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tokenizers import Tokenizer, trainers

from tersely.vocabulary.training.bpe import begun
from tersely.vocabulary.training.pipeline import UNKNOWN, Pipeline, assemble, pipeline
from tersely.vocabulary.training.protocol import Order, Training


@dataclass(frozen=True)
class Unigram(Training):
    """Keep the pieces whose loss would make the text least likely; a text is cut where its likelihood is highest.

    Begins with the frequent substrings of words, and alternates EM steps with pruning a share of the pieces.

    The trainer of `tokenizers` visits the words in an order that differs from run to run: two runs on one text give
    scores that differ in the third digit, and now and then another piece at the margin.
    """

    name: ClassVar[str] = "unigram"
    max_piece: int = 16
    """Characters of the longest piece."""
    shrinking: float = 0.75
    """Share of the pieces that a round of pruning keeps."""
    sub_iterations: int = 2
    """EM steps of a round."""
    coverage: float = 0.9995
    """Share of the text whose characters have pieces, where these are not bytes."""

    def trained(self, order: Order) -> Tokenizer:
        around = order.around or pipeline("metaspace")
        texts, reserved, alphabet = begun(order, around, self.coverage)
        pieces = self.pieces(texts, order.size - len(order.special) - len(reserved), alphabet, around)
        return assemble(unigram_model(pieces, order.special, reserved, around), around, order.special)

    def pieces(
        self, texts: Iterable[str], size: int, alphabet: Sequence[str], around: Pipeline
    ) -> list[tuple[str, float]]:
        """The pieces with their scores, highest first, the whole alphabet among them; fewer where the text has no more.

        EM forgets pieces that pruning would have kept: more are asked for until enough are left.
        """
        wanted, before = size, 0
        while True:
            found = _with_alphabet(self._train(texts, wanted, alphabet, around), size, set(alphabet))
            if len(found) == size or len(found) <= before:
                return found
            before, wanted = len(found), wanted + 2 * (size - len(found))

    def _train(
        self, texts: Iterable[str], size: int, alphabet: Sequence[str], around: Pipeline
    ) -> list[tuple[str, float]]:
        tokenizer = assemble({"type": "Unigram", "vocab": [[UNKNOWN, 0.0]], "unk_id": 0}, around)
        trainer = trainers.UnigramTrainer(
            vocab_size=size + 1,
            initial_alphabet=list(alphabet),
            special_tokens=[UNKNOWN],
            unk_token=UNKNOWN,
            max_piece_length=self.max_piece,
            shrinking_factor=self.shrinking,
            n_sub_iterations=self.sub_iterations,
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        pieces = json.loads(tokenizer.to_str())["model"]["vocab"]
        return [(piece, score) for piece, score in pieces if piece != UNKNOWN]


def unigram_model(
    pieces: Sequence[tuple[str, float]], special: Sequence[str], reserved: Sequence[str], around: Pipeline
) -> dict[str, Any]:
    """A Unigram as tokenizer.json writes it; special tokens and bytes are never the best path."""
    lowest = min(score for _, score in pieces)
    vocabulary = [*((token, lowest) for token in (*special, *reserved)), *pieces]
    names = [token for token, _ in vocabulary]
    return {
        "type": "Unigram",
        "unk_id": names.index(UNKNOWN) if UNKNOWN in names else None,
        "vocab": [list(item) for item in vocabulary],
        "byte_fallback": around.atoms == "fallback",
    }


def _with_alphabet(pieces: list[tuple[str, float]], size: int, alphabet: set[str]) -> list[tuple[str, float]]:
    """Longer pieces are left out, from the last, until all of the alphabet has room; of characters, only it stays."""
    lowest = min(score for _, score in pieces)
    singles = {piece: score for piece, score in pieces if piece in alphabet}
    atoms = [(piece, singles.get(piece, lowest)) for piece in sorted(alphabet)]
    longer = [item for item in pieces if len(item[0]) > 1][: size - len(atoms)]
    return sorted([*atoms, *longer], key=lambda item: (-item[1], item[0]))
