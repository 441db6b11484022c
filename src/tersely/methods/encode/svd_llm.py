"""SVD-LLM: two thin factors in place of a weight, truncated by what its outputs lose (Wang et al., ICLR 2025,
arXiv 2403.07378).

Shapes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from tersely.codecs import Encoded, Form
from tersely.codecs.low_rank import Factors
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.encode.aser import square_root
from tersely.methods.encode.projection import check_ratio, project, project_rows, projection_work, thin_form
from tersely.methods.protocol import Work


@dataclass(frozen=True)
class SVDLLM:
    """The best approximation of low rank on the calibration activations.

    W_hat = B A,    B A = the matrix of rank R that is nearest to W in ||(W - W_hat) X||

    R = floor((1 - ratio) O I / (O + I)). With S S^T = X X^T (Cholesky, float64, damped) and W S = U diag(sigma) V^T,
    B A = U_R U_R^T W, and what is lost is sqrt(sum of sigma_i^2 beyond R). The activations are those of the model whose
    blocks before are factors already. The paper's update of B by least squares is left out: on the same activations
    the truncation is optimal as it is, and nothing would change.
    """

    name: ClassVar[str] = "svd_llm"
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    row_wise: ClassVar[bool] = False
    keeps_zeros: ClassVar[bool] = False

    ratio: float = 0.2
    """Share of the weight's parameters that is removed."""
    multiple: int = 1
    """The rank is rounded down to a multiple of it, where it is at least that."""
    factors: Factors = "plain"
    """How the factors are stored: in the weight's dtype, or "mxint8", 8 bits with an exponent per block of 16."""
    damping: float = 1e-5
    """Added to the diagonal of the Gram matrix, relative to its mean."""

    def __post_init__(self) -> None:
        check_ratio(self.ratio, self.multiple, self.factors)
        if not 0 < self.damping <= 1:
            raise UsageError(f"damping={self.damping}: expected more than 0 and at most 1 (1e-5 is usual)")

    def check(self, columns: int) -> None:
        pass

    def forms(self, rows: int, columns: int) -> tuple[Form, ...]:
        return (thin_form(rows, columns, self.ratio, self.multiple, self.factors),)

    def work(self, rows: int, columns: int) -> Work:
        work = projection_work(rows, columns)
        root = columns**3 / 3 + 2.0 * rows * columns**2
        return replace(work, flops=work.flops + root, memory=work.memory + 16 * columns**2)

    def __call__(self, weight_OI: Tensor, stats: Statistics) -> Encoded:
        form = thin_form(len(weight_OI), stats.columns, self.ratio, self.multiple, self.factors)
        if stats.reads_O is not None:
            # The inputs of a table have one 1 each: their Gram matrix is diagonal, and no row may be given up.
            return Encoded((project_rows(weight_OI, (stats.reads_O.double() + 1).sqrt(), form),))
        root = None if stats.gram_II is None or not stats.tokens else square_root(stats.gram_II, self.damping)
        note, weighted_OI = "", weight_OI.double()
        if root is None:
            lacks = "the Gram matrix has no Cholesky factor with damping up to 1" if stats.tokens else "no tokens"
            note = f"{lacks}: truncated by the error of the weight, not of its outputs"
        else:
            lower_II, damping = root
            weighted_OI = weighted_OI @ lower_II
            if damping > self.damping:
                note = f"damping raised to {damping:g}"
            if stats.tokens < stats.columns:
                few = f"{stats.tokens} tokens for {stats.columns} inputs"
                note = f"{few}: directions without any count by damping alone"
        return Encoded((project(weight_OI, weighted_OI, form),), note)
