"""From what a model wrote, or the probabilities it gave, to the score of an item. Task files name these functions."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

_NUMBER = re.compile(r"-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_ARTICLES = frozenset({"a", "an", "the"})
_WITHOUT_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "THAI")
_LOWEST = 0.2


def number(item: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """exact_match: whether the number that the text gives for its answer equals the item's `number`.

    That is the first one behind "####" or "answer is", else the last one of the text.
    """
    text = results[0]
    marked = re.search(r"(?is)(?:####|answer is)(.*)", text)
    found = _NUMBER.findall(marked[1]) if marked else []
    said = found[0] if found else next(reversed(_NUMBER.findall(text)), None)
    right = said is not None and math.isclose(
        float(said.replace(",", "").replace("$", "")), float(item["number"]), rel_tol=1e-9, abs_tol=1e-9
    )
    return {"exact_match": float(right)}


def answer(item: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """f1 (overlap of words) and exact_match against the best of the item's `answers`.

    As SQuAD counts (Rajpurkar et al., 2016): without case, punctuation and, in English, articles. Scripts that put no
    spaces between words are compared by characters.
    """
    said = _words(results[0], item["language"])
    right = [_words(text, item["language"]) for text in item["answers"]]
    return {
        "f1": max(_overlap(said, words) for words in right),
        "exact_match": float(any(said == words for words in right)),
    }


def summary(item: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """rougeL: F1 of the longest common subsequence of words with the item's `reference` (Lin, 2004).

    grounded: share of the summary's distinct pairs of neighbouring words that stand in the article; 0 of nothing.
    """
    said, source = _words(results[0]), _words(item["article"])
    pairs, known = set(pairwise(said)), set(pairwise(source))
    return {
        "rougeL": rouge_l(results[0], item["reference"]),
        "grounded": len(pairs & known) / len(pairs) if pairs else 0.0,
    }


def min_k(item: Mapping[str, Any], results: Sequence[Sequence[float]]) -> dict[str, tuple[int, float]]:
    """auc: whether the item is a member, and the mean of the lowest fifth of its tokens' log-probabilities.

    Min-K% Prob with K = 20 (Shi et al., 2023): a text that was trained on has fewer tokens that surprise.
    """
    lowest = sorted(results[0])[: max(1, int(_LOWEST * len(results[0])))]
    return {"auc": (int(item["member"]), math.fsum(lowest) / len(lowest))}


def area(scored: Sequence[tuple[int, float]]) -> float:
    """How often a member has a higher score than another: the area under the ROC curve; ties count half."""
    ordered = sorted(scored, key=lambda pair: pair[1])
    ranks: dict[float, list[int]] = {}
    for rank, (_, score) in enumerate(ordered, 1):
        ranks.setdefault(score, []).append(rank)
    members = [score for label, score in scored if label]
    others = len(scored) - len(members)
    if not members or not others:
        return math.nan
    total = math.fsum(math.fsum(ranks[score]) / len(ranks[score]) for score in members)
    return (total - len(members) * (len(members) + 1) / 2) / (len(members) * others)


def perplexity(logarithms: Sequence[float]) -> float:
    """exp(-mean) of the log-likelihoods; inf where that is beyond a float."""
    loss = -math.fsum(logarithms) / len(logarithms)
    return math.exp(loss) if loss < 700 else math.inf


def rouge_l(one: str, other: str) -> float:
    """F1 of the longest common subsequence of two texts' words, 0 to 1."""
    first, second = _words(one), _words(other)
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for j, against in enumerate(second, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == against else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(first) + len(second)) if first and second else 0.0


def _words(text: str, language: str = "") -> list[str]:
    plain = "".join(c if unicodedata.category(c)[0] not in "PS" else " " for c in text.lower())
    spaced = "".join(f" {c} " if unicodedata.name(c, "").startswith(_WITHOUT_SPACES) else c for c in plain)
    return [word for word in spaced.split() if language != "en" or word not in _ARTICLES]


def _overlap(said: Sequence[str], right: Sequence[str]) -> float:
    if not said or not right:
        return float(said == right)
    return 2 * (Counter(said) & Counter(right)).total() / (len(said) + len(right))
