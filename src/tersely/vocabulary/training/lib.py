"""Less-is-Better (Yang, 2024, arXiv 2403.00417; the model is that of Yang et al., 2020): chunks learned by reading."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from tokenizers import Regex, Tokenizer, pre_tokenizers

from tersely.errors import UsageError
from tersely.vocabulary.pieces import SIGNS
from tersely.vocabulary.training.pipeline import ALPHABET, UNKNOWN, assemble, byte_level
from tersely.vocabulary.training.protocol import Order, Training, checked

_LONGEST = 100
"""Characters of a sentence."""
SENTENCE = (
    rf"[^\r\n.!?]{{1,{_LONGEST - 4}}}(?![^\s.!?])[.!?\r\n]{{0,4}}"
    rf"|[^\r\n.!?]{{1,{_LONGEST - 4}}}|[.!?\r\n]{{1,{_LONGEST}}}"
)
"""Up to full stops or the end of a line; a longer one is cut before a space, or anywhere where there is none."""
_UTF8 = 4
"""Bytes of a character, at most."""
_ASCII = 128


@dataclass(frozen=True)
class LiB(Training):
    """Learn words, parts of words and phrases from reading: few tokens on a text, of few kinds.

    A list of chunks, the best in front, begins with the characters of the texts. Each epoch reads an article, some
    consecutive sentences, by greedy longest match. Two chunks side by side are remembered as one, at the end of the
    list, when that is proposed a second time in the article. Each chunk of two characters or more is compared with the
    next shorter match in its place, read on to where both readings meet: it is redundant where that takes fewer
    chunks, or as many that stand further in front. It then moves back by `rate` of its place, and the shorter one
    forward by as much; a chunk that is not redundant moves forward. What is moved behind the end is forgotten, and so
    is what has come into the last `tail` of the list and is found redundant or unread for `life` epochs. Characters
    stay. (In the authors' code the label +1 means redundant, and moves back.)

    The tokenizer is a WordPiece without a prefix over bytes: greedy longest match, with a token for each byte, so that
    every text can be written and comes back as it was. WordPiece takes quadratic time, which is why texts are cut into
    sentences first, and why it encodes slower than a BPE. Its chunks are the characters and those at the front of the
    list, which grows as the authors' does, freely: held to `size` while it learns, it keeps what came first.

    The sentences lie in memory. The same texts and seed give the same bytes.
    """

    name: ClassVar[str] = "lib"
    epochs: int = 5000
    sentences: int = 200
    """Of an article."""
    max_length: int = 12
    """Characters of a chunk."""
    memorise: float = 0.25
    """Probability that two neighbours are proposed as one."""
    rate: float = 0.2
    tail: float = 1e-4
    life: int = 10
    seed: int = 0

    def trained(self, order: Order) -> Tokenizer:
        size, special = order.size, order.special
        if order.around is not None:
            raise UsageError("lib reads sentences and takes no pre-tokenizer; leave it out")
        shares = {"memorise": self.memorise, "rate": self.rate, "tail": self.tail}
        numbers = {"epochs": self.epochs, "sentences": self.sentences, "max_length": self.max_length, "life": self.life}
        wrong = [f"{name}={value}" for name, value in shares.items() if not 0 <= value <= 1]
        wrong += [f"{name}={value}" for name, value in numbers.items() if value < 1]
        if wrong:
            raise UsageError(f"{', '.join(wrong)}: give shares from 0 to 1, and numbers of at least 1")
        order.say("reading the text", 0.0)
        cut = pre_tokenizers.Split(Regex(SENTENCE), "isolated")
        texts = checked(order.texts, special, size, len(ALPHABET))
        sentences = [sentence for text in texts for sentence, _ in cut.pre_tokenize_str(text)]
        counts = Counter(character for sentence in sentences for character in sentence)
        characters = sorted(counts, key=lambda character: (-counts[character], character))
        own = [character for character in characters if ord(character) >= _ASCII]
        if len(special) + len(ALPHABET) + len(own) > size:
            least = len(special) + len(ALPHABET) + len(own)
            raise UsageError(f"size={size} is less than the alphabet of this text, {least} tokens; use more")
        chunks = Chunks(self, characters)
        draw = random.Random(self.seed)
        for epoch in range(self.epochs):
            first = draw.randrange(max(1, len(sentences) - self.sentences + 1))
            chunks.read(sentences[first : first + self.sentences], draw)
            if epoch % 50 == 0:
                order.say("reading", epoch / self.epochs)
        longer = [chunk for chunk in chunks.order if len(chunk) > 1]
        return wordpiece([*own, *longer[: size - len(special) - len(ALPHABET) - len(own)]], special)


class Chunks:
    """The list of chunks and what becomes of it."""

    def __init__(self, settings: LiB, characters: Sequence[str]) -> None:
        self.order = list(characters)
        self._settings = settings
        self._place = {chunk: place for place, chunk in enumerate(self.order)}
        self._life: dict[str, int] = {}

    def read(self, article: Sequence[str], draw: random.Random) -> None:
        """One epoch."""
        proposed: set[str] = set()
        moves: list[tuple[str, int]] = []
        for sentence in article:
            begins = self._segment(sentence, proposed, draw)
            self._judge(sentence, begins, moves)
        self._update(moves)

    def _match(self, sentence: str, first: int, most: int) -> int:
        """The length of the longest chunk there, of at most so many characters."""
        place = self._place
        for length in range(min(most, len(sentence) - first), 1, -1):
            if sentence[first : first + length] in place:
                return length
        return 1

    def _segment(self, sentence: str, proposed: set[str], draw: random.Random) -> list[int]:
        """Where chunks begin, and the end of the sentence."""
        settings = self._settings
        begins, here, last = [], 0, ""
        while here < len(sentence):
            begins.append(here)
            length = self._match(sentence, here, settings.max_length)
            chunk = sentence[here : here + length]
            both = last + chunk
            if last and len(both) <= settings.max_length and draw.random() < settings.memorise:
                self._propose(both, proposed)
            last = chunk
            here += length
        return [*begins, here]

    def _propose(self, chunk: str, proposed: set[str]) -> None:
        if chunk in self._place:
            return
        if chunk not in proposed:
            proposed.add(chunk)
        else:
            proposed.remove(chunk)
            self._place[chunk] = len(self.order)
            self.order.append(chunk)

    def _judge(self, sentence: str, begins: Sequence[int], moves: list[tuple[str, int]]) -> None:
        """+1, back, for chunks that are redundant; -1, forward, for the others and for what does without them."""
        place, most, ends = self._place, self._settings.max_length, set(begins)
        for number in range(len(begins) - 1):
            first = begins[number]
            length = begins[number + 1] - first
            if length == 1:
                continue
            shorter = self._match(sentence, first, length - 1)
            here = first + shorter
            other = [sentence[first:here]]
            while here not in ends:
                length = self._match(sentence, here, most)
                other.append(sentence[here : here + length])
                here += length
            last = number + 1
            while begins[last] < here:
                last += 1
            pairs = zip(begins[number:last], begins[number + 1 : last + 1], strict=True)
            own = [sentence[begin:end] for begin, end in pairs]
            if len(own) != len(other):
                redundant = len(own) > len(other)
            else:
                redundant = sum(place[chunk] for chunk in own) > sum(place[chunk] for chunk in other)
            moves.append((own[0], 1 if redundant else -1))
            if redundant:
                moves.append((other[0], -1))
            else:
                self._life.pop(own[0], None)

    def _update(self, moves: Sequence[tuple[str, int]]) -> None:
        settings, whole = self._settings, len(self.order)
        moved: dict[str, int] = {}
        for chunk, sign in moves:
            place = moved.get(chunk, self._place[chunk])
            moved[chunk] = max(0, place + sign * (int(settings.rate * place) + 1))
        self._life = {chunk: life - 1 for chunk, life in self._life.items()}
        gone = {chunk for chunk, life in self._life.items() if life < 1}
        gone |= {chunk for chunk, place in moved.items() if place >= whole and len(chunk) > 1}
        keys = np.arange(whole, dtype=np.float64)
        for chunk, place in moved.items():
            # Behind what stood there when it comes from the front, before it when it comes from behind.
            keys[self._place[chunk]] = place + (0.5 if place > self._place[chunk] else -0.5)
        order = (self.order[i] for i in np.argsort(keys, kind="stable").tolist())
        self.order = [chunk for chunk in order if chunk not in gone]
        self._place = {chunk: place for place, chunk in enumerate(self.order)}
        last = self.order[int((1 - settings.tail) * len(self.order)) :]
        kept = {chunk: life for chunk, life in self._life.items() if chunk not in gone}
        self._life = {chunk: settings.life for chunk in last if len(chunk) > 1} | kept


def wordpiece(chunks: Iterable[str], special: Sequence[str]) -> Tokenizer:
    written = ("".join(SIGNS[byte] for byte in chunk.encode("utf-8")) for chunk in chunks)
    vocabulary = dict.fromkeys([*special, *ALPHABET, *written])
    model = {
        "type": "WordPiece",
        "unk_token": UNKNOWN,
        "continuing_subword_prefix": "",
        "max_input_chars_per_word": _LONGEST * _UTF8,
        "vocab": {token: i for i, token in enumerate(vocabulary)},
    }
    return assemble(model, byte_level(SENTENCE), special)
