"""Two small vocabularies, what the second has that the first lacks, and tables of rows."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from tersely.vocabulary.initialise import INITIALISERS, Gap, Initialiser, Tables
from tersely.vocabulary.initialise.cw2v import CW2V
from tersely.vocabulary.initialise.omp import OMP
from tersely.vocabulary.pieces import Pieces, read_pieces
from tersely.vocabulary.transplant import Transplant, find_gap, transplant
from tests.vocabularies import KINDS, text_of

D = 12
NEW = (
    "the quicker rivers flow wider than the slowest of the newer dogs, and the others gather their feathers together",
    "brown foxes jump quickly over the lazy rivers; newer rivers flow slowly over wider lands and lower hills",
    "quicker feathers and wider lands and quickly slowest foxes gather lower hills over the newer others",
)
COMPARED = [kind for kind in KINDS if "fix" not in kind]
SMALL: dict[type[Initialiser], Initialiser] = {
    CW2V: CW2V(rank=16, steps=4, batch=32),
    OMP: OMP(atoms=8),
}
METHODS = [SMALL.get(method, method()) for method in INITIALISERS]
CONVEX = [method for method in METHODS if method.convex]
named = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


@cache
def pieces(kind: str) -> Pieces:
    tokenizer = Tokenizer.from_str(text_of(kind))
    ids = tokenizer.get_vocab()
    return read_pieces(tokenizer, {"bos": ids["<s>"], "eos": ids["</s>"]})


@cache
def other(count: int = 420) -> Pieces:
    """A byte-level BPE of other texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=count,
        special_tokens=["[BOS]", "[EOS]", "[NEW]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*NEW] * 3, trainer)
    return read_pieces(tokenizer, {"bos": 0, "eos": 1})


@cache
def gap(kind: str = "byte-level") -> Gap:
    needs = {need for method in METHODS for need in method.needs}
    return find_gap(pieces(kind), other(), needs, texts=[*NEW] * 4)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tables(kind: str = "byte-level", *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Tables:
    rows = pieces(kind).rows
    return Tables((drawn(0, rows, D) + 0.2).to(dtype), None if tied else drawn(1, rows, D).to(dtype))


def donor() -> Tables:
    return Tables(drawn(2, other().rows, 20), drawn(3, other().rows, 20))


def moved(method: Initialiser, own: Gap | None = None, given: Tables | None = None, **rest: Any) -> Transplant:
    if "donor" in method.needs:
        rest.setdefault("donor", donor())
    return transplant(own or gap(), given or tables(), method, **rest)


def bpe(vocabulary: list[str], merges: list[tuple[str, str]]) -> Pieces:
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return read_pieces(tokenizer)
