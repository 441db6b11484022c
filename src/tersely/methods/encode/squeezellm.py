"""SqueezeLLM: tables of values by sensitivity, and a few weights kept as they are (Kim et al., ICML 2024, 2306.07629).

Shapes: O outputs, I inputs, K = 2^bits values of a table, N weights kept apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tersely.codecs import Encoded, Form
from tersely.codecs.codebook import Lookup, LookupForm, nearest_labels
from tersely.codecs.sparse import Sparse, SparseForm, check_density, sparse
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.encode.clustering import distinct, exact, kmeans, order, start, stretches_for
from tersely.methods.encode.masks import largest
from tersely.methods.protocol import Work

Fit = Literal["kmeans", "exact"]
_CHUNK = 1 << 18
"""Weights whose tables are fitted at once."""


@dataclass(frozen=True)
class SqueezeLLM:
    """Store each output's weights as labels of 2^bits values of its own, which lose least where the loss is steep:

        minimise sum_i F_i (w_i - w_hat_i)^2,   F = mean over sequences of the squared gradient of the loss

    Dense and sparse: first the `sensitive` share of the weights with the largest F, then the `outliers` share with
    the largest magnitude among the others, are left out of the fit and kept in a sparse part, which holds what their
    table's value lacks, so that the sum is the weight itself, bit for bit; where rounding leaves no way to it (in one
    output of ten by default), the table's value that is closest to 0 becomes 0. (The paper cuts a matrix outside its
    quartiles -+ r times their distance, r tuned to a share; here the share gives the cut.)

    The tables are fitted by weighted k-means from a start near the optimum, in at most `iterations` steps, or are the
    optimum itself (fit = "exact": much slower), and are rounded to the weight's dtype. Outputs with at most 2^bits
    different weights are exact.

    Without F, or in an output where it is 0, all weights count the same; without it the sensitive share goes to the
    outliers.
    """

    name: ClassVar[str] = "squeezellm"
    needs: ClassVar[frozenset[str]] = frozenset({"fisher"})
    row_wise: ClassVar[bool] = False
    keeps_zeros: ClassVar[bool] = False

    bits: int = 4
    sensitive: float = 0.0005
    """Share of the weights kept since the loss depends on them most."""
    outliers: float = 0.0045
    """Share of the weights kept since they are the largest."""
    fit: Fit = "kmeans"
    iterations: int = 50

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UsageError(f"bits={self.bits}: tables of 2 to 8 bits can be stored")
        check_density("sensitive", self.sensitive)
        check_density("outliers", self.outliers)
        check_density("sensitive + outliers", self._density)
        if self.fit not in ("kmeans", "exact"):
            raise UsageError(f"fit={self.fit!r}: expected 'kmeans' or 'exact'")
        if self.iterations < 0:
            raise UsageError(f"iterations={self.iterations}: expected 0 or more (50 is usual)")

    @property
    def _density(self) -> float:
        return self.sensitive + self.outliers

    def check(self, columns: int) -> None:
        """Every number of inputs can be taken."""

    def forms(self, rows: int, columns: int) -> tuple[Form, ...]:
        dense = LookupForm(self.bits)
        kept = round(self._density * rows * columns)
        return (dense, SparseForm(kept / (rows * columns))) if kept else (dense,)

    def work(self, rows: int, columns: int) -> Work:
        clusters = 1 << self.bits
        edges = columns if self.fit == "exact" else min(columns, stretches_for(clusters))
        return Work(passes=60 + 0.7 * clusters * edges**2 / columns, memory=16 * rows * columns)

    def __call__(self, weight_OI: Tensor, stats: Statistics) -> Encoded:
        fisher_OI = stats.fisher_OI
        note = "" if fisher_OI is not None else "no gradients of the loss were measured: all weights count the same"
        kept_OI = self._kept(weight_OI, fisher_OI)
        dense = self._fitted(weight_OI, fisher_OI, kept_OI)
        if not bool(kept_OI.any()):
            return Encoded((dense,), note)
        return Encoded(_kept_apart(dense, weight_OI, kept_OI), note)

    def _kept(self, weight_OI: Tensor, fisher_OI: Tensor | None) -> Tensor:
        """Which weights are left to the sparse part, (O, I) bool."""
        kept = torch.zeros(weight_OI.numel(), dtype=torch.bool, device=weight_OI.device)
        count = round(self._density * len(kept))
        if fisher_OI is not None:
            kept = largest(fisher_OI.flatten(), min(count, round(self.sensitive * len(kept))))
        size = weight_OI.flatten().abs().float().masked_fill_(kept, -1)
        kept |= largest(size, count - int(kept.sum()))
        return kept.view(weight_OI.shape)

    def _fitted(self, weight_OI: Tensor, fisher_OI: Tensor | None, kept_OI: Tensor) -> Lookup:
        rows, columns = weight_OI.shape
        clusters = 1 << self.bits
        table = weight_OI.new_empty((rows, clusters))
        step = max(1, _CHUNK // columns)
        for a in range(0, rows, step):
            kept = kept_OI[a : a + step]
            w = weight_OI[a : a + step].float()
            # What is kept apart takes no part: no weight, and a number that the output has anyhow.
            numbers = torch.where(kept, w.gather(1, kept.byte().argmin(1, keepdim=True)), w)
            f = torch.ones_like(w) if fisher_OI is None else fisher_OI[a : a + step]
            f = torch.where(kept, 0.0, torch.where(torch.where(kept, 0.0, f).amax(1, keepdim=True) > 0, f, 1.0))
            ordered = order(numbers, f)
            if self.fit == "exact":
                fitted = exact(ordered, clusters)
            else:
                fitted = kmeans(ordered, start(ordered, clusters), self.iterations)
            few, own = distinct(ordered, clusters)
            table[a : a + step] = torch.where(few[:, None], own, fitted)
        return Lookup(nearest_labels(weight_OI, table), table, LookupForm(self.bits))


def _kept_apart(dense: Lookup, weight_OI: Tensor, kept_OI: Tensor) -> tuple[Lookup, Sparse]:
    """The parts whose sum, as a reader computes it, is the weight itself wherever it is kept apart."""
    rows_N, columns_N = kept_OI.nonzero(as_tuple=True)
    weight_N, table_OK = weight_OI[rows_N, columns_N], dense.table_OK
    labels_N, rest_N, found_N = _closing(weight_N, table_OK[rows_N])
    if not bool(found_N.all()):
        # A small weight is finer than what it lacks of a larger value, once that is rounded. From 0 it can be reached.
        lost = torch.zeros((len(table_OK), 1), dtype=torch.bool, device=table_OK.device)
        lost[rows_N[~found_N]] = True
        with_zero_OK = table_OK.scatter(1, table_OK.abs().argmin(1, keepdim=True), 0).sort(dim=1).values
        table_OK = torch.where(lost, with_zero_OK, table_OK)
        dense = Lookup(nearest_labels(weight_OI, table_OK), table_OK, dense.form)
        labels_N, rest_N, _ = _closing(weight_N, table_OK[rows_N])
    labels_OI = dense.labels_OI.index_put((rows_N, columns_N), labels_N)
    return Lookup(labels_OI, table_OK, dense.form), sparse(rest_N, kept_OI)


def _closing(weight_N: Tensor, table_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The label whose value is closest to 0 among those from which a stored rest leads to the weight; the rest; and
    whether there is one."""
    rest_NK = (weight_N[:, None].float() - table_NK.float()).to(weight_N.dtype)
    reached_NK = (table_NK.float() + rest_NK.float()).to(weight_N.dtype) == weight_N[:, None]
    label_N = table_NK.float().abs().masked_fill_(~reached_NK, torch.inf).argmin(1, keepdim=True)
    return label_N[:, 0].to(torch.uint8), rest_NK.gather(1, label_N)[:, 0], reached_NK.any(1)
