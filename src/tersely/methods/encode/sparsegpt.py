"""SparseGPT: pruning with second-order error compensation (Frantar and Alistarh, ICML 2023, arXiv 2301.00774).

Shapes: O outputs, I inputs, S columns whose mask is chosen together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tersely.codecs import Encoded, Form
from tersely.codecs.dense import Dense
from tersely.codecs.integer import check_grid, check_group
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.encode.floating import check_choice
from tersely.methods.encode.gptq import GPTQ
from tersely.methods.encode.masks import (
    SPARSITY,
    check_columns,
    check_sparsity,
    kept_by_row,
    largest,
    numbers,
    pruned,
    removed_of,
    sparse_form,
)
from tersely.methods.encode.sweep import Factor, prepare, sweep
from tersely.methods.protocol import Work, sum_work

Scope = Literal["block", "row"]
_PRECISION = 1e-10
"""Share of the squared residual at which an output is as good as float32 lets it be."""


@dataclass(frozen=True)
class SparseGPT:
    """Minimise ||(W - W_hat) X|| column by column: what is set to zero is made up for by the columns behind it.

    The mask of every `block` columns is chosen when the sweep comes to them: those entries go, among all outputs, whose
    error costs least, w^2 R_kk^2 with the weights as they are by then (H = R R^T, see `sweep`; the paper writes this as
    w^2 / [U_kk]^2, H^-1 = U^T U). With a pattern it is chosen for every M columns and each output by itself. Where too
    few tokens were measured, or the factorization fails, the smallest weights go, and the note says so.
    """

    name: ClassVar[str] = "sparsegpt"
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    keeps_zeros: ClassVar[bool] = True

    sparsity: float = SPARSITY
    """Share of the weights that become zero."""
    pattern: str = ""
    """"2:4": of every 4 consecutive inputs 2 are kept; "": no pattern."""
    block: int = 128
    """Columns whose mask is chosen together; a pattern has its own number of them."""
    scope: Scope = "block"
    """What is compared: all outputs in the "block", or each "row" of it by itself."""
    update: bool = True
    """false: only the mask is taken, and the weights that stay are those of the source."""
    refine: int = 0
    """Steps of conjugate gradients towards the best values of what stays."""
    bits: int = 0
    """Of what stays, on the grids of `gptq`, by its sweep; 0: it keeps its dtype."""
    group: int = 128
    """Inputs that share a scale; 0: all inputs of an output."""
    symmetric: bool = True
    damping: float = 0.01
    """Added to the diagonal, relative to its mean."""
    minimum_tokens: float = 1.0

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity, self.pattern)
        check_choice("scope", self.scope, Scope)
        if self.block < 1:
            raise UsageError(f"block={self.block}: expected 1 or more columns (128 is usual)")
        if self.refine < 0:
            raise UsageError(f"refine={self.refine}: expected 0 or more steps")
        if self.refine and not self.update:
            raise UsageError(f"refine={self.refine} has no effect with update=false, which keeps the source's weights")
        if self.bits:
            check_grid(self.bits, self.group, "mse")
        if not 0 < self.damping <= 1:
            raise UsageError(f"damping={self.damping}: expected more than 0 and at most 1 (0.01 is usual)")
        if not self.minimum_tokens >= 0:
            raise UsageError(f"minimum_tokens={self.minimum_tokens}: expected 0 or more")

    @property
    def row_wise(self) -> bool:
        return bool(self.pattern) or self.scope == "row"

    def check(self, columns: int) -> None:
        check_columns(self.pattern, columns)
        if self.bits:
            check_group(self.group, columns)

    def forms(self, rows: int, columns: int) -> tuple[Form, ...]:
        if self.bits:
            return self._gptq().forms(rows, columns)
        return (sparse_form(self.sparsity, self.pattern, columns),)

    def work(self, rows: int, columns: int) -> Work:
        flops = 2.0 * rows * columns**2 * (1 + self.refine) + columns**3 / 3
        own = Work(flops=flops, passes=8 + 10 * self.refine, loops=columns, memory=20 * rows * columns)
        return sum_work(own, self._gptq().work(rows, columns)) if self.bits else own

    def __call__(self, weight_OI: Tensor, stats: Statistics) -> Encoded:
        sparse_OI, kept_OI, note = self._sparse(weight_OI, stats)
        if not self.bits:
            return Encoded((Dense(sparse_OI),), note)
        encoded = self._gptq()(sparse_OI, replace(stats, kept_OI=kept_OI))
        return Encoded(encoded.parts, "; ".join(dict.fromkeys(filter(None, [note, encoded.note]))))

    def _gptq(self) -> GPTQ:
        return GPTQ(self.bits, self.group, self.symmetric, damping=self.damping, minimum_tokens=self.minimum_tokens)

    def _sparse(self, weight_OI: Tensor, stats: Statistics) -> tuple[Tensor, Tensor, str]:
        """The weight with its zeros, in its dtype; where it has none, (O, I) bool; what the user should know."""
        factor, importance_I, note = prepare(
            stats,
            damping=self.damping,
            act_order=False,
            minimum_tokens=self.minimum_tokens,
            otherwise="pruned by magnitude",
        )
        w = weight_OI.float()
        if factor is None:
            weigh_I = torch.ones(w.shape[1], device=w.device) if importance_I is None else importance_I
            kept_OI = kept_by_row(w.square() * weigh_I, self.sparsity, self.pattern)
            return pruned(weight_OI, kept_OI), kept_OI, note
        swept_OI, kept_OI = self._swept(w, factor, stats.kept_OI)
        if not self.update:
            return pruned(weight_OI, kept_OI), kept_OI, note
        assert stats.gram_II is not None
        if self.refine:
            swept_OI = refined(w, swept_OI, kept_OI, stats.gram_II, factor.damping, self.refine)
        return swept_OI.to(weight_OI.dtype), kept_OI, note

    def _swept(self, weight_OI: Tensor, factor: Factor, may_OI: Tensor | None) -> tuple[Tensor, Tensor]:
        """What stays of a float32 weight, made up for the rest, and where, (O, I) bool."""
        kept_IO = torch.empty(weight_OI.shape[::-1], dtype=torch.bool, device=weight_OI.device)
        value_IO = torch.empty_like(weight_OI.t(), memory_format=torch.contiguous_format)
        may_IO = None if may_OI is None else may_OI.t()

        def ahead(columns: list[int], current_SO: Tensor, size_S: Tensor) -> None:
            score_SO = (current_SO * size_S[:, None]).square_()
            if may_IO is not None:
                score_SO.masked_fill_(~may_IO[columns], -1)
            if self.row_wise:
                kept_SO = kept_by_row(score_SO.t(), self.sparsity, self.pattern).t()
            else:
                removed = removed_of(score_SO.numel(), self.sparsity)
                kept_SO = ~largest(-score_SO.flatten(), removed).view(score_SO.shape)
            kept_IO[columns] = kept_SO if may_IO is None else kept_SO & may_IO[columns]

        def rounded(column: int, target_O: Tensor) -> Tensor:
            torch.mul(target_O, kept_IO[column], out=value_IO[column])
            return value_IO[column]

        stride = numbers(self.pattern)[1] if self.pattern else self.block
        sweep(weight_OI, factor, rounded, ahead=ahead, stride=stride)
        return value_IO.t().contiguous(), kept_IO.t().contiguous()


def refined(
    weight_OI: Tensor, sparse_OI: Tensor, kept_OI: Tensor, gram_II: Tensor, damping: float, steps: int
) -> Tensor:
    """Sparse weights S with less tr(D H D^T), D = W - S, by preconditioned conjugate gradients on what is kept.

    H is the Gram matrix with damping; each output is a system of its own.
    """
    hessian_II = gram_II.clone()
    hessian_II.diagonal().add_(damping * hessian_II.diagonal().mean())
    inverse_I = 1 / hessian_II.diagonal()
    kept = kept_OI.float()
    x = sparse_OI.clone()
    left = ((weight_OI - x) @ hessian_II).mul_(kept)
    direction = left * inverse_I
    product_O1 = (left * direction).sum(1, keepdim=True)
    least_O1 = _PRECISION * product_O1
    for _ in range(steps):
        image = (direction @ hessian_II).mul_(kept)
        curve_O1 = (direction * image).sum(1, keepdim=True)
        step_O1 = torch.where(product_O1 > least_O1, product_O1 / curve_O1, 0)
        x.addcmul_(direction, step_O1)
        left.addcmul_(image, step_O1, value=-1)
        fixed = left * inverse_I
        before_O1, product_O1 = product_O1, (left * fixed).sum(1, keepdim=True)
        direction = direction.mul_(torch.where(before_O1 > 0, product_O1 / before_O1, 0)).add_(fixed)
    return x
