"""How a tokenizer cuts texts, and how two of them compare."""

from __future__ import annotations

from dataclasses import dataclass

from tersely.results.plain import Measurement


@dataclass(frozen=True)
class Fertility:
    """How a tokenizer cuts the texts of one group: a language, a domain.

    Words are runs of characters that are no white space: in a script that writes none, look at bytes instead. Shares
    are of the tokens, that of `whole_words` of the words. A ratio of nothing is 0.
    """

    group: str
    bytes: int
    characters: int
    words: int
    tokens: int
    tokens_per_word: float
    bytes_per_token: float
    characters_per_token: float
    unknown: float
    """Tokens for what the tokenizer has no token for."""
    byte_tokens: float
    """Tokens that are no whole characters: bytes of rare ones."""
    whole_words: float
    """Words that are one token."""
    renyi_efficiency: float
    """H(p) / ln V of the tokens' frequencies p, Renyi's entropy of order 2.5; 1 where all V are used alike (Zouhar et
    al., ACL 2023, arXiv 2306.16842)."""
    rows: int
    """Tokens of the vocabulary that are used at all."""
    own_rows: int
    """Of these, those that no other group uses."""


@dataclass(frozen=True)
class VocabularyUse(Measurement):
    """How a tokenizer cuts texts, by group and of all together (the group "all", whose rows are those of any)."""

    tokenizer: str
    size: int
    """V: the largest id and one."""
    groups: tuple[Fertility, ...]
    total: Fertility


@dataclass(frozen=True)
class VocabularyChange(Measurement):
    """Two tokenizers on the same texts. `tokens`: group -> tokens after / before."""

    before: VocabularyUse
    after: VocabularyUse
    tokens: dict[str, float]
