"""What token counts say of a tokenizer: fertility, efficiency, and which rows each group of texts uses.

V = rows of a tokenizer, its largest id and one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce
from itertools import zip_longest
from operator import add

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tersely.errors import DataError, UsageError
from tersely.results.vocabulary import Fertility, VocabularyChange, VocabularyUse
from tersely.vocabulary.counting import Counted, rows_of
from tersely.vocabulary.pieces import read_pieces

ORDER = 2.5
"""Of Renyi's entropy: what Zouhar et al. found to foretell translation quality best."""
ALL = "all"


def measure(name: str, tokenizer: Tokenizer, found: Mapping[str, Counted]) -> VocabularyUse:
    """How a tokenizer cuts the texts that were counted with it; `name` is what the result calls it.

    Raises DataError: a group without a token; UsageError: none, one named "all", or counts of another tokenizer.
    """
    rows = rows_of(tokenizer)
    if not found or ALL in found:
        raise UsageError(f'give at least one group of texts, and none named "{ALL}"')
    for group, own in found.items():
        if len(own.tokens_V) != rows:
            raise UsageError(f"{group}: counts of {len(own.tokens_V)} rows, but {name} has {rows}; count with it")
        if not own.tokens:
            raise DataError(f"{group}: the texts have no tokens; give texts that are not empty")
    unknown_V, bytes_V = kinds(tokenizer)
    used = {group: own.tokens_V > 0 for group, own in found.items()}
    groups_V = np.sum(list(used.values()), axis=0)

    def fertility(group: str, own: Counted, alone: int) -> Fertility:
        return Fertility(
            group,
            own.bytes,
            own.characters,
            own.words,
            own.tokens,
            own.tokens / own.words if own.words else 0.0,
            own.bytes / own.tokens,
            own.characters / own.tokens,
            float(own.tokens_V[unknown_V].sum()) / own.tokens,
            float(own.tokens_V[bytes_V].sum()) / own.tokens,
            own.whole / own.words if own.words else 0.0,
            renyi_efficiency(own.tokens_V),
            int((own.tokens_V > 0).sum()),
            alone,
        )

    total = reduce(add, found.values())
    each = tuple(fertility(group, own, int((used[group] & (groups_V == 1)).sum())) for group, own in found.items())
    return VocabularyUse(name, rows, each, fertility(ALL, total, int((groups_V > 0).sum())))


def compare(before: VocabularyUse, after: VocabularyUse) -> VocabularyChange:
    """Two tokenizers on the same texts. UsageError: the texts or groups differ."""
    pairs = list(zip_longest((*before.groups, before.total), (*after.groups, after.total)))
    for one, other in pairs:
        if one is None or other is None or (one.group, one.bytes) != (other.group, other.bytes):
            texts = [f"{own.group} ({own.bytes} bytes)" if own else "no more" for own in (one, other)]
            raise UsageError(
                f"{before.tokenizer} was measured on {texts[0]}, {after.tokenizer} on {texts[1]}; "
                "measure both on the same texts, in the same order"
            )
    return VocabularyChange(before, after, {one.group: other.tokens / one.tokens for one, other in pairs})


def kinds(tokenizer: Tokenizer) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(V,) whether a row is the unknown token; and whether it is no whole characters: a byte, or a cut one."""
    pieces = read_pieces(tokenizer)
    unknown_V = np.zeros(pieces.rows, np.bool_)
    bytes_V = np.zeros(pieces.rows, np.bool_)
    if (unknown := pieces.roles.get("unk")) is not None:
        unknown_V[unknown] = True
    for i, piece in pieces.by_id.items():
        bytes_V[i] = piece.byte or not _is_text(piece.data)
    return unknown_V, bytes_V


def renyi_efficiency(tokens_V: NDArray[np.int64], order: float = ORDER) -> float:
    """H(p) / ln V, with Renyi's entropy H(p) = ln(sum of p^order) / (1 - order) and p = tokens / all; 0 where V is 1.

    At order 1 Shannon's, which is its limit. Raises UsageError: an order that is not positive; DataError: no tokens.
    """
    if not 0 < order < math.inf:
        raise UsageError(f"order={order}: give a positive number")
    if not tokens_V.sum():
        raise DataError("no tokens were counted; count texts that are not empty")
    if len(tokens_V) == 1:
        return 0.0
    p = tokens_V[tokens_V > 0] / tokens_V.sum()
    entropy = -(p * np.log(p)).sum() if order == 1 else np.log((p**order).sum()) / (1 - order)
    return float(entropy) / math.log(len(tokens_V))


def _is_text(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
