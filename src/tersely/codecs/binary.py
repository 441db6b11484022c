"""Sums of binary matrices with power-of-two scales: products become shifts and additions (arXiv 2406.05981).

    W_hat = sum_k alpha_k B_k,   B_k of +1 and -1,   alpha = 2^e_1 +- 2^e_2 +- ...      ("additive powers of two")

A block of outputs by inputs shares its alphas. Each is stored as the exponent of its first term, a byte, and a sign and
the drop from the exponent before (1 to 7, four bits) for every further term; 0 ends the sum. As a first term is the
nearest power of two in logarithm, what is left is below 2^-1.27 of it, so that a drop is never 0; one that is above 7
is left out, at a relative error of at most 2^-7.5.

Shapes: O outputs, I inputs, A groups of outputs, J blocks of inputs, N binary matrices, E further terms, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from tersely.codecs.integer import pack, unpack
from tersely.codecs.planes import join_planes, slice_planes

_ZERO_EXPONENT = 128
_LARGEST_DROP = 7
_NEGATIVE = 8
_KEYS = 8
"""Inputs whose signs are one key of a lookup table."""


@dataclass(frozen=True)
class BinaryForm:
    """Binary matrices; `rows` outputs (0: all) by `columns` inputs share a scale for each, of at most `terms` terms."""

    kind: ClassVar[str] = "binary"
    full_inputs: ClassVar[bool] = False

    bits: int
    """Matrices."""
    rows: int
    columns: int
    terms: int

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Groups of outputs and blocks of inputs."""
        return (rows // self.rows if self.rows else 1), columns // self.columns

    def nbytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:  # noqa: ARG002 (of the protocol)
        groups, blocks = self.shape(rows, columns)
        further = 4 * groups * -(-blocks * self.bits * (self.terms - 1) // 8)
        return 4 * rows * self.bits * -(-columns // 32) + groups * blocks * self.bits + further

    def read(self, stored: Mapping[str, Tensor], rows: int, columns: int, dtype: torch.dtype) -> Binary:
        groups, blocks = self.shape(rows, columns)
        shape = (groups, blocks, self.bits, self.terms - 1)
        exponents = stored["weight_exponents"].view(shape[:-1])
        drops = exponents.new_zeros(shape)
        if self.terms > 1:
            drops = unpack(stored["weight_terms"], 4, blocks * self.bits * (self.terms - 1)).view(shape)
        codes = join_planes(stored["weight_signs"], columns)
        return Binary(codes, Powers(exponents, drops), dtype, self)


@dataclass(frozen=True)
class Powers:
    """Numbers of 0 or more, each a sum of few signed powers of two."""

    exponent: Tensor
    """uint8, (...): that of the first term plus 128; 0 for the number 0."""
    drop: Tensor
    """uint8, (..., E): 1 to 7 below the exponent before, plus 8 where the term is subtracted; 0: no term."""

    def terms(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Sign (float32: 1, -1 or 0 for none) and exponent (int32) of every term."""
        exponent = self.exponent.to(torch.int32) - _ZERO_EXPONENT
        yield (self.exponent > 0).float(), exponent
        for drop in self.drop.unbind(-1):
            exponent = exponent - (drop & _LARGEST_DROP)
            yield (drop > 0).float() * torch.where(drop >= _NEGATIVE, -1.0, 1.0), exponent

    def values(self) -> Tensor:
        """The numbers, float32, exact."""
        return self.shifted(torch.ones(self.exponent.shape, device=self.exponent.device))

    def shifted(self, x: Tensor) -> Tensor:
        """The products with x, by shifts and additions only."""
        return sum((sign * torch.ldexp(x, exponent) for sign, exponent in self.terms()), torch.zeros_like(x))

    def __getitem__(self, index: Tensor | slice | tuple[int | slice, ...]) -> Powers:
        return Powers(self.exponent[index], self.drop[index])


def snap(numbers: Tensor, terms: int) -> tuple[Powers, Tensor]:
    """Sums of powers of two near numbers of 0 or more, and their values: `terms` times the nearest of what is left."""
    exponent = _nearest(numbers).clamp_(min=1 - _ZERO_EXPONENT)
    alive = numbers > 0
    first = torch.where(alive, exponent + _ZERO_EXPONENT, 0).to(torch.uint8)
    left = numbers - torch.ldexp(alive.to(numbers.dtype), exponent)
    drops = []
    for _ in range(terms - 1):
        following = _nearest(left)
        drop = exponent - following
        alive = alive & (left != 0) & (drop <= _LARGEST_DROP)
        drops.append(torch.where(alive, drop + _NEGATIVE * (left < 0), 0).to(torch.uint8))
        left = left - torch.ldexp(alive * left.sign(), following)
        exponent = following
    further = torch.stack(drops, -1) if drops else numbers.new_zeros((*numbers.shape, 0), dtype=torch.uint8)
    return Powers(first, further), numbers - left


def _nearest(numbers: Tensor) -> Tensor:
    """The exponents of the nearest powers of two in logarithm, int32."""
    mantissa, exponent = torch.frexp(numbers)
    nearest: Tensor = exponent - (mantissa.abs() < 0.5**0.5).to(torch.int32)
    return nearest


@dataclass(frozen=True)
class Binary:
    """One part of an encoded weight: signs and scales."""

    codes_OI: Tensor
    """uint8: bit k is set where matrix k has +1."""
    alpha_AJN: Powers
    dtype: torch.dtype
    """Of the decoded weight."""
    form: BinaryForm

    def decode(self) -> Tensor:
        """The weight, (O, I): summed in float32, matrix by matrix, then in its own dtype."""
        rows, columns = self.codes_OI.shape
        alpha_AJN = self.alpha_AJN.values()
        codes = self.codes_OI.view(alpha_AJN.shape[0], -1, alpha_AJN.shape[1], self.form.columns)
        total = torch.zeros(codes.shape, device=codes.device)
        for k, alpha_AJ in enumerate(alpha_AJN.unbind(-1)):
            alpha = alpha_AJ[:, None, :, None]
            total += torch.where(((codes >> k) & 1).bool(), alpha, -alpha)
        return total.view(rows, columns).to(self.dtype)

    def tensors(self) -> dict[str, Tensor]:
        stored = {
            "weight_signs": slice_planes(self.codes_OI, self.form.bits),
            "weight_exponents": self.alpha_AJN.exponent,
        }
        if self.form.terms > 1:
            stored["weight_terms"] = pack(self.alpha_AJN.drop.flatten(1), 4)
        return stored

    def sample(self, start: int, step: int) -> Binary:
        """Every `step`-th output from `start`, with scales of its own."""
        return self._alone(slice(start, None, step))

    def split(self, rows: list[int]) -> list[Binary]:
        """Cut along the outputs; where that cuts a group of them, every output has scales of its own."""
        shared, pieces = self.form.rows, []
        cuts = bool(shared) and any(count % shared for count in rows)
        for count, end in zip(rows, accumulate(rows), strict=True):
            outputs = slice(end - count, end)
            alpha = self.alpha_AJN[outputs.start // shared : end // shared] if shared else self.alpha_AJN
            whole = Binary(self.codes_OI[outputs], alpha, self.dtype, self.form)
            pieces.append(self._alone(outputs) if cuts else whole)
        return pieces

    def _alone(self, outputs: slice) -> Binary:
        """Some outputs, each with scales of its own."""
        rows, groups = len(self.codes_OI), len(self.alpha_AJN.exponent)
        group_of_row = torch.arange(rows, device=self.codes_OI.device)[outputs] * groups // rows
        form = dataclasses.replace(self.form, rows=1)
        return Binary(self.codes_OI[outputs], self.alpha_AJN[group_of_row], self.dtype, form)


def product(part: Binary, inputs_TI: Tensor) -> Tensor:
    """inputs times the weight transposed, (T, O), in the inputs' dtype: no multiplication, only lookups, shifts, sums.

    For every 8 inputs a table holds the 256 sums of +-x; the signs of a row are its keys. Where all 8 share a scale, it
    shifts what was looked up; else the inputs are shifted beforehand, and each scale has tables of its own.
    """
    keys_ONC = slice_planes(part.codes_OI, part.form.bits).view(torch.uint8)
    padded_TI = torch.nn.functional.pad(inputs_TI, (0, keys_ONC.shape[-1] * _KEYS - inputs_TI.shape[1]))
    groups = len(part.alpha_AJN.exponent)
    shares = part.form.columns % _KEYS == 0
    outputs = []
    for a, keys in enumerate(keys_ONC.chunk(groups)):
        total = inputs_TI.new_zeros((len(inputs_TI), len(keys)))
        for k in range(part.form.bits):
            alpha_J = part.alpha_AJN[a, :, k]
            if shares:
                alpha_C = _stretched(alpha_J, part.form.columns // _KEYS, keys.shape[-1])
                total += alpha_C.shifted(_looked_up(padded_TI, keys[:, k])).sum(-1)
            else:
                alpha_I = _stretched(alpha_J, part.form.columns, padded_TI.shape[1])
                total += _looked_up(alpha_I.shifted(padded_TI), keys[:, k]).sum(-1)
        outputs.append(total)
    return torch.cat(outputs, 1)


def _stretched(alpha_J: Powers, times: int, size: int) -> Powers:
    """Each number so many times, and the last for what pads the inputs, which is 0."""
    index = torch.arange(size, device=alpha_J.exponent.device) // times
    return alpha_J[index.clamp_(max=len(alpha_J.exponent) - 1)]


def _looked_up(inputs_TI: Tensor, keys_OC: Tensor) -> Tensor:
    """What the keys find in the tables of the inputs: (T, O, C)."""
    bits = torch.arange(1 << _KEYS, device=inputs_TI.device)[:, None] >> torch.arange(_KEYS, device=inputs_TI.device)
    signs = ((bits & 1) * 2 - 1).to(inputs_TI.dtype)
    tables_TCK = inputs_TI.view(len(inputs_TI), -1, _KEYS) @ signs.t()
    return tables_TCK[:, torch.arange(keys_OC.shape[1], device=inputs_TI.device), keys_OC.long()]
