"""The pieces of a token and its nearest neighbours, by what they mean and how long they are.

Shapes: N missing tokens, E coordinates of a static vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tersely.errors import UsageError
from tersely.vocabulary.initialise.protocol import (
    Gap,
    Need,
    Rules,
    Tables,
    blend,
    known_ids,
    nearest,
    positive,
    weights,
)

_EPSILON = 1e-5


@dataclass(frozen=True)
class TokenAdapt:
    """TokenAdapt's hybrid (Sharma and aloobun, 2025, arXiv 2505.09738).

    local:  w = softmax((softmax(cos(u_t, u_i)) + bytes_i / bytes_t) / 2 / temperature) over the old pieces of t
    global: w = softmax(cos(u_t, u_j) / temperature) over the 3 most similar old tokens, but those under `threshold`
    row(t) = (1 - share) * local + share * global, or the one there is

    The authors' vectors u are those of a text-embedding model; here they are static vectors of words (or those that
    you give). A piece that has none counts by its length alone. Lengths are in bytes, so that pieces of one character
    have theirs.
    """

    share: float = 0.3
    temperature: float = 0.3
    neighbours: int = 3
    threshold: float = 0.0
    name: ClassVar[str] = "token_adapt"
    convex: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive({"neighbours": self.neighbours, "temperature": self.temperature})
        if not 0 <= self.share <= 1:
            raise UsageError(f"share={self.share:g}: the weight of the neighbours; expected 0 to 1")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"word_vectors"})

    def __call__(self, gap: Gap, tables: Tables, donor: Tables | None, seed: int) -> Rules:  # noqa: ARG002 (protocol)
        pieces, neighbours = self._pieces(gap), self._neighbours(gap)
        rows = []
        for local, around in zip(pieces, neighbours, strict=True):
            share = self.share if local and around else float(bool(around))
            rows.append({i: w for i, w in blend([(1 - share, local), (share, around)]).items() if w})
        return weights(rows)

    def _pieces(self, gap: Gap) -> list[dict[int, float]]:
        assert gap.word_vectors is not None
        old, new = gap.word_vectors
        found: list[dict[int, float]] = []
        for i, cut in zip(gap.missing_N.tolist(), gap.cuts, strict=True):
            if not cut:
                found.append({})
                continue
            cosine = old.unit_VE[list(cut)] @ new.unit_VE[i]
            length = torch.tensor([float(len(gap.old.by_id[piece].data)) for piece in cut])
            score = (cosine.softmax(0) + length / length.sum()) / 2
            own = (score / (self.temperature + _EPSILON)).softmax(0)
            found.append(blend([(weight, {piece: 1.0}) for weight, piece in zip(own.tolist(), cut, strict=True)]))
        return found

    def _neighbours(self, gap: Gap) -> list[dict[int, float]]:
        assert gap.word_vectors is not None
        old, new = gap.word_vectors
        found: list[dict[int, float]] = [{} for _ in gap.cuts]
        known = known_ids(gap.old, old)
        asked = new.known_V[gap.missing_N].nonzero()[:, 0]
        if not len(known) or not len(asked):
            return found
        query_NE = new.unit_VE[gap.missing_N[asked]]
        weight, place = nearest(query_NE, old.unit_VE[known], self.neighbours, self.temperature + _EPSILON)
        cosine = (query_NE[:, None] * old.unit_VE[known[place]]).sum(-1)
        weight = torch.where(cosine < self.threshold, 0.0, weight)
        weight /= weight.sum(1, keepdim=True).clamp(min=1e-30)
        for n, ids, own in zip(asked.tolist(), known[place].tolist(), weight.tolist(), strict=True):
            found[n] = {i: w for i, w in zip(ids, own, strict=True) if w > 0}
        return found
