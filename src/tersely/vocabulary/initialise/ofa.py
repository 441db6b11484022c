"""Old tokens mixed by how alike the words are that they stand in, of every language that the vectors know.

Shapes: V old rows, N missing tokens, D coordinates, R rank, E coordinates of a static vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersely.codecs.low_rank import LowRank, LowRankForm, factorized
from tersely.errors import UsageError
from tersely.vocabulary.initialise.protocol import Gap, Need, Rules, Tables, Weights, both, known_ids, nearest, positive


@dataclass(frozen=True)
class OFA:
    """One for all (Liu et al., NAACL 2024 Findings, arXiv 2311.08849).

    row(t) = sum over the 10 most similar old tokens j of w_j row(j),    w = softmax(cos(u_t, u_j) / temperature)

    with u the mean vector of the words in which a token stands. Weights do not change when the rows are factorised, so
    the coordinates of new tokens are the same sums of old coordinates: `factors`.
    """

    neighbours: int = 10
    temperature: float = 0.1
    name: ClassVar[str] = "ofa"
    convex: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive({"neighbours": self.neighbours, "temperature": self.temperature})

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"word_vectors"})

    def __call__(self, gap: Gap, tables: Tables, donor: Tables | None, seed: int) -> Rules:  # noqa: ARG002 (protocol)
        """UsageError: no old token has a vector."""
        assert gap.word_vectors is not None
        old, new = gap.word_vectors
        known = known_ids(gap.old, old)
        if len(gap.missing_N) and not len(known):
            raise UsageError("ofa mixes old tokens that stand in words with a vector, and none does; give more text")
        covered = new.known_V[gap.missing_N]
        query_NE = new.unit_VE[gap.missing_N[covered]]
        weight, place = nearest(query_NE, old.unit_VE[known], self.neighbours, self.temperature)
        lengths = torch.cat([torch.zeros(1, dtype=torch.int64), covered.long() * weight.shape[1]])
        return both(Weights(lengths.cumsum(0), known[place].flatten(), weight.flatten()))


def primitives(rows_VD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Coordinates (V, R) and primitives (R, D) with the nearest product of this rank: U_R and Sigma_R V_R^T, float32.

    UsageError: no such rank.
    """
    if not 1 <= rank <= min(rows_VD.shape):
        raise UsageError(f"rank={rank}: rows of shape {list(rows_VD.shape)} have ranks 1 to {min(rows_VD.shape)}")
    # The right vectors from the small Gram matrix; the left ones need no division by small singular values.
    gram_DD = torch.zeros((rows_VD.shape[1],) * 2, dtype=torch.float64)
    for part in torch.split(rows_VD, 8192):
        gram_DD.addmm_(part.double().t(), part.double())
    right_DR = torch.linalg.eigh(gram_DD).eigenvectors[:, -rank:].flip(1)
    projected_VR = torch.cat([part.double() @ right_DR for part in torch.split(rows_VD, 8192)])
    coordinates_VR, mix_RR = torch.linalg.qr(projected_VR)
    return coordinates_VR.float(), (mix_RR @ right_DR.t()).float()


def factors(rows_VD: Tensor, rank: int) -> LowRank:
    """The rows of a vocabulary as two factors, in the form in which a table is stored and runs as `coordinates[id] @
    primitives`, unformed (`quant_method: "tersely"`); `decode` multiplies them out for a stock checkpoint."""
    coordinates_VR, primitives_RD = primitives(rows_VD, rank)
    return factorized(coordinates_VR, primitives_RD, LowRankForm(rank, "plain", "quantized"), rows_VD.dtype)
