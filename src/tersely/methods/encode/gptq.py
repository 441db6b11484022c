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
        if self.minimum_tokens < 0:
            raise UsageError(f"minimum_tokens={self.minimum_tokens}: expected 0 or more")

    def check(self, columns: int) -> None:
        check_group(self.group, columns)

    def __call__(self, weight_OI: Tensor, stats: Statistics) -> Encoded:
        weight, gram = weight_OI.float(), stats.gram_II
        columns = weight.shape[1]
        enough = gram is not None and stats.tokens >= self.minimum_tokens * columns
        importance = gram.diagonal() / stats.tokens if gram is not None and enough else None
        scale, zero = fit_grid(weight, bits=self.bits, group=self.group, symmetric=self.symmetric, clip=self.clip,
                               scale_dtype=weight_OI.dtype, importance_I=importance)
        if gram is None or not enough:
            note = (f"{stats.tokens} calibration tokens for {columns} inputs, fewer than {self.minimum_tokens:g} per "
                    "input: rounded to nearest")
            return Encoded((round_to_grid(weight, scale, zero, self.bits),), note)
        order = torch.argsort(gram.diagonal(), descending=True, stable=True) if self.act_order else None
        factor, damping = _factor(gram, order, self.damping)
        if factor is None:
            note = f"the Gram matrix has no Cholesky factor with damping up to {damping:g}: rounded to nearest"
            return Encoded((round_to_grid(weight, scale, zero, self.bits),), note)
        note = "" if damping == self.damping else f"damping raised to {damping:g}"
        return Encoded((_sweep(weight, factor, order, scale, zero, self.bits),), note)


def _factor(gram_II: Tensor, order_I: Tensor | None, damping: float) -> tuple[Tensor | None, float]:
    """Unit upper triangular A with H = A D A^T in the given order of columns, and the damping that it took."""
    diagonal = gram_II.diagonal()
    mean = float(diagonal.mean())
    flip = torch.arange(len(diagonal) - 1, -1, -1, device=gram_II.device)
    flip = flip if order_I is None else order_I[flip]
    while True:
        flipped = gram_II[flip][:, flip]
        # A dead input has a zero diagonal: any positive number decouples it.
        flipped.diagonal().add_(damping * mean if mean > 0 else 1.0)
        _, failed = torch.linalg.cholesky_ex(flipped, out=(flipped, torch.empty((), dtype=torch.int32, device=flip.device)))
        if not failed:
            factor = flipped.flip(0, 1)
            del flipped
            return factor.div_(factor.diagonal().clone()), damping
        if damping >= 1:
            return None, damping
        damping = min(damping * 10, 1.0)


def _sweep(weight_OI: Tensor, factor_II: Tensor, order_I: Tensor | None, scale_OG: Tensor, zero_OG: Tensor | None,
           bits: int) -> Integers:
    rows, columns = weight_OI.shape
    group = columns // scale_OG.shape[1]
    top = float((1 << bits) - 1)
    order = torch.arange(columns, device=weight_OI.device) if order_I is None else order_I
    weight_IO = weight_OI.t()[order]
    error_IO = torch.empty_like(weight_IO)
    codes_IO = torch.empty_like(weight_IO, dtype=torch.uint8)
    scale_GO = scale_OG.t().float().contiguous()
    middle = torch.full((rows,), float(1 << (bits - 1)), device=weight_OI.device)
    zero_GO = None if zero_OG is None else zero_OG.t().float().contiguous()
    groups = (order // group).tolist()
    stored = scale_OG.dtype
    for a in range(0, columns, _BLOCK):
        b = min(a + _BLOCK, columns)
        target_BO = weight_IO[a:b].addmm(factor_II[:a, a:b].t(), error_IO[:a])
        for c in range(a, b, _INNER):
            d = min(c + _INNER, b)
            if c > a:
                target_BO[c - a : d - a].addmm_(factor_II[a:c, c:d].t(), error_IO[a:c])
            for k in range(c, d):
                target_O = target_BO[k - a]
                if k > c:
                    target_O = torch.addmv(target_O, error_IO[c:k].t(), factor_II[c:k, k])
                scale_O = scale_GO[groups[k]]
                zero_O = middle if zero_GO is None else zero_GO[groups[k]]
                code_O = (target_O / scale_O).round_().add_(zero_O).clamp_(0.0, top)
                codes_IO[k] = code_O
                value_O = code_O.sub_(zero_O).mul_(scale_O)
                if stored != torch.float32:
                    value_O = value_O.to(stored).float()
                torch.sub(weight_IO[k], value_O, out=error_IO[k])
    codes_OI = torch.empty((rows, columns), dtype=torch.uint8, device=weight_OI.device)
    codes_OI[:, order] = codes_IO.t()
    return Integers(codes_OI, scale_OG, zero_OG, bits)
