"""Mixtures of all old rows, trained so that words that stand together fit together.

Shapes: V old rows, D coordinates, N missing tokens, U of them in a batch, R rank of the mixtures, T tokens of a text,
M rows of the new vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from tersely.errors import DataError, UsageError
from tersely.vocabulary.initialise.protocol import CHUNK_BYTES, Gap, Need, Rules, Tables, positive


@dataclass(frozen=True)
class CW2V:
    """Constrained word2vec: new rows within the convex hull of the old ones (Mundra et al., CoNLL 2024).

    rows = softmax(A1 A2) old_rows, with one pair of factors for the embedding and one for the head

    Only the factors are trained, by skip-gram with negative sampling on a text in the new tokens: the embedding of a
    token should fit the head of a token near it, and not that of `negatives` drawn by count^0.75. The authors begin
    with factors that are uniform in (0, 1), which is nearly the mean of all rows; here the mixtures begin with what is
    most alike to the old pieces of a token, the more so the larger `start`; 0 is the mean of all.

    Each step takes 6 U V (R + D) operations, so a large vocabulary wants a small rank and few steps.
    """

    rank: int = 1024
    steps: int = 200
    batch: int = 512
    window: int = 5
    negatives: int = 5
    learning_rate: float = 3e-4
    start: float = 3.0
    name: ClassVar[str] = "cw2v"
    convex: ClassVar[bool] = True

    def __post_init__(self) -> None:
        whole = ("rank", "batch", "window", "negatives", "learning_rate")
        positive({name: getattr(self, name) for name in whole})
        if self.steps < 0 or not self.start >= 0:
            raise UsageError(f"steps={self.steps}, start={self.start:g}: expected 0 or more")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"sequences"})

    def __call__(self, gap: Gap, tables: Tables, donor: Tables | None, seed: int) -> Rules:  # noqa: ARG002 (protocol)
        """DataError: no token of the text has a neighbour within the window."""
        assert gap.sequences is not None
        generator = torch.Generator().manual_seed(seed)
        embedding = _begun(gap, tables.embedding_VD, self.rank, self.start, generator)
        output = embedding if tables.head_VD is None else _begun(gap, tables.head_VD, self.rank, self.start, generator)
        mixtures = [embedding] if output is embedding else [embedding, output]
        text = _Text.read(gap.sequences, gap.new.rows)
        factors = [factor.requires_grad_() for own in mixtures for factor in (own.first_NR, own.second_RV)]
        optimizer = torch.optim.Adam(factors, lr=self.learning_rate)
        for _ in range(self.steps if len(gap.missing_N) else 0):
            centre_B, near_B = text.pairs(self.batch, self.window, generator)
            away_BG = text.drawn((self.batch, self.negatives), generator)
            centre_B1D = _rows(gap, tables.embedding_VD, embedding, centre_B)[:, None]
            other_BGD = _rows(gap, tables.output_VD, output, torch.cat([near_B[:, None], away_BG], 1))
            score_BG = (centre_B1D * other_BGD).sum(-1)
            loss = -(logsigmoid(score_BG[:, 0]) + logsigmoid(-score_BG[:, 1:]).sum(1)).mean()
            optimizer.zero_grad()
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        seen_N = text.count_M[gap.missing_N] > 0
        covered_N = seen_N | torch.tensor([bool(cut) for cut in gap.cuts], dtype=torch.bool)
        found = [Mixture(own.first_NR.detach(), own.second_RV.detach(), covered_N) for own in mixtures]
        return Rules(found[0], found[-1])


@dataclass(frozen=True, eq=False)
class Mixture:
    """Row-stochastic weights as the softmax of a product of two factors."""

    first_NR: Tensor
    second_RV: Tensor
    covered_N: Tensor

    def share_NV(self, first: int, last: int) -> Tensor:
        """The weights of some of the rows, (last - first, V)."""
        return (self.first_NR[first:last] @ self.second_RV).softmax(1)

    def __call__(self, matrix_VD: Tensor) -> Tensor:
        """Uses 128 MB beside the result and one float32 copy of the matrix."""
        matrix, count = matrix_VD.float(), len(self.first_NR)
        step = max(1, CHUNK_BYTES // (8 * len(matrix)))
        parts = [self.share_NV(first, first + step) @ matrix for first in range(0, count, step)]
        rows_ND = torch.cat(parts) if parts else torch.zeros((0, matrix.shape[1]))
        return rows_ND * self.covered_N[:, None]


@dataclass(frozen=True, eq=False)
class _Text:
    """Sequences one after the other."""

    ids_T: Tensor
    sequence_T: Tensor
    kept_T: Tensor
    """Running sum of how often a place is taken: a token is taken by the root of its count."""
    count_M: Tensor
    drawn_M: Tensor
    """Running sum of count^0.75."""

    @staticmethod
    def read(sequences: Sequence[Tensor], rows: int) -> _Text:
        long = [ids for ids in sequences if len(ids) > 1]
        if not long:
            raise DataError("cw2v learns from tokens that stand together, but no text has two; give more text")
        ids_T = torch.cat(long)
        sequence_T = torch.repeat_interleave(torch.arange(len(long)), torch.tensor([len(ids) for ids in long]))
        count_M = torch.bincount(ids_T, minlength=rows)
        kept_T = count_M[ids_T].double().rsqrt().cumsum(0)
        return _Text(ids_T, sequence_T, kept_T, count_M, count_M.double().pow(0.75).cumsum(0))

    def pairs(self, count: int, window: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens, and one that stands at most so far from each, in the same sequence."""
        centre = _draw(self.kept_T, (count,), generator)
        distance = torch.randint(1, window + 1, (count,), generator=generator)
        distance = torch.where(torch.rand(count, generator=generator) < 0.5, -distance, distance)
        near = (centre + distance).clamp(0, len(self.ids_T) - 1)
        # Beyond the ends of its sequence: the token next to it, on the side where there is one.
        outside = (self.sequence_T[near] != self.sequence_T[centre]) | (near == centre)
        after = (centre + 1).clamp(max=len(self.ids_T) - 1)
        beside = torch.where((self.sequence_T[after] == self.sequence_T[centre]) & (after > centre), after, centre - 1)
        near = torch.where(outside, beside, near)
        return self.ids_T[centre], self.ids_T[near]

    def drawn(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        return _draw(self.drawn_M, shape, generator)


def _draw(running: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Places by their share of a running sum."""
    at = torch.rand(shape, generator=generator, dtype=torch.float64) * running[-1]
    return torch.searchsorted(running, at, right=True).clamp(max=len(running) - 1)


def _begun(gap: Gap, matrix_VD: Tensor, rank: int, start: float, generator: torch.Generator) -> Mixture:
    """Scores that are near start * cosine between the mean old piece of a token and each old row."""
    unit_VD = matrix_VD.float()
    unit_VD = normalize(unit_VD - unit_VD.mean(0))
    kept = min(rank, unit_VD.shape[1])
    directions_DR = torch.linalg.eigh(unit_VD.t() @ unit_VD).eigenvectors[:, -kept:]
    second_RV = torch.zeros((rank, len(unit_VD)))
    second_RV[:kept] = (unit_VD @ directions_DR).t()
    second_RV[kept:].normal_(0, rank**-0.5, generator=generator)
    first_NR = torch.zeros((len(gap.cuts), rank))
    for n, cut in enumerate(gap.cuts):
        if cut:
            first_NR[n, :kept] = start * normalize(second_RV[:kept, list(cut)].mean(1), dim=0)
    return Mixture(first_NR, second_RV, torch.ones(len(gap.cuts), dtype=torch.bool))


def _rows(gap: Gap, matrix_VD: Tensor, mixture: Mixture, ids: Tensor) -> Tensor:
    """Rows of tokens of the new vocabulary: old ones, or mixtures with gradients to their factors."""
    distinct_U, place = torch.unique(ids, return_inverse=True)
    at = torch.searchsorted(gap.missing_N, distinct_U).clamp(max=max(0, len(gap.missing_N) - 1))
    missing_U = gap.missing_N[at] == distinct_U if len(gap.missing_N) else torch.zeros_like(distinct_U).bool()
    old = torch.tensor([gap.match[i] for i in distinct_U[~missing_U].tolist()], dtype=torch.int64)
    rows_UD = torch.zeros((len(distinct_U), matrix_VD.shape[1]))
    rows_UD = rows_UD.index_copy(0, (~missing_U).nonzero()[:, 0], matrix_VD[old].float())
    if bool(missing_U.any()):
        mixed = (mixture.first_NR[at[missing_U]] @ mixture.second_RV).softmax(1) @ matrix_VD.float()
        rows_UD = rows_UD.index_copy(0, missing_U.nonzero()[:, 0], mixed)
    return rows_UD[place]
