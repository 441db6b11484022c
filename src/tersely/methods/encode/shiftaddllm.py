"""ShiftAddLLM: sums of binary matrices with power-of-two scales (You et al., NeurIPS 2024, arXiv 2406.05981).

Shapes: O outputs, I inputs, A groups of outputs, J blocks of inputs, N binary matrices (bits); D blocks that are fitted
at once, S weights of each; L = 2^N values that N signs can give.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tersely.codecs import Encoded
from tersely.codecs.binary import Binary, BinaryForm, Powers, snap
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.encode.sweep import Factor, prepare, sweep
from tersely.methods.protocol import Work

Mode = Literal["accuracy", "latency"]
_BLOCK = 8
"""Inputs whose signs are one key of a lookup table, and groups of outputs, in latency mode."""
_RIDGE = 1e-6
_LEAST_GAIN = 1e-4


@dataclass(frozen=True)
class ShiftAddLLM:
    """W_hat = sum_k alpha_k B_k, B_k of +1 and -1, alpha_k a sum of `terms` signed powers of two, in GPTQ's sweep.

    Alphas and signs are fitted in turns to what a column has become when its turn comes (greedy start; least squares
    for alpha, snapped; the nearest of the 2^bits sums for the signs), and errors are passed on to later columns:
    that is the paper's multi-objective error, of the weight and of the output.

    mode "accuracy": every input has its own alphas (for `group` outputs); "latency": blocks of 8 inputs by an eighth of
    the outputs share them, so that the 8 signs are one key of a lookup table. The rotations of the released code, which
    leave dense weights behind, are left out.
    """

    name: ClassVar[str] = "shiftaddllm"
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    row_wise: ClassVar[bool] = False
    keeps_zeros: ClassVar[bool] = False

    bits: int = 3
    """Binary matrices."""
    mode: Mode = "accuracy"
    group: int = 0
    """Outputs that share the alphas of an input, in accuracy mode; 0, or where it does not divide them: all."""
    terms: int = 3
    """Powers of two in an alpha."""
    rounds: int = 20
    """At most; the authors take 50, but signs settle before."""
    damping: float = 0.01
    """Added to the diagonal, relative to its mean."""
    act_order: bool = True
    """Take the inputs (in latency mode: the blocks of them) with the largest mean square first."""
    minimum_tokens: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise UsageError(f"bits={self.bits}: 1 to 8 binary matrices can be stored")
        if self.mode not in ("accuracy", "latency"):
            raise UsageError(f"mode={self.mode!r}: expected 'accuracy' or 'latency'")
        if self.group < 0 or (self.group and self.mode == "latency"):
            raise UsageError(
                f"group={self.group}: expected 0 or more outputs, and 0 in latency mode, which has its own"
            )
        if not 1 <= self.terms <= 4:
            raise UsageError(f"terms={self.terms}: expected 1 to 4 powers of two (3 is usual)")
        if self.rounds < 1:
            raise UsageError(f"rounds={self.rounds}: expected 1 or more (20 is usual)")
        if not 0 < self.damping <= 1:
            raise UsageError(f"damping={self.damping}: expected more than 0 and at most 1 (0.01 is usual)")
        if not self.minimum_tokens >= 0:
            raise UsageError(f"minimum_tokens={self.minimum_tokens}: expected 0 or more")

    def check(self, columns: int) -> None:
        if self.mode == "latency" and columns % _BLOCK:
            raise UsageError(
                f"mode='latency' takes {_BLOCK} inputs at once, and {columns} is no multiple; use mode='accuracy'"
            )

    def forms(self, rows: int, columns: int) -> tuple[BinaryForm]:  # noqa: ARG002 (of the protocol)
        if self.mode == "latency":
            groups = max(count for count in range(1, _BLOCK + 1) if rows % count == 0)
            return (BinaryForm(self.bits, rows // groups if groups > 1 else 0, _BLOCK, self.terms),)
        return (BinaryForm(self.bits, self.group if self.group and rows % self.group == 0 else 0, 1, self.terms),)

    def work(self, rows: int, columns: int) -> Work:
        fitting = self.rounds * rows * columns * (self.bits**2 + (1 << self.bits))
        loops = columns // (_BLOCK if self.mode == "latency" else 1) * self.rounds
        return Work(flops=2.0 * rows * columns**2 + columns**3 / 3 + fitting, loops=loops, memory=4 * columns**2)

    def __call__(self, weight_OI: Tensor, stats: Statistics) -> Encoded:
        rows, columns = weight_OI.shape
        (form,) = self.forms(rows, columns)
        groups, blocks = form.shape(rows, columns)
        factor, note = self._factor(stats)
        if self.group and not form.rows:
            note = "; ".join(filter(None, (note, f"group={self.group} does not divide {rows} outputs: all share")))
        device = weight_OI.device
        codes_IO = torch.empty((columns, rows), dtype=torch.uint8, device=device)
        exponent_JAN = torch.empty((blocks, groups, self.bits), dtype=torch.uint8, device=device)
        drop_JANE = torch.empty((*exponent_JAN.shape, self.terms - 1), dtype=torch.uint8, device=device)

        def fitted(column: int, target_CO: Tensor) -> None:
            target_AS = target_CO.view(len(target_CO), groups, -1).transpose(0, 1).flatten(1)
            alpha_AN = fit(target_AS, bits=self.bits, terms=self.terms, rounds=self.rounds)
            exponent_JAN[column // form.columns] = alpha_AN.exponent
            drop_JANE[column // form.columns] = alpha_AN.drop

        def rounded(column: int, target_O: Tensor) -> Tensor:
            block = column // form.columns
            alpha_AN = Powers(exponent_JAN[block], drop_JANE[block]).values()
            codes_AS = nearest_signs(target_O.view(groups, -1), alpha_AN)
            codes_IO[column] = codes_AS.flatten()
            return signed_sums(alpha_AN).gather(1, codes_AS.long()).flatten().to(weight_OI.dtype).float()

        def both(column: int, target_O: Tensor) -> Tensor:
            fitted(column, target_O[None])
            return rounded(column, target_O)

        if factor is None:
            return Encoded((self._nearest(weight_OI, form),), note)
        if self.mode == "latency":
            _sweep_blocks(weight_OI.float(), factor, fitted, rounded)
        else:
            sweep(weight_OI.float(), factor, both)
        alpha_JAN = Powers(exponent_JAN, drop_JANE)
        return Encoded((_part(codes_IO.t().contiguous(), alpha_JAN, weight_OI.dtype, form),), note)

    def _nearest(self, weight_OI: Tensor, form: BinaryForm) -> Binary:
        """All blocks at once, as they are: no errors are passed on."""
        groups, blocks = form.shape(*weight_OI.shape)
        blocks_JARC = weight_OI.float().view(groups, -1, blocks, form.columns).permute(2, 0, 1, 3)
        weight_DS = blocks_JARC.reshape(blocks * groups, -1)
        alpha_DN = fit(weight_DS, bits=self.bits, terms=self.terms, rounds=self.rounds)
        codes_JARC = nearest_signs(weight_DS, alpha_DN.values()).view(blocks_JARC.shape)
        alpha_JAN = Powers(*(t.view(blocks, groups, *t.shape[1:]) for t in (alpha_DN.exponent, alpha_DN.drop)))
        return _part(codes_JARC.permute(1, 2, 0, 3).reshape(weight_OI.shape), alpha_JAN, weight_OI.dtype, form)

    def _factor(self, stats: Statistics) -> tuple[Factor | None, str]:
        """In latency mode with the inputs of a block side by side, the blocks by the sums of their mean squares."""
        if self.mode == "accuracy" or not self.act_order or stats.gram_II is None:
            factor, _, note = prepare(
                stats, damping=self.damping, act_order=self.act_order, minimum_tokens=self.minimum_tokens
            )
            return factor, note
        blocks = stats.gram_II.diagonal().view(-1, _BLOCK).sum(1).argsort(descending=True, stable=True)
        order = (blocks[:, None] * _BLOCK + torch.arange(_BLOCK, device=blocks.device)).flatten()
        ordered = dataclasses.replace(stats, gram_II=stats.gram_II[order[:, None], order])
        factor, _, note = prepare(ordered, damping=self.damping, act_order=False, minimum_tokens=self.minimum_tokens)
        return factor and dataclasses.replace(factor, order_I=order), note


def _part(codes_OI: Tensor, alpha_JAN: Powers, dtype: torch.dtype, form: BinaryForm) -> Binary:
    exponent, drop = (t.transpose(0, 1).contiguous() for t in (alpha_JAN.exponent, alpha_JAN.drop))
    return Binary(codes_OI, Powers(exponent, drop), dtype, form)


def fit(weight_DS: Tensor, *, bits: int, terms: int, rounds: int) -> Powers:
    """Alphas (D, N) of sets of weights, snapped, by turns of `solve_scales`, `snap` and `nearest_signs`.

    The turns end where no set gains a ten-thousandth; the best of each is kept.
    """
    codes_DS = greedy_signs(weight_DS, bits)
    best = torch.full((len(weight_DS), 1), torch.inf, device=weight_DS.device)
    kept: Powers | None = None
    for _ in range(rounds):
        alpha, value_DN = snap(solve_scales(weight_DS, codes_DS, bits), terms)
        codes_DS = nearest_signs(weight_DS, value_DN)
        error = (signed_sums(value_DN).gather(1, codes_DS.long()) - weight_DS).square().sum(1, keepdim=True)
        settled = not bool((error < best * (1 - _LEAST_GAIN)).any())
        kept = alpha if kept is None else _where(error < best, alpha, kept)
        best = torch.minimum(error, best)
        if settled:
            break
    assert kept is not None, "there is a round"
    return kept


def greedy_signs(weight_DS: Tensor, bits: int) -> Tensor:
    """uint8 codes: bit k is the sign of what the matrices before it leave, each scaled by the mean of that; 0 is +1."""
    left = weight_DS
    codes = torch.zeros(left.shape, dtype=torch.uint8, device=left.device)
    for k in range(bits):
        positive = left >= 0
        codes |= positive.to(torch.uint8) << k
        alpha = left.abs().mean(1, keepdim=True)
        left = torch.where(positive, left - alpha, left + alpha)
    return codes


def solve_scales(weight_DS: Tensor, codes_DS: Tensor, bits: int) -> Tensor:
    """Least squares alphas (D, N) of given signs, from (B B^T + ridge) alpha = B w, made positive and descending."""
    plane_N1 = torch.arange(bits, dtype=torch.uint8, device=codes_DS.device)[:, None]
    signs_DNS = ((codes_DS[:, None] >> plane_N1) & 1).to(weight_DS.dtype) * 2 - 1
    normal_DNN = signs_DNS @ signs_DNS.transpose(1, 2)
    normal_DNN.diagonal(dim1=1, dim2=2).add_(_RIDGE * weight_DS.shape[1])
    alpha_DN: Tensor = torch.linalg.solve(normal_DNN, (signs_DNS @ weight_DS[:, :, None]))[:, :, 0]
    return alpha_DN.abs().sort(dim=1, descending=True).values


def nearest_signs(weight_DS: Tensor, alpha_DN: Tensor) -> Tensor:
    """uint8 codes of the nearest of the 2^N sums of +-alpha, found among them in their order."""
    sums_DL, codes_DL = signed_sums(alpha_DN).sort(dim=1)
    middles = (sums_DL[:, 1:] + sums_DL[:, :-1]) / 2
    return codes_DL.gather(1, torch.searchsorted(middles, weight_DS.contiguous())).to(torch.uint8)


def signed_sums(alpha_DN: Tensor) -> Tensor:
    """What each code stands for, (D, L): added matrix by matrix, as the stored form is decoded."""
    codes_L = torch.arange(1 << alpha_DN.shape[1], device=alpha_DN.device)
    total = alpha_DN.new_zeros((len(alpha_DN), len(codes_L)))
    for k, alpha_D in enumerate(alpha_DN.unbind(1)):
        total += torch.where(((codes_L >> k) & 1).bool(), alpha_D[:, None], -alpha_D[:, None])
    return total


def _where(better: Tensor, one: Powers, other: Powers) -> Powers:
    exponent = torch.where(better, one.exponent, other.exponent)
    return Powers(exponent, torch.where(better[:, :, None], one.drop, other.drop))


def _sweep_blocks(
    weight_OI: Tensor, factor: Factor, fitted: Callable[[int, Tensor], None], rounded: Callable[[int, Tensor], Tensor]
) -> None:
    """`sweep`, where a block of inputs is fitted, with what earlier blocks passed on, before the first is rounded."""
    order = factor.order_I.tolist()
    weight_IO = weight_OI.t()[factor.order_I]
    error_IO = torch.empty_like(weight_IO)
    upper_II = factor.lower_II.tril().flip(0, 1)
    passed_II = upper_II.div_(upper_II.diagonal().clone())
    for a in range(0, len(order), _BLOCK):
        b = a + _BLOCK
        target_BO = weight_IO[a:b].addmm(passed_II[:a, a:b].t(), error_IO[:a])
        fitted(order[a], target_BO)
        for k in range(a, b):
            target_O = torch.addmv(target_BO[k - a], error_IO[a:k].t(), passed_II[a:k, k])
            torch.sub(weight_IO[k], rounded(order[k], target_O), out=error_IO[k])
