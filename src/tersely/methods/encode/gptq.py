"""GPTQ: rounding with second-order error compensation (Frantar et al., ICLR 2023, arXiv 2210.17323).

Shapes: O outputs, I inputs, G groups per row; a leading I means that the layout is transposed (inputs first), in which
one column of the weight is contiguous.

The loop is the equivalent form of the sweep that needs no inverse ("LDLQ" of QuIP, arXiv 2307.13304, which
proves the two equal). With H = X X^T + damping and its factor H = R R^T, R upper triangular,

    tr(D H D^T) = sum_k R_kk^2 |d_k + sum_{j<k} d_j R_jk / R_kk|^2,   D = W - W_hat,

so column k is rounded after the errors of the columns before it are added, weighted by R_jk / R_kk. One Cholesky
factorization replaces factorization, inversion and a second factorization.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersely.codecs import Encoded
from tersely.codecs.integer import Clip, Integers, check_grid, check_group, fit_grid, round_to_grid
from tersely.errors import UsageError
from tersely.measure import Statistics

_BLOCK = 128
_INNER = 16
_PANEL = 512
_SWEEP_ELEMENTS = 1 << 24
"""Of a weight whose rows are swept together."""


@dataclass(frozen=True)
class GPTQ:
    """Minimise ||(W - W_hat) X|| on a fixed grid, column by column, each column making up for those before it.

    Grids are fitted beforehand on the unmodified weight ("static groups"), so that act-order costs nothing when
    the model runs. Columns whose input is always zero keep their rounded value. Where the factorization fails,
    the damping grows tenfold up to 1 and then the weight is rounded to nearest, and says so. So it does when
    fewer tokens than `minimum_tokens` per input reached it: its Gram matrix says too little (rare experts).
    """

    name: ClassVar[str] = "gptq"
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    bits: int = 4
    group: int = 128
    """Inputs that share a scale; 0: all inputs of an output."""
    symmetric: bool = True
    clip: Clip = "mse"
    """"mse": search the range of each group that loses least, inputs weighted by their mean square."""
    damping: float = 0.01
    """Added to the diagonal, relative to its mean."""
    act_order: bool = True
    """Take the inputs with the largest mean square first."""
    minimum_tokens: float = 1.0

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group, self.clip)
        if not 0 < self.damping <= 1:
            raise UsageError(f"damping={self.damping}: expected more than 0 and at most 1 (0.01 is usual)")
        if not self.minimum_tokens >= 0:
            raise UsageError(f"minimum_tokens={self.minimum_tokens}: expected 0 or more")

    def check(self, columns: int) -> None:
        check_group(self.group, columns)

    def __call__(self, weight_OI: Tensor, stats: Statistics) -> Encoded:
        weight, gram = weight_OI, stats.gram_II
        columns = weight.shape[1]
        enough = gram is not None and stats.tokens >= self.minimum_tokens * columns
        importance = gram.diagonal() / stats.tokens if gram is not None and enough else None
        scale, zero = fit_grid(
            weight,
            bits=self.bits,
            group=self.group,
            symmetric=self.symmetric,
            clip=self.clip,
            scale_dtype=weight_OI.dtype,
            importance_I=importance,
        )
        if gram is None or not enough:
            note = (
                f"{stats.tokens} calibration tokens for {columns} inputs, fewer than {self.minimum_tokens:g} per "
                "input: rounded to nearest"
            )
            return Encoded((round_to_grid(weight, scale, zero, self.bits),), note)
        order = (
            torch.argsort(gram.diagonal(), descending=True, stable=True)
            if self.act_order
            else torch.arange(columns, device=gram.device)
        )
        factor, damping = _factor(gram, order, self.damping)
        if factor is None:
            note = f"the Gram matrix has no Cholesky factor with damping up to {damping:g}: rounded to nearest"
            return Encoded((round_to_grid(weight, scale, zero, self.bits),), note)
        note = "" if damping == self.damping else f"damping raised to {damping:g}"
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        step = max(1, _SWEEP_ELEMENTS // columns)
        for a in range(0, len(codes), step):
            rows = slice(a, a + step)
            codes[rows] = _sweep(
                weight_OI[rows].float(),
                factor,
                order,
                scale[rows],
                None if zero is None else zero[rows],
                self.bits,
            )
        return Encoded((Integers(codes, scale, zero, self.bits),), note)


def _factor(gram_II: Tensor, order_I: Tensor, damping: float) -> tuple[Tensor | None, float]:
    """Lower triangular L with J H J = L L^T, J reversing the given order of columns, and the damping that it took.

    R = J L J is then the upper triangular factor of H, in that order.
    """
    diagonal = gram_II.diagonal()
    mean = float(diagonal.mean())
    flip = order_I.flip(0)
    while True:
        factor = gram_II[flip[:, None], flip]
        # A dead input has a zero diagonal: any positive number decouples it.
        factor.diagonal().add_(damping * mean if mean > 0 else 1.0)
        if _cholesky_(factor):
            return factor, damping
        if damping >= 1:
            return None, damping
        damping = min(damping * 10, 1.0)


def _cholesky_(matrix_II: Tensor) -> bool:
    """Factorize in place, block by block; the upper triangle keeps what it held. False where it is not positive."""
    size = len(matrix_II)
    for a in range(0, size, _PANEL):
        b = min(a + _PANEL, size)
        corner, failed = torch.linalg.cholesky_ex(matrix_II[a:b, a:b])
        if failed or not corner.isfinite().all():
            return False
        matrix_II[a:b, a:b] = corner
        if b == size:
            break
        panel = torch.linalg.solve_triangular(corner, matrix_II[b:, a:b].t(), upper=False).t().contiguous()
        matrix_II[b:, a:b] = panel
        for c in range(b, size, _PANEL):
            d = min(c + _PANEL, size)
            matrix_II[c:, c:d].addmm_(panel[c - b :], panel[c - b : d - b].t(), alpha=-1)
    return True


def _sweep(
    weight_OI: Tensor, factor_II: Tensor, order_I: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, bits: int
) -> Tensor:
    """Codes, (O, I) uint8."""
    rows, columns = weight_OI.shape
    group = columns // scale_OG.shape[1]
    top = float((1 << bits) - 1)
    weight_IO = weight_OI.t()[order_I]
    error_IO = torch.empty_like(weight_IO)
    codes_IO = torch.empty_like(weight_IO, dtype=torch.uint8)
    scale_GO = scale_OG.t().float().contiguous()
    middle = torch.full((rows,), float(1 << (bits - 1)), device=weight_OI.device)
    zero_GO = None if zero_OG is None else zero_OG.t().float().contiguous()
    groups = (order_I // group).tolist()
    stored = scale_OG.dtype
    diagonal = factor_II.diagonal().flip(0)

    def weights(j0: int, j1: int, k0: int, k1: int) -> Tensor:
        """R_jk / R_kk transposed, (k, j), for columns j0 to j1 and k0 to k1 in the order of the sweep."""
        part = factor_II[columns - j1 : columns - j0, columns - k1 : columns - k0]
        return part.flip(0, 1).div_(diagonal[k0:k1]).t()

    for a in range(0, columns, _BLOCK):
        b = min(a + _BLOCK, columns)
        target_BO = weight_IO[a:b].addmm(weights(0, a, a, b), error_IO[:a])
        inside_BB = weights(a, b, a, b)
        for c in range(a, b, _INNER):
            d = min(c + _INNER, b)
            if c > a:
                target_BO[c - a : d - a].addmm_(inside_BB[c - a : d - a, : c - a], error_IO[a:c])
            for k in range(c, d):
                target_O = target_BO[k - a]
                if k > c:
                    target_O = torch.addmv(target_O, error_IO[c:k].t(), inside_BB[k - a, c - a : k - a])
                scale_O = scale_GO[groups[k]]
                zero_O = middle if zero_GO is None else zero_GO[groups[k]]
                code_O = torch.div(target_O, scale_O).round_().add_(zero_O).clamp_(0.0, top)
                codes_IO[k] = code_O
                value_O = code_O.sub_(zero_O).mul_(scale_O)
                if stored != torch.float32:
                    value_O = value_O.to(stored).float()
                torch.sub(weight_IO[k], value_O, out=error_IO[k])
    codes_OI = torch.empty((rows, columns), dtype=torch.uint8, device=weight_OI.device)
    codes_OI[:, order_I] = codes_IO.t()
    return codes_OI
