"""A weight as two thin factors: projected on the directions in which its outputs are largest.

For any S with W S = U diag(sigma) V^T, the matrix of rank R that is nearest to W in ||(W - W_hat) S|| is

    W_hat = U_R U_R^T W = b a,    b = U_R (O, R),  a = U_R^T W (R, I)

and what it leaves is sqrt(sum of sigma_i^2 beyond R). S is never inverted.

Shapes: O outputs, I inputs, R rank; M, N any matrix.
"""

from __future__ import annotations

from math import floor

import torch
from torch import Tensor

from tersely.codecs.low_rank import Factors, LowRank, LowRankForm, check_low_rank, factorized
from tersely.errors import UsageError
from tersely.methods.protocol import Work


def check_ratio(ratio: float, multiple: int, factors: str) -> None:
    """UsageError for settings that do not exist."""
    if not 0 < ratio < 1:
        raise UsageError(f"ratio={ratio:g}: the share of the parameters that is removed; expected more than 0, below 1")
    if multiple < 1:
        raise UsageError(f"multiple={multiple}: expected 1 (any rank) or more")
    check_low_rank(1, factors, "quantized")


def thin_form(rows: int, columns: int, ratio: float, multiple: int, factors: Factors) -> LowRankForm:
    """Of the largest rank R with R (O + I) <= (1 - ratio) O I, a multiple of `multiple` where it is at least that.

    UsageError: there is none.
    """
    # Rounded first: 1 - 0.9 is a little less than 0.1.
    rank = floor(round((1 - ratio) * rows * columns / (rows + columns), 9))
    if rank < 1:
        raise UsageError(
            f"ratio={ratio:g}: two factors of a weight of {rows} x {columns} are not smaller at any rank; leave it out "
            "of `where`, or remove less"
        )
    return LowRankForm(rank if rank < multiple else rank - rank % multiple, factors, "quantized")


def project(weight_OI: Tensor, weighted_OI: Tensor, form: LowRankForm) -> LowRank:
    """The factors for W, given W S in float64."""
    b_OR = leading(weighted_OI, form.rank)
    return factorized(b_OR, b_OR.t() @ weight_OI.double(), form, weight_OI.dtype)


def project_rows(weight_OI: Tensor, scale_O: Tensor, form: LowRankForm) -> LowRank:
    """The factors for a table: b a is nearest to W in ||diag(scale) (W - b a)||, scale in float64."""
    v_IR = leading((weight_OI.double() * scale_O[:, None]).t(), form.rank)
    return factorized(weight_OI.double() @ v_IR, v_IR.t(), form, weight_OI.dtype)


def leading(matrix_MN: Tensor, rank: int) -> Tensor:
    """The first `rank` left singular vectors, (M, R), those of the largest singular values first."""
    rows, columns = matrix_MN.shape
    if rows <= columns:
        return _largest(matrix_MN @ matrix_MN.t(), rank)
    left_MR: Tensor = torch.linalg.qr(matrix_MN @ _largest(matrix_MN.t() @ matrix_MN, rank)).Q
    return left_MR


def projection_work(rows: int, columns: int) -> Work:
    """Of `project`."""
    least, most = sorted((rows, columns))
    return Work(flops=4.0 * most * least**2 + 12.0 * least**3, passes=6, memory=24 * rows * columns + 24 * least**2)


def _largest(symmetric_NN: Tensor, rank: int) -> Tensor:
    """Its eigenvectors (N, R) with the largest eigenvalues, falling."""
    vectors_NN: Tensor = torch.linalg.eigh(symmetric_NN).eigenvectors
    return vectors_NN[:, -rank:].flip(1)
