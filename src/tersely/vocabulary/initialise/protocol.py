"""What gives rows to tokens that a model has none for.

Shapes: V rows of the old vocabulary, D coordinates, N tokens that lack a row, M rows of the new vocabulary, E
coordinates of a static vector, P weights of all rows together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from tersely.errors import UsageError
from tersely.vocabulary.pieces import Pieces

Need = Literal["token_vectors", "word_vectors", "alignments", "sequences", "donor"]
CHUNK_BYTES = 128 << 20
"""Of what is made from one chunk of rows."""


@dataclass(frozen=True, eq=False)
class Vectors:
    """A static vector for each token of a vocabulary, of length 1 or, where none is known, of length 0."""

    unit_VE: Tensor
    """float32."""

    @property
    def known_V(self) -> Tensor:
        """Whether a token has one."""
        return self.unit_VE.any(1)


@dataclass(frozen=True, eq=False)
class Gap:
    """The tokens of a new vocabulary for which an old one has no row, and what was found out about them."""

    old: Pieces
    new: Pieces
    match: Mapping[int, int]
    """New id -> old id, of the tokens that both have."""
    missing_N: Tensor
    """int64 ids of the new vocabulary, rising."""
    cuts: tuple[tuple[int, ...], ...]
    """For each of these the old ids into which the old tokenizer cuts it; () where it cannot."""
    token_vectors: Vectors | None = None
    """Of the new tokens, from a text cut into them."""
    word_vectors: tuple[Vectors, Vectors] | None = None
    """Of old and new tokens in one space."""
    alignments: tuple[Mapping[tuple[int, ...], int], ...] | None = None
    """For each missing token: old ids that stood in its place in a text -> how often."""
    sequences: tuple[Tensor, ...] | None = None
    """Texts in ids of the new vocabulary, int64."""


@dataclass(frozen=True, eq=False)
class Tables:
    """The rows of a model, any float dtype."""

    embedding_VD: Tensor
    head_VD: Tensor | None = None
    """None where the head is the embedding."""

    @property
    def output_VD(self) -> Tensor:
        """What gives the logits."""
        return self.embedding_VD if self.head_VD is None else self.head_VD


class Rule(Protocol):
    """How the missing rows come from those that are there. The same rule serves every matrix, a bias (V, 1) too."""

    @property
    def covered_N(self) -> Tensor:
        """Whether it has an answer for each token; bool."""
        ...

    def __call__(self, matrix_VD: Tensor) -> Tensor:
        """(N, D), float32; zeros for tokens that are not covered."""
        ...


@dataclass(frozen=True, eq=False)
class Rules:
    """One for the embedding and one for the head; often the same."""

    embedding: Rule
    head: Rule


class Initialiser(Protocol):
    """Finds the rules. A frozen dataclass of settings, pure: the same for the same seed."""

    name: ClassVar[str]
    convex: ClassVar[bool]
    """Each row is a mean of old rows with weights of 0 or more: no new token can then have a larger logit than all old
    ones, so that what a model with such a head writes greedily stays as it was."""

    @property
    def needs(self) -> frozenset[Need]:
        """What must be found out or given beforehand: fields of `Gap`, or "donor": the tables of a model that has the
        new vocabulary, by its ids."""
        ...

    def __call__(self, gap: Gap, tables: Tables, donor: Tables | None, seed: int) -> Rules: ...


@dataclass(frozen=True, eq=False)
class Weights:
    """Rows that are sums of old rows: row n = sum over p in [offsets[n], offsets[n + 1]) of weight[p] old[index[p]]."""

    offsets: Tensor
    """int64, (N + 1,)."""
    index_P: Tensor
    """int64, old ids."""
    weight_P: Tensor
    """float32."""

    @property
    def covered_N(self) -> Tensor:
        return self.offsets.diff() > 0

    def __call__(self, matrix_VD: Tensor) -> Tensor:
        """(N, D) in float32; beside it at most 128 MB are in use, or what one row needs."""
        count, columns = len(self.offsets) - 1, matrix_VD.shape[1]
        rows_ND = torch.zeros((count, columns))
        most = max(1, CHUNK_BYTES // (4 * columns))
        first = 0
        while first < count:
            room = int(self.offsets[first]) + most
            last = max(first + 1, int(torch.searchsorted(self.offsets, room, right=True)) - 1)
            part = slice(int(self.offsets[first]), int(self.offsets[last]))
            near, place = torch.unique(self.index_P[part], return_inverse=True)
            rows_ND[first:last] = torch.nn.functional.embedding_bag(
                place,
                matrix_VD[near].float() if len(near) else torch.zeros((1, columns)),
                self.offsets[first:last] - self.offsets[first],
                mode="sum",
                per_sample_weights=self.weight_P[part],
            )
            first = last
        return rows_ND


def weights(rows: Sequence[Mapping[int, float]]) -> Rules:
    """One mapping old id -> weight for each missing token, empty for one that is not covered; for both tables."""
    lengths = torch.tensor([0, *map(len, rows)])
    index = torch.tensor([i for row in rows for i in row], dtype=torch.int64)
    weight = torch.tensor([w for row in rows for w in row.values()], dtype=torch.float32)
    return both(Weights(lengths.cumsum(0), index, weight))


def both(rule: Rule) -> Rules:
    """The same rule for embedding and head."""
    return Rules(rule, rule)


def known_ids(pieces: Pieces, vectors: Vectors) -> Tensor:
    """Ids of the tokens, special ones left out, that have a vector; int64, rising."""
    known = vectors.known_V.tolist()
    found = [i for i, piece in sorted(pieces.by_id.items()) if not piece.special and known[i]]
    return torch.tensor(found, dtype=torch.int64)


def uniform(ids: Sequence[int]) -> dict[int, float]:
    """The mean over ids, of which one may come twice."""
    share: dict[int, float] = {}
    for i in ids:
        share[i] = share.get(i, 0.0) + 1 / len(ids)
    return share


def blend(parts: Sequence[tuple[float, Mapping[int, float]]]) -> dict[int, float]:
    """The sum of rows of weights, each times its share."""
    total: dict[int, float] = {}
    for share, row in parts:
        for i, weight in row.items():
            total[i] = total.get(i, 0.0) + share * weight
    return total


def nearest(query_NE: Tensor, key_VE: Tensor, count: int, temperature: float) -> tuple[Tensor, Tensor]:
    """For each query the `count` nearest of unit vectors by cosine, (N, count): softmax(cosine / temperature), places.

    Uses at most 128 MB beside the result, or what one query needs.
    """
    count = min(count, len(key_VE))
    weight = torch.empty((len(query_NE), count))
    place = torch.empty((len(query_NE), count), dtype=torch.int64)
    step = max(1, CHUNK_BYTES // (4 * max(1, len(key_VE))))
    for first in range(0, len(query_NE), step):
        cosine, place[first : first + step] = (query_NE[first : first + step] @ key_VE.t()).topk(count)
        weight[first : first + step] = (cosine / temperature).softmax(1)
    return weight, place


def moments(matrix_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each coordinate over rows, (D,) in float64."""
    step = max(1, CHUNK_BYTES // (8 * matrix_VD.shape[1]))
    mean_D = torch.stack([part.double().sum(0) for part in torch.split(matrix_VD, step)]).sum(0) / len(matrix_VD)
    squares = torch.stack([(part.double() - mean_D).square().sum(0) for part in torch.split(matrix_VD, step)])
    return mean_D, (squares.sum(0) / max(1, len(matrix_VD) - 1)).sqrt()


def positive(settings: Mapping[str, float]) -> None:
    """UsageError: one of them is not above 0."""
    for name, value in settings.items():
        if not value > 0:
            raise UsageError(f"{name}={value:g}: expected more than 0")
