"""Tokens that both vocabularies have, mixed by how alike they are to a new one.

Shapes: N missing tokens, S tokens that both have, E coordinates of a static vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersely.errors import UsageError
from tersely.vocabulary.initialise.protocol import CHUNK_BYTES, Gap, Need, Rules, Tables, Weights, both


@dataclass(frozen=True)
class Focus:
    """FOCUS: few, similar neighbours (Dobler and de Melo, EMNLP 2023, arXiv 2305.14481).

    row(t) = sum over shared tokens j of w_j row(j),    w = sparsemax(cos(u_t, u_j) over j)

    with u static vectors of the new tokens, learnt from a text cut into them. Tokens too rare there have no row by it.
    """

    name: ClassVar[str] = "focus"
    convex: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"token_vectors"})

    def __call__(self, gap: Gap, tables: Tables, donor: Tables | None, seed: int) -> Rules:  # noqa: ARG002 (protocol)
        """UsageError: no shared token has a vector."""
        assert gap.token_vectors is not None
        unit_VE, known_V = gap.token_vectors.unit_VE, gap.token_vectors.known_V
        shared = torch.tensor([pair for pair in gap.match.items() if known_V[pair[0]]], dtype=torch.int64).view(-1, 2)
        asked = gap.missing_N[known_V[gap.missing_N]]
        lengths_N = torch.zeros(len(gap.missing_N), dtype=torch.int64)
        index: list[Tensor] = []
        weight: list[Tensor] = []
        if len(gap.missing_N) and not len(shared):
            raise UsageError("focus mixes tokens that both vocabularies have, and the text has none; use mean")
        if len(shared):
            key_SE, places = unit_VE[shared[:, 0]], torch.searchsorted(gap.missing_N, asked)
            step = max(1, CHUNK_BYTES // (8 * len(shared)))
            for first in range(0, len(asked), step):
                share, place = sparsemax(unit_VE[asked[first : first + step]] @ key_SE.t())
                lengths_N[places[first : first + step]] = (share > 0).sum(1)
                index.append(shared[:, 1][place[share > 0]])
                weight.append(share[share > 0])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths_N.cumsum(0)])
        none = torch.empty(0, dtype=torch.int64)
        return both(Weights(offsets, torch.cat([none, *index]), torch.cat([none.float(), *weight])))


def sparsemax(score_NS: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest point of the simplex: max(score - tau, 0) with tau such that each row sums to 1.

    As the largest shares of each row, falling, and their places, (N, K) with K large enough for all that are not 0
    (Martins and Astudillo, ICML 2016).
    """
    most = score_NS.shape[1]
    kept = min(64, most)
    while True:
        top_NK, place_NK = score_NS.topk(kept)
        count_K = torch.arange(1, kept + 1)
        total_NK = top_NK.cumsum(1)
        within = 1 + count_K * top_NK > total_NK
        if kept == most or not bool(within[:, -1].any()):
            break
        kept = min(4 * kept, most)
    size_N = within.sum(1, keepdim=True)
    tau_N1 = (total_NK.gather(1, size_N - 1) - 1) / size_N
    return (top_NK - tau_N1).clamp(min=0), place_NK
