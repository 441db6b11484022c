"""Which entries of a weight stay when others are set to zero: a share of them, or N of every M inputs ("2:4").

Papers count in N:M the entries that stay, and much code those that go: here, as in the papers, 2:4 is two of four that
stay.

Shapes: O outputs, I inputs, N entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersely.codecs.dense import DenseForm
from tersely.errors import UsageError

SPARSITY = 0.5
"""Where nothing else is said."""


def check_sparsity(sparsity: float, pattern: str) -> None:
    """UsageError for a share or a pattern that is none, and for both of them."""
    if not 0 <= sparsity < 1:
        raise UsageError(f"sparsity={sparsity}: expected a share of the weights, from 0 to below 1 (0.5 is usual)")
    if pattern:
        keep, m = numbers(pattern)
        if sparsity != SPARSITY:
            raise UsageError(f"sparsity={sparsity} and pattern={pattern!r}, which keeps {keep / m:g}: give one of both")


def check_columns(pattern: str, columns: int) -> None:
    """UsageError where the inputs of a weight are no multiple of the pattern's M."""
    if pattern and columns % (m := numbers(pattern)[1]):
        fits = [n for n in (4, 8, 16, 2, 3, 5) if columns % n == 0][:1]
        other = f"a pattern of {fits[0]}, " if fits else ""
        raise UsageError(f"pattern={pattern!r}: {columns} inputs are no multiple of {m}; use {other}or sparsity")


def numbers(pattern: str) -> tuple[int, int]:
    """(kept, of how many inputs). UsageError for a text that says no such numbers."""
    keep, colon, m = pattern.partition(":")
    if not (colon and keep.isdecimal() and m.isdecimal() and 0 < int(keep) < int(m)):
        raise UsageError(
            f"pattern={pattern!r}: expected how many of how many consecutive inputs are kept, such as '2:4' or '4:8'"
        )
    return int(keep), int(m)


def removed_of(count: int, sparsity: float) -> int:
    """floor(count * sparsity), of the decimal number that was written."""
    return int(count * sparsity + 1e-9)


def sparse_form(sparsity: float, pattern: str, columns: int) -> DenseForm:
    """What a weight of so many inputs is left in."""
    if pattern:
        keep, m = numbers(pattern)
        return DenseForm(keep / m)
    return DenseForm(1 - removed_of(columns, sparsity) / columns)


def kept_by_row(score_OI: Tensor, sparsity: float, pattern: str) -> Tensor:
    """(O, I) bool: without the floor(I * sparsity) entries of each output with the least score, or those of each M
    inputs; of equal ones, the first go."""
    rows, columns = score_OI.shape
    removed = removed_of(columns, sparsity)
    score_RN = score_OI
    if pattern:
        keep, m = numbers(pattern)
        score_RN, removed = score_OI.reshape(-1, m), m - keep
    kept_RN = torch.ones(score_RN.shape, dtype=torch.bool, device=score_RN.device)
    kept_RN.scatter_(1, score_RN.argsort(dim=1, stable=True)[:, :removed], False)
    return kept_RN.view(rows, columns)


def largest(value_N: Tensor, count: int) -> Tensor:
    """Where, (N,) bool, the largest are; of equal ones the first."""
    if not count:
        return torch.zeros(len(value_N), dtype=torch.bool, device=value_N.device)
    cut = value_N.kthvalue(len(value_N) - count + 1).values
    chosen = value_N > cut
    chosen[(value_N == cut).nonzero()[: count - int(chosen.sum()), 0]] = True
    return chosen


def pruned(weight_OI: Tensor, kept_OI: Tensor) -> Tensor:
    """A weight with zeros where the mask does not hold."""
    return torch.where(kept_OI, weight_OI, 0)
