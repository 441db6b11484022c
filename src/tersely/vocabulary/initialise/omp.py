"""A new token as few shared ones in a donor model that has it, and the same sum in this model.

Shapes: N missing tokens, B of them at a time, S tokens that both vocabularies have, D coordinates of the donor, K
atoms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersely.errors import UsageError
from tersely.vocabulary.initialise.protocol import CHUNK_BYTES, Gap, Need, Rules, Tables, Weights

_SMALLEST = 1e-5
"""Of a length, over what it was: less is rounding."""


@dataclass(frozen=True)
class OMP:
    """Orthogonal matching pursuit (Goddard and Fernandes Neto, 2025, arXiv 2506.06607; mergekit-tokensurgeon).

    With y the donor's row of t, of all shared tokens take the one whose donor's row has the largest |dot product| with
    what is left of y, fit y by all that were taken, and again, `atoms` times:

    row(t) = sum over taken j of c_j row(j),    c = argmin ||y - sum over taken j of c_j donor_row(j)||

    Embedding and head by themselves. The weights may be negative or above 1, so a new token's logit may be larger than
    every old one's. Needs no text, but a model that was trained with the new tokenizer. Takes 2 N S D K operations.
    """

    atoms: int = 64
    name: ClassVar[str] = "omp"
    convex: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.atoms < 1:
            raise UsageError(f"atoms={self.atoms}: expected 1 or more")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"donor"})

    def __call__(self, gap: Gap, tables: Tables, donor: Tables | None, seed: int) -> Rules:  # noqa: ARG002 (protocol)
        """UsageError: fewer shared tokens than atoms. Tokens that the donor has no row for are not covered."""
        assert donor is not None
        embedding = self._rule(gap, donor.embedding_VD)
        return Rules(embedding, embedding if tables.head_VD is None else self._rule(gap, donor.output_VD))

    def _rule(self, gap: Gap, rows_MD: Tensor) -> Weights:
        shared = torch.tensor([pair for pair in sorted(gap.match.items()) if pair[0] < len(rows_MD)]).view(-1, 2)
        if len(shared) < self.atoms:
            raise UsageError(
                f"atoms={self.atoms}, but model and donor share only {len(shared)} tokens; use at most as many atoms"
            )
        asked = gap.missing_N[gap.missing_N < len(rows_MD)]
        place_NK, weight_NK = pursue(rows_MD[asked], rows_MD[shared[:, 0]], self.atoms)
        taken_NK = weight_NK != 0
        lengths = torch.zeros(len(gap.missing_N) + 1, dtype=torch.int64)
        lengths[1 : len(asked) + 1] = taken_NK.sum(1)
        return Weights(lengths.cumsum(0), shared[:, 1][place_NK[taken_NK]], weight_NK[taken_NK])


def pursue(wanted_ND: Tensor, atoms_SD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Places and weights, (N, K), of the atoms whose sum comes nearest to each wanted row; weight 0 where fewer do.

    Uses at most 128 MB beside float32 atoms and the result.
    """
    atoms = atoms_SD.float()
    a_row = 4 * (2 * len(atoms) + (count + 4) * atoms.shape[1] + 3 * count**2)
    found = [_batch(part.float(), atoms, count) for part in torch.split(wanted_ND, max(1, CHUNK_BYTES // a_row))]
    return torch.cat([place for place, _ in found]), torch.cat([weight for _, weight in found])


def _batch(wanted_BD: Tensor, atoms_SD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    size, columns = wanted_BD.shape
    line = torch.arange(size)
    basis_BKD = torch.zeros((size, count, columns))
    upper_BKK = torch.eye(count).repeat(size, 1, 1)
    place_BK = torch.zeros((size, count), dtype=torch.int64)
    left_BD, length_B = wanted_BD.clone(), wanted_BD.norm(dim=1)
    for k in range(count):
        fit_BS = (left_BD @ atoms_SD.t()).abs_()
        fit_BS.scatter_(1, place_BK[:, :k], -1.0)
        place_BK[:, k] = fit_BS.argmax(1)
        atom_BD = atoms_SD[place_BK[:, k]]
        before_BKD = basis_BKD[:, :k]
        along_BK = torch.einsum("bkd,bd->bk", before_BKD, atom_BD)
        away_BD = atom_BD - torch.einsum("bk,bkd->bd", along_BK, before_BKD)
        again_BK = torch.einsum("bkd,bd->bk", before_BKD, away_BD)
        away_BD -= torch.einsum("bk,bkd->bd", again_BK, before_BKD)
        long_B = away_BD.norm(dim=1)
        # What is fitted already takes no more, and an atom that is a sum of those before adds nothing.
        useful_B = (left_BD.norm(dim=1) > _SMALLEST * length_B) & (long_B > _SMALLEST * atom_BD.norm(dim=1))
        basis_BKD[:, k] = torch.where(useful_B[:, None], away_BD / long_B[:, None].clamp(min=1e-30), 0.0)
        upper_BKK[:, :k, k] = torch.where(useful_B[:, None], along_BK + again_BK, 0.0)
        upper_BKK[line, k, k] = torch.where(useful_B, long_B, 1.0)
        left_BD -= basis_BKD[:, k] * (basis_BKD[:, k] * left_BD).sum(1, keepdim=True)
        if not bool(useful_B.any()):
            break
    right_BK = torch.einsum("bkd,bd->bk", basis_BKD, wanted_BD)
    weight_BK1 = torch.linalg.solve_triangular(upper_BKK.double(), right_BK.double()[:, :, None], upper=True)
    return place_BK, weight_BK1[:, :, 0].float()
