"""SuperBPE (Liu, Hayase et al., COLM 2025, arXiv 2503.13423): byte-pair encoding that goes on across words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tersely.errors import UsageError
from tersely.vocabulary.pieces import SIGNS
from tersely.vocabulary.training.bpe import BPE, bpe_model
from tersely.vocabulary.training.merging import EDGE, Merging, joined
from tersely.vocabulary.training.pipeline import ALPHABET, assemble, byte_level, pipeline
from tersely.vocabulary.training.protocol import Order, Training, checked

ACROSS_WORDS = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]{2,}[\r\n/]*| +(?!\S)"
"""What stays apart in the second stage: up to three digits, runs of punctuation, spaces before a space or an end."""
SPACE_SIGN = SIGNS[ord(" ")]
_LINES = 1000
_BEGUN = 0.2
"""Share of the work that is done when the second stage begins, about."""


@dataclass(frozen=True)
class SuperBPE(Training):
    """Learn words as BPE does, then go on merging across spaces: "of the", "in order to".

    The first stage is BPE within words, up to a share of the size. The second goes on from its merges on whole lines,
    in which only digits, runs of punctuation and trailing spaces stay apart. The tokenizer cuts texts as the second
    stage did, with the merges of both. A pair is passed over for good where its token would have more than `words`
    words, or a colon before a space ("Answer: " is where prompts end).

    The second stage holds the text in memory, with about 80 bytes for each token of the first one. The same text gives
    the same bytes.
    """

    name: ClassVar[str] = "superbpe"
    transition: float = 0.9
    """Share of the size at which words are left behind (the authors: 180,000 of 200,000 for the best model; a lower
    one gives fewer tokens)."""
    words: int = 4
    """Of a token, at most."""
    min_frequency: int = 2
    """Of a pair that is merged."""

    def trained(self, order: Order) -> Tokenizer:
        size, special, say = order.size, order.special, order.say
        around = order.around or pipeline("gpt-4o")
        if around.atoms != "bytes":
            raise UsageError("superbpe is byte-level; give a pre-tokenizer over bytes: gpt-2, gpt-4, gpt-4o or qwen-2")
        if not 0 < self.transition <= 1 or self.words < 1:
            raise UsageError(
                f"transition={self.transition}, words={self.words}: give a share of the size above 0, of at most 1, "
                "and at least 1 word"
            )
        texts = checked(order.texts, special, size, len(ALPHABET))
        first = max(round(self.transition * size), len(special) + len(ALPHABET))
        within = BPE(min_frequency=self.min_frequency)(
            texts, first, special=special, around=around, say=lambda what, share: say(what, share * _BEGUN)
        )
        whole = replace(byte_level(ACROSS_WORDS), normalizer=around.normalizer)
        model = json.loads(within.to_str())["model"]
        tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
        if first < size:
            say("reading the text across words", _BEGUN)
            ids = model["vocab"]
            merged = {(ids[left], ids[right]): ids[left + right] for left, right in model["merges"]}
            cells = encoded_lines(texts, assemble(bpe_model(tokens, model["merges"], whole), whole, ()))
            merging = Merging(cells, tokens, merged, self.min_frequency)
            merging.extend(size, self.allows, lambda share: say("merging across words", _BEGUN + (1 - _BEGUN) * share))
            model["merges"] = [(tokens[left], tokens[right]) for left, right in merging.merges]
        return assemble(bpe_model(tokens, model["merges"], whole), whole, special)

    def allows(self, token: str) -> bool:
        """Whether a token keeps the rules on colons and words."""
        if f":{SPACE_SIGN}" in token:
            return False
        return sum(bool(word) for word in token.split(SPACE_SIGN)) <= self.words


def encoded_lines(texts: Iterable[str], tokenizer: Tokenizer) -> NDArray[np.int32]:
    """The ids of all lines, with EDGE between the chunks of the pre-tokenizer and between lines."""
    parts: list[NDArray[np.int32]] = []
    lines = _lines(texts)
    while some := list(islice(lines, _LINES)):
        cells: list[int] = []
        for encoding in tokenizer.encode_batch(some, add_special_tokens=False):
            chunk: int | None = None
            for i, own in zip(encoding.ids, encoding.word_ids, strict=True):
                if own != chunk:
                    cells.append(EDGE)
                    chunk = own
                cells.append(i)
            cells.append(EDGE)
        parts.append(np.array(cells, np.int32))
    return joined(parts)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from text.splitlines(keepends=True)
