"""Two models' tokens, matched by their text.

C = tokens that both vocabularies have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tersely.calibrate import Sequences
from tersely.errors import DataError
from tersely.runtime import Loaded


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens that both models know: column i of `model_C` is the token of column i of `base_C`; None: all."""

    model_C: Tensor | None
    base_C: Tensor | None
    shared: int


def match(models: Sequence[Loaded], tokenized: Sequence[Sequences]) -> tuple[Vocabulary, dict[int, Tensor] | None]:
    """The tokens in common, and the base's ids of the sequences that both cut alike; None where they are the same.

    DataError: none is cut alike, and they are no documents either, of which losses could be compared by the byte.
    """
    if len(models) < 2:
        return Vocabulary(None, None, 0), None
    sizes = [int(model.network.config.get_text_config().vocab_size) for model in models]
    if sizes[0] == sizes[1] and len(tokenized) == 1:
        return Vocabulary(None, None, sizes[0]), None
    words = [model.tokenizer.get_vocab() for model in models]
    mine, base = tokenized[0], tokenized[-1]
    alike = len(mine.ids) == len(base.ids) and all(map(torch.equal, mine.ids, base.ids))
    if sizes[0] == sizes[1] and (words[0] == words[1] or alike):
        if alike:
            return Vocabulary(None, None, sizes[0]), None
        return _unlike(models, tokenized, "cut this text differently")
    both = sorted((i, words[1][word]) for word, i in words[0].items() if word in words[1])
    pairs = [(i, j) for i, j in both if i < sizes[0] and j < sizes[1]]
    if not pairs:
        return _unlike(models, tokenized, "share no token")
    model_C, base_C = torch.tensor(pairs).T.contiguous()
    table = torch.full((max(sizes[0], int(max(map(int, (ids.max() for ids in mine.ids)))) + 1),), -1)
    table[model_C] = base_C
    ids = {
        i: theirs
        for i, (own, theirs) in enumerate(zip(mine.ids, base.ids, strict=False))
        if torch.equal(table[own], theirs)
    }
    if not ids:
        what = f"share {len(pairs)} tokens, but cut no {mine.kind.removesuffix('s')} of this text alike"
        return _unlike(models, tokenized, what)
    return Vocabulary(model_C, base_C, len(pairs)), ids


def _unlike(
    models: Sequence[Loaded], tokenized: Sequence[Sequences], what: str
) -> tuple[Vocabulary, dict[int, Tensor] | None]:
    """No sequence that both cut alike."""
    mine, base = tokenized[0], tokenized[-1]
    if mine.kind != "documents" or len(mine.ids) != len(base.ids):
        raise DataError(
            f"the tokenizers of {models[0].name} and {models[1].name} {what}: predictions cannot be compared token by "
            "token, and windows not by the byte; give a text of documents (separated by <|endoftext|> lines)"
        )
    return Vocabulary(None, None, 0), {}
