"""What a kept token needs to be made: the tokens that BPE merges on the way to it.

A tokenizer that lacks one of them no longer reaches the token. Derived from its string alone, a token is merged as it
is inside a text: no merge that is applied there crosses its borders, and those within them compete only with each
other. So a tokenizer that keeps these, and the merges among what it keeps in their order, cuts every text alike whose
tokens it keeps: the merge that comes first of all comes first of fewer, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise

from tersely.vocabulary.tokenizer import Vocabulary

_BYTE_OR_CHARACTER = re.compile(r"<0x[0-9A-F]{2}>|.", re.DOTALL)


class Closure:
    """What each token of a vocabulary needs. Derivations are kept, since they are asked for again."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._parts: dict[int, frozenset[int] | None] = {}
        self._derivations: dict[int, frozenset[int]] = {}
        self._ranks: dict[tuple[int, int], int] = {}
        self._made: list[int] = []
        ids, model_ids = vocabulary.ids, vocabulary.model_ids
        prefix = len(vocabulary.prefix)
        for rank, (first, second) in enumerate(vocabulary.merges):  # of a pair that is there twice, the last counts
            self._ranks[ids[first], ids[second]] = rank
            self._made.append(model_ids[first + second[prefix:]])

    def parts(self, token: int) -> frozenset[int] | None:
        """The ids that must be there for this one to be made, with itself; None: no merges make it.

        None only for a token that the tokenizer never gives: not for added ones, nor where a word that is a token is
        taken whole (ignore_merges), nor of models other than BPE, all of which find a token by its string.
        """
        if token not in self._parts:
            found = set(self._derived(token))
            waiting = [*found]
            while waiting:  # what stands on the way may also be made in another way, where words are marked
                new = self._derived(waiting.pop()) - found
                found |= new
                waiting += new
            self._parts[token] = frozenset(found) or None
        return self._parts[token]

    def closed(self, tokens: Iterable[int]) -> set[int]:
        """These tokens, without those that nothing makes, and all that they need."""
        found: set[int] = set()
        for token in tokens:
            if token not in found:
                found.update(self.parts(token) or ())
        return found

    def _derived(self, token: int) -> frozenset[int]:
        if token not in self._derivations:
            self._derivations[token] = self._derive(token)
        return self._derivations[token]

    def _derive(self, token: int) -> frozenset[int]:
        vocabulary = self._vocabulary
        if vocabulary.kind != "bpe":
            return frozenset({token})
        made: set[int] = set()
        for symbols in self._starts(vocabulary.tokens[token] or ""):
            on_the_way, ends = self._merged(symbols)
            if ends == [token]:
                made |= on_the_way
        found_whole = vocabulary.takes_whole_words or token in vocabulary.added_ids or token == vocabulary.unknown
        return frozenset(made or ({token} if found_whole else ()))

    def _starts(self, text: str) -> Iterator[list[int]]:
        """The symbols that merging may start from: with or without the marks of a word's inside and end."""
        vocabulary = self._vocabulary
        ids, prefix, suffix = vocabulary.model_ids, vocabulary.prefix, vocabulary.suffix
        for inside in (False, True) if prefix and text.startswith(prefix) else (False,):
            for ending in (False, True) if suffix and text.endswith(suffix) else (False,):
                word = text[len(prefix) * inside : len(text) - len(suffix) * ending]
                for cut in self._cuts(word):
                    marked = [prefix * (inside or at > 0) + symbol for at, symbol in enumerate(cut)]
                    marked[-1:] = [last + suffix * ending for last in marked[-1:]]
                    if marked and all(symbol in ids for symbol in marked):
                        yield [ids[symbol] for symbol in marked]

    def _cuts(self, word: str) -> Iterator[list[str]]:
        yield list(word)
        if self._vocabulary.byte_fallback and "<0x" in word:
            yield _BYTE_OR_CHARACTER.findall(word)

    def _merged(self, symbols: list[int]) -> tuple[set[int], list[int]]:
        """All symbols that are there at some time, and those at the end: the first merge first, on the left first."""
        rank_of, never = self._ranks.get, len(self._made)
        seen = set(symbols)
        ranks = [rank_of(pair, never) for pair in pairwise(symbols)]
        while ranks and (best := min(ranks)) < never:
            at = ranks.index(best)
            symbols[at : at + 2] = [self._made[best]]
            seen.add(symbols[at])
            del ranks[at]
            if at:
                ranks[at - 1] = rank_of((symbols[at - 1], symbols[at]), never)
            if at < len(ranks):
                ranks[at] = rank_of((symbols[at], symbols[at + 1]), never)
        return seen, symbols
