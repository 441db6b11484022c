"""Codebooks: each weight is a label of one of a few values, which no formula spaces evenly.

- `Lookup`: every output has a table of 2^bits values of its own.
- `NormalFloats`: all share the 16 levels of NF4 in -1 .. 1, times the largest magnitude of a block of weights.

Shapes: O outputs, I inputs, K = 2^bits values of a table, B blocks, S blocks of blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from tersely.codecs.integer import pack, unpack

NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Of bitsandbytes, in float32."""
DOUBLE_BLOCK = 256
"""Blocks whose magnitudes share a scale under double quantization."""
_SMALLEST = 1e-38
_CHUNK = 1 << 20
"""Weights that are worked on at once."""


@dataclass(frozen=True)
class LookupForm:
    """Labels of `bits` bits into a table of 2^bits values per output."""

    kind: ClassVar[str] = "lookup"
    full_inputs: ClassVar[bool] = False

    bits: int

    def nbytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        return 4 * rows * -(-columns * self.bits // 32) + rows * (dtype.itemsize << self.bits)

    def read(self, stored: Mapping[str, Tensor], rows: int, columns: int, dtype: torch.dtype) -> Lookup:
        labels, table = unpack(stored["weight_labels"], self.bits, columns), stored["weight_table"]
        if labels.shape != (rows, columns) or table.shape != (rows, 1 << self.bits) or table.dtype != dtype:
            raise ValueError(
                f"labels of {rows} rows and {columns} columns and a table of {1 << self.bits} are expected"
            )
        return Lookup(labels, table, self)


@dataclass(frozen=True)
class Lookup:
    """One part of an encoded weight: labels into a table per output."""

    labels_OI: Tensor
    """uint8, 0 .. 2^bits - 1."""
    table_OK: Tensor
    """In the weight's dtype."""
    form: LookupForm

    def decode(self) -> Tensor:
        """The weight, (O, I), in the table's dtype."""
        return self.table_OK.gather(1, self.labels_OI.long())

    def tensors(self) -> dict[str, Tensor]:
        """Stored form: packed labels and the tables."""
        return {"weight_labels": pack(self.labels_OI, self.form.bits), "weight_table": self.table_OK}

    def sample(self, start: int, step: int) -> Lookup:
        """Every `step`-th output from `start`."""
        return Lookup(self.labels_OI[start::step], self.table_OK[start::step], self.form)

    def split(self, rows: list[int]) -> list[Lookup]:
        """Cut along the outputs."""
        pairs = zip(torch.split(self.labels_OI, rows), torch.split(self.table_OK, rows), strict=True)
        return [Lookup(labels, table, self.form) for labels, table in pairs]


def nearest_labels(weight_OI: Tensor, table_OK: Tensor) -> Tensor:
    """Labels, uint8, of the values of ascending tables that are nearest; the lower one of two that are equally near."""
    labels = torch.empty(weight_OI.shape, dtype=torch.uint8, device=weight_OI.device)
    step = max(1, _CHUNK // weight_OI.shape[1])
    for a in range(0, len(labels), step):
        # In float64 the midpoint of two neighbouring floats lies between them.
        table = table_OK[a : a + step].double()
        middles = (table[:, 1:] + table[:, :-1]) / 2
        labels[a : a + step] = torch.searchsorted(middles, weight_OI[a : a + step].double())
    return labels


@dataclass(frozen=True)
class NormalFloatForm:
    """NF4: 4-bit labels of fixed levels, and the largest magnitude of each `block` of weights, taken row by row.

    A block may begin in one row and end in another. `double`: the magnitudes are themselves stored in 8 bits.
    """

    kind: ClassVar[str] = "nf4"
    full_inputs: ClassVar[bool] = False

    block: int
    double: bool

    def nbytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:  # noqa: ARG002 (of the protocol)
        blocks = -(-rows * columns // self.block)
        magnitudes = blocks + 4 * -(-blocks // DOUBLE_BLOCK) + 4 if self.double else 4 * blocks
        return -(-rows * columns // 2) + magnitudes

    def read(self, stored: Mapping[str, Tensor], rows: int, columns: int, dtype: torch.dtype) -> NormalFloats:
        packed = stored["weight_nf4"]
        if packed.dtype != torch.uint8 or packed.shape != (-(-rows * columns // 2),):
            raise ValueError(f"two codes a byte of {rows} rows and {columns} columns are expected")
        codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: rows * columns].view(rows, columns)
        names = ("weight_absmax", "weight_absmax_scale", "weight_absmax_offset") if self.double else ("weight_absmax",)
        magnitudes = Magnitudes(*(stored[name] for name in names))
        blocks = -(-rows * columns // self.block)
        shapes = [(blocks,), (-(-blocks // DOUBLE_BLOCK),), (1,)][: len(names)]
        if [tuple(stored[name].shape) for name in names] != shapes:
            raise ValueError(f"the magnitudes of {blocks} blocks are expected")
        if magnitudes.absmax_B.dtype != (torch.uint8 if self.double else torch.float32):
            raise ValueError(f"magnitudes in {'8 bits' if self.double else 'float32'} are expected")
        return NormalFloats(codes, magnitudes, dtype, self)


@dataclass(frozen=True)
class Magnitudes:
    """The largest magnitude of every block: float32, or a code of 8 bits where there are a scale and an offset."""

    absmax_B: Tensor
    scale_S: Tensor | None = None
    """float32, one for every 256 blocks."""
    offset: Tensor | None = None
    """Mean of all magnitudes, float32, (1,)."""

    def decode(self) -> Tensor:
        """(B,), float32, none below 0."""
        if self.scale_S is None or self.offset is None:
            return self.absmax_B
        scale_B = self.scale_S.repeat_interleave(DOUBLE_BLOCK)[: len(self.absmax_B)]
        levels = dynamic_levels().to(scale_B.device)
        return (levels[self.absmax_B.long()] * scale_B + self.offset).clamp_(min=0)


@dataclass(frozen=True)
class NormalFloats:
    """One part of an encoded weight: levels of NF4, or every `step`-th of its rows from `first`."""

    codes_OI: Tensor
    """uint8, 0 .. 15."""
    magnitudes: Magnitudes
    """Of all blocks of the whole weight."""
    dtype: torch.dtype
    """Of the weight."""
    form: NormalFloatForm
    first: int = 0
    step: int = 1

    def decode(self) -> Tensor:
        """The weight, (O, I): level * magnitude in float32, rounded to its dtype."""
        rows, columns = self.codes_OI.shape
        device = self.codes_OI.device
        absmax_B = self.magnitudes.decode()
        levels = torch.tensor(NF4_LEVELS, device=device)
        weight = torch.empty((rows, columns), dtype=self.dtype, device=device)
        chunk = max(1, _CHUNK // columns)
        for a in range(0, rows, chunk):
            b = min(a + chunk, rows)
            row = self.first + self.step * torch.arange(a, b, device=device)
            block = torch.div(
                row[:, None] * columns + torch.arange(columns, device=device), self.form.block, rounding_mode="floor"
            )
            weight[a:b] = levels[self.codes_OI[a:b].long()] * absmax_B[block]
        return weight

    def tensors(self) -> dict[str, Tensor]:
        """Stored form: two codes a byte, the first in its high half (as in bitsandbytes); magnitudes.

        ValueError for some rows of a weight: they share blocks with others.
        """
        own = self.magnitudes
        if (self.first, self.step, -(-self.codes_OI.numel() // self.form.block)) != (0, 1, len(own.absmax_B)):
            raise ValueError("rows of a weight in NF4 cannot be stored without the others: they share blocks")
        flat = self.codes_OI.flatten()
        even, odd = flat[0::2], flat[1::2]
        packed = even << 4
        packed[: len(odd)] |= odd
        stored = {"weight_nf4": packed, "weight_absmax": own.absmax_B}
        if own.scale_S is not None and own.offset is not None:
            stored |= {"weight_absmax_scale": own.scale_S, "weight_absmax_offset": own.offset}
        return stored

    def sample(self, start: int, step: int) -> NormalFloats:
        """Every `step`-th output from `start`."""
        return self._rows(self.codes_OI[start::step], start, step)

    def split(self, rows: list[int]) -> list[NormalFloats]:
        """Cut along the outputs."""
        starts = [0, *accumulate(rows)][:-1]
        return [self._rows(codes, a, 1) for codes, a in zip(torch.split(self.codes_OI, rows), starts, strict=True)]

    def _rows(self, codes_OI: Tensor, start: int, step: int) -> NormalFloats:
        first = self.first + self.step * start
        return NormalFloats(codes_OI, self.magnitudes, self.dtype, self.form, first, self.step * step)


def round_to_levels(weight_OI: Tensor, form: NormalFloatForm) -> NormalFloats:
    """Every weight to the nearest level times its block's stored magnitude; the lower one of two equally near.

    A block of zeros has magnitude 0.
    """
    flat = weight_OI.flatten()
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    step = -(-_CHUNK // form.block) * form.block
    chunks = [flat[a : a + step] for a in range(0, len(flat), step)]
    magnitudes = _magnitudes(torch.cat([_blocks(chunk, form.block).abs().amax(1) for chunk in chunks]), form.double)
    absmax_B = magnitudes.decode().clamp(min=_SMALLEST)
    levels = torch.tensor(NF4_LEVELS, device=flat.device)
    middles = (levels[1:] + levels[:-1]) / 2
    for i, chunk in enumerate(chunks):
        a = i * step // form.block
        blocks = _blocks(chunk, form.block)
        labels = torch.bucketize(blocks / absmax_B[a : a + len(blocks), None], middles)
        codes[i * step : i * step + len(chunk)] = labels.flatten()[: len(chunk)]
    return NormalFloats(codes.view(weight_OI.shape), magnitudes, weight_OI.dtype, form)


def dynamic_levels() -> Tensor:
    """The 256 values of the signed dynamic 8-bit code of bitsandbytes (Dettmers, arXiv 1511.04561), ascending.

    In the decade that ends at 10^-k, k = 0 .. 6, lie the middles of 2^(6-k) equal stretches of 0.1 .. 1, both signs;
    beside them there are 0 and 1.
    """
    positive = []
    for k in range(7):
        ends = torch.linspace(0.1, 1, (1 << (6 - k)) + 1, dtype=torch.float64)
        positive.append((ends[1:] + ends[:-1]) / 2 * 10.0**-k)
    half = torch.cat(positive)
    return torch.cat([half, -half, torch.tensor([0.0, 1.0], dtype=torch.float64)]).sort().values.float()


def _magnitudes(absmax_B: Tensor, double: bool) -> Magnitudes:
    if not double:
        return Magnitudes(absmax_B)
    offset = absmax_B.mean()
    blocks_S = _blocks(absmax_B - offset, DOUBLE_BLOCK)
    scale_S = blocks_S.abs().amax(1)
    levels = dynamic_levels().to(absmax_B.device)
    codes = torch.bucketize(blocks_S / scale_S[:, None].clamp(min=_SMALLEST), (levels[1:] + levels[:-1]) / 2)
    return Magnitudes(codes.flatten()[: len(absmax_B)].to(torch.uint8), scale_S, offset[None])


def _blocks(flat: Tensor, block: int) -> Tensor:
    """(blocks, block) in float32, the last one filled up with zeros."""
    return torch.nn.functional.pad(flat.float(), (0, -len(flat) % block)).view(-1, block)
