"""Floats of 8 and 4 bits with shared scales: FP8 (E4M3), MXFP4 and NVFP4 (both E2M1).

    w = element * step        step: the scale of the block in which the weight lies

    form    element  block                            scale                       bits per weight
    fp8     E4M3     tensor, output, 128 x 128        in the weight's dtype       8 and a little
    mxfp4   E2M1     32 inputs of an output           E8M0: 2^(byte - 127)        4.25
    nvfp4   E2M1     16 inputs of an output           E4M3 / float32 of a tensor  4.5

MXFP4: OCP Microscaling Formats (MX) 1.0. NVFP4: the layout of ModelOpt and compressed-tensors, whose names, dtypes
and packing are kept for all three. Rounding is to nearest, ties to even; what lies beyond the largest element
saturates.

Shapes: O outputs, I inputs, G blocks of inputs per output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

Scales = Literal["tensor", "channel", "block"]
Rule = Literal["floor", "ceil", "mse"]
NVFP4_SHRINKS = (1.0, 1.5, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Of a block's scale, that are tried; 1.5 puts the largest weight on 4 instead of 6."""
BLOCK = 128
"""Side of a square block of FP8 weights."""
_CHUNK = 1 << 17
"""Elements that are worked on at once: in float32 they fit a core's own cache."""


@dataclass(frozen=True)
class Element:
    """A float of a few bits."""

    largest: float
    round: Callable[[Tensor], Tensor]
    """float32 -> the nearest element, float32; saturates."""
    encode: Callable[[Tensor], Tensor]
    """float32 -> uint8 codes of the nearest elements; saturates."""
    decode: Callable[[Tensor], Tensor]
    """uint8 codes -> float32."""


def _encode_e4m3(value: Tensor) -> Tensor:
    # PyTorch's cast makes NaN of what is too large.
    return value.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)


def _decode_e4m3(codes: Tensor) -> Tensor:
    return codes.view(torch.float8_e4m3fn).float()


def _round_e4m3(value: Tensor) -> Tensor:
    return _decode_e4m3(_encode_e4m3(value))


def _round_e2m1(value: Tensor) -> Tensor:
    value = value.clamp(-6.0, 6.0)
    # Elements lie 2^(e - 1) apart, e being the exponent of the value, but at least 0.
    power = (value.view(torch.int32) & 0x7F800000).clamp_min_(0x3F800000)
    apart = power.sub_(0x00800000).view(torch.float32)
    return value.div_(apart).round_().mul_(apart)


def _encode_e2m1(value: Tensor) -> Tensor:
    value = _round_e2m1(value)
    halves = value.abs().mul_(2).to(torch.uint8)
    code = halves.clamp_max(4)
    for reached in (6, 8, 12):
        code += halves >= reached
    return code | value.signbit().to(torch.uint8) << 3


def _decode_e2m1(codes: Tensor) -> Tensor:
    positive = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    table = torch.tensor([*positive, *(-value for value in positive)], device=codes.device)
    return table.take(codes.long())


E4M3 = Element(448.0, _round_e4m3, _encode_e4m3, _decode_e4m3)
E2M1 = Element(6.0, _round_e2m1, _encode_e2m1, _decode_e2m1)


@dataclass(frozen=True)
class FP8Form:
    """E4M3 with one scale for the weight, for each output, or for each block of 128 x 128."""

    kind: ClassVar[str] = "fp8"
    full_inputs: ClassVar[bool] = False
    element: ClassVar[Element] = E4M3

    scales: Scales

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        shapes = {"tensor": (1,), "channel": (rows, 1), "block": (-(-rows // BLOCK), columns // BLOCK)}
        return shapes[self.scales]

    def nbytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        return rows * columns + torch.Size(self.scale_shape(rows, columns)).numel() * dtype.itemsize

    def read(self, stored: Mapping[str, Tensor], rows: int, columns: int, dtype: torch.dtype) -> Floats:
        codes_OI = _shaped(stored["weight"], (rows, columns), torch.float8_e4m3fn).view(torch.uint8)
        scale = _shaped(stored["weight_scale"], self.scale_shape(rows, columns), dtype)
        return Floats(codes_OI, self.spread(scale, rows), None, dtype, self)

    def spread(self, scale: Tensor, rows: int) -> Tensor:
        """(O, G) from the stored shape."""
        if self.scales == "block":
            return scale.repeat_interleave(BLOCK, 0)[:rows]
        return scale.reshape(-1, 1).expand(rows, 1)

    def steps(self, scale_OG: Tensor, global_scale: Tensor | None) -> Tensor:  # noqa: ARG002 (of NVFP4)
        return scale_OG.float()

    def tensors(self, part: Floats) -> dict[str, Tensor]:
        every = {"tensor": len(part.scale_OG), "channel": 1, "block": BLOCK}[self.scales]
        scale = part.scale_OG[::every].contiguous()
        return {
            "weight": part.codes_OI.contiguous().view(torch.float8_e4m3fn),
            "weight_scale": scale.reshape(1) if self.scales == "tensor" else scale,
        }

    def rounded(self, dtype: torch.dtype) -> torch.dtype:
        """In which dtype a reader multiplies."""
        return dtype


@dataclass(frozen=True)
class MXFP4Form:
    """E2M1 with a power of two for every 32 inputs of an output."""

    kind: ClassVar[str] = "mxfp4"
    full_inputs: ClassVar[bool] = False
    element: ClassVar[Element] = E2M1
    group: ClassVar[int] = 32

    def nbytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:  # noqa: ARG002 (of the protocol)
        return rows * columns // 2 + rows * columns // self.group

    def read(self, stored: Mapping[str, Tensor], rows: int, columns: int, dtype: torch.dtype) -> Floats:
        codes_OI = unpack(_shaped(stored["weight_packed"], (rows, columns // 2), torch.uint8))
        scale_OG = _shaped(stored["weight_scale"], (rows, columns // self.group), torch.uint8)
        return Floats(codes_OI, scale_OG, None, dtype, self)

    def steps(self, scale_OG: Tensor, global_scale: Tensor | None) -> Tensor:  # noqa: ARG002 (of NVFP4)
        return torch.ldexp(torch.ones_like(scale_OG, dtype=torch.float32), scale_OG.int() - 127)

    def tensors(self, part: Floats) -> dict[str, Tensor]:
        return {"weight_packed": pack(part.codes_OI), "weight_scale": part.scale_OG.contiguous()}

    def rounded(self, dtype: torch.dtype) -> torch.dtype:  # noqa: ARG002
        """In which dtype a reader multiplies."""
        return torch.bfloat16


@dataclass(frozen=True)
class NVFP4Form:
    """E2M1 with an E4M3 scale for every 16 inputs of an output, over a float32 divisor of the whole weight."""

    kind: ClassVar[str] = "nvfp4"
    full_inputs: ClassVar[bool] = False
    element: ClassVar[Element] = E2M1
    group: ClassVar[int] = 16

    def nbytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:  # noqa: ARG002 (of the protocol)
        return rows * columns // 2 + rows * columns // self.group + 4

    def read(self, stored: Mapping[str, Tensor], rows: int, columns: int, dtype: torch.dtype) -> Floats:
        codes_OI = unpack(_shaped(stored["weight_packed"], (rows, columns // 2), torch.uint8))
        scale_OG = _shaped(stored["weight_scale"], (rows, columns // self.group), torch.float8_e4m3fn)
        return Floats(codes_OI, scale_OG, _shaped(stored["weight_global_scale"], (1,), torch.float32), dtype, self)

    def steps(self, scale_OG: Tensor, global_scale: Tensor | None) -> Tensor:
        assert global_scale is not None, "NVFP4 has a scale of the whole weight"
        return scale_OG.float() / global_scale

    def tensors(self, part: Floats) -> dict[str, Tensor]:
        assert part.global_scale is not None, "NVFP4 has a scale of the whole weight"
        return {
            "weight_packed": pack(part.codes_OI),
            "weight_scale": part.scale_OG.contiguous(),
            "weight_global_scale": part.global_scale,
        }

    def rounded(self, dtype: torch.dtype) -> torch.dtype:  # noqa: ARG002
        """In which dtype a reader multiplies."""
        return torch.bfloat16


FloatForm = FP8Form | MXFP4Form | NVFP4Form


@dataclass(frozen=True)
class Floats:
    """One part of an encoded weight: small floats with shared scales."""

    codes_OI: Tensor
    """uint8: the bits of an element."""
    scale_OG: Tensor
    """As stored, but a row for every output."""
    global_scale: Tensor | None
    """(1,) float32, what the scales of NVFP4 are divided by (its name in compressed-tensors); else None."""
    dtype: torch.dtype
    """Of the weight."""
    form: FloatForm

    @property
    def steps_OG(self) -> Tensor:
        """By what each element is multiplied, float32."""
        return self.form.steps(self.scale_OG, self.global_scale)

    def decode(self) -> Tensor:
        """The weight, (O, I), in its dtype: what a reader of the stored form computes. A reader of four bits
        multiplies in bfloat16 whatever the dtype."""
        rows, columns = self.codes_OI.shape
        decoded = torch.empty((rows, columns), dtype=self.dtype, device=self.codes_OI.device)
        steps_OG = self.steps_OG
        step = max(1, _CHUNK // columns)
        for a in range(0, rows, step):
            elements = self.form.element.decode(self.codes_OI[a : a + step].contiguous())
            values = elements.view(len(elements), steps_OG.shape[1], -1) * steps_OG[a : a + step, :, None]
            decoded[a : a + step] = values.to(self.form.rounded(self.dtype)).view(-1, columns)
        return decoded

    def tensors(self) -> dict[str, Tensor]:
        """Stored form, in compressed-tensors' names."""
        return self.form.tensors(self)

    def sample(self, start: int, step: int) -> Floats:
        """Every `step`-th output from `start`; of a form with blocks of outputs, only to be decoded."""
        return replace(self, codes_OI=self.codes_OI[start::step], scale_OG=self.scale_OG[start::step])

    def split(self, rows: list[int]) -> list[Floats]:
        """Cut along the outputs."""
        cuts = [0, *accumulate(rows)]
        if self.form == FP8Form("block") and any(cut % BLOCK for cut in cuts[:-1]):
            raise ValueError(f"blocks of {BLOCK} outputs cannot be cut at {cuts[1:-1]}")
        return [replace(self, codes_OI=self.codes_OI[a:b], scale_OG=self.scale_OG[a:b]) for a, b in pairwise(cuts)]


def round_to_floats(weight_OI: Tensor, scale_OG: Tensor, global_scale: Tensor | None, form: FloatForm) -> Floats:
    """Round to nearest with given scales."""
    rows, columns = weight_OI.shape
    steps = form.steps(scale_OG, global_scale)
    codes_OI = torch.empty((rows, columns), dtype=torch.uint8, device=weight_OI.device)
    step = max(1, _CHUNK // columns)
    for a in range(0, rows, step):
        w = weight_OI[a : a + step].float().view(-1, steps.shape[1], columns // steps.shape[1])
        codes_OI[a : a + step] = form.element.encode(w / steps[a : a + step, :, None]).view(-1, columns)
    return Floats(codes_OI, scale_OG, global_scale, weight_OI.dtype, form)


def pack(codes_OI: Tensor) -> Tensor:
    """Two 4-bit codes to a byte, the even input in the low half: (O, I) -> (O, I / 2) uint8."""
    return codes_OI[:, ::2] | codes_OI[:, 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


def _shaped(stored: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if stored.shape != torch.Size(shape) or stored.dtype != dtype:
        raise ValueError(f"{tuple(stored.shape)} {stored.dtype} is stored where {shape} {dtype} is expected")
    return stored


def fit_fp8(weight_OI: Tensor, scales: Scales) -> Tensor:
    """Scales (O, 1), or (O, I / 128) of blocks, in the weight's dtype: largest |w| / 448; 1 where all are zero."""
    rows, columns = weight_OI.shape
    if scales == "block":
        padded = torch.nn.functional.pad(weight_OI, (0, 0, 0, -rows % BLOCK))
        largest = padded.abs().view(-1, BLOCK, columns // BLOCK, BLOCK).amax((1, 3))
    else:
        largest = weight_OI.abs().amax(1, keepdim=True)
        largest = largest if scales == "channel" else largest.amax().view(1, 1)
    # Small weights in float16 have scales below its normal numbers, which are good enough unless they vanish.
    smallest = 2.0**-24 if weight_OI.dtype == torch.float16 else torch.finfo(weight_OI.dtype).smallest_normal
    scale = (largest.float() / E4M3.largest).clamp_min(smallest).to(weight_OI.dtype)
    return FP8Form(scales).spread(torch.where(largest == 0, 1.0, scale), rows)


def fit_mxfp4(weight_OI: Tensor, rule: Rule, importance_I: Tensor | None = None) -> Tensor:
    """Scales (O, I / 32) uint8, the exponent + 127.

    "floor": floor(log2 amax) - 2, as the OCP standard proposes; what lies above 6 steps saturates.
    "ceil": ceil(log2(amax / 6)), with which nothing does.
    "mse": for each block the one of the two that loses less; sum of importance * (w - w_hat)^2, with
    `importance_I` the mean square of each input.
    """

    def candidates(largest: Tensor) -> Iterator[Tensor]:
        fraction, exponent = torch.frexp(largest)
        exponent = torch.where(largest == 0, 0, exponent - 3)
        ceil = exponent + (fraction > 0.75)
        for each in {"floor": (exponent,), "ceil": (ceil,), "mse": (ceil, exponent)}[rule]:
            yield (each + 127).clamp(0, 254).to(torch.uint8)

    return _fit(weight_OI, MXFP4Form(), None, candidates, torch.uint8, importance_I)


def fit_nvfp4(
    weight_OI: Tensor, rule: Literal["absmax", "mse"], importance_I: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scales (O, I / 16) E4M3 and their divisor d (1,) float32, so that scales d * amax / 6 are at most 448.

    d is a power of two: 128, unless the largest |w| lies outside 0.041 .. 21, and then the largest that is at most
    448 * 6 / largest |w|. Scales being floats, it makes no difference to the error; but engines stack the weights
    that share their inputs, q, k and v, and take one d for all of them.

    "absmax": amax / 6 of each block. "mse": for each block the one of NVFP4_SHRINKS times that which loses least;
    sum of importance * (w - w_hat)^2, with `importance_I` the mean square of each input.
    """
    # Below that, and for zeros, the divisor's reciprocal would not be a normal number.
    whole = weight_OI.abs().amax().float().clamp_min(2.0**-114).view(1)
    exponent = torch.frexp(E4M3.largest * E2M1.largest / whole).exponent - 1
    usual = (exponent >= 7) & (exponent <= 16)
    divisor = torch.ldexp(torch.ones_like(whole), torch.where(usual, 7, exponent))

    def candidates(largest: Tensor) -> Iterator[Tensor]:
        for shrink in NVFP4_SHRINKS if rule == "mse" else (1.0,):
            scale = largest * divisor * (shrink / E2M1.largest)
            # Never zero: a block too small for a scale of its own keeps its zeros all the same.
            yield scale.clamp(2.0**-9, E4M3.largest).to(torch.float8_e4m3fn)

    return _fit(weight_OI, NVFP4Form(), divisor, candidates, torch.float8_e4m3fn, importance_I), divisor


def _fit(
    weight_OI: Tensor,
    form: MXFP4Form | NVFP4Form,
    global_scale: Tensor | None,
    candidates: Callable[[Tensor], Iterator[Tensor]],
    dtype: torch.dtype,
    importance_I: Tensor | None,
) -> Tensor:
    """For each block the first of the scales that loses least. candidates: from the largest |w|, (R, G) float32."""
    rows, columns = weight_OI.shape
    scale_OG = torch.empty((rows, columns // form.group), dtype=dtype, device=weight_OI.device)
    weigh = 1.0 if importance_I is None else importance_I.view(1, -1, form.group)
    step = max(1, _CHUNK // columns)
    for a in range(0, rows, step):
        w = weight_OI[a : a + step].float().view(-1, columns // form.group, form.group)
        best, *others = candidates(w.abs().amax(-1))
        least = _loss(w, form, form.steps(best, global_scale), weigh)
        for other in others:
            loss = _loss(w, form, form.steps(other, global_scale), weigh)
            better = loss < least
            least = torch.where(better, loss, least)
            best = torch.where(better, other.view(torch.uint8), best.view(torch.uint8)).view(dtype)
        scale_OG[a : a + step] = best
    return scale_OG


def _loss(w: Tensor, form: MXFP4Form | NVFP4Form, steps: Tensor, weigh: Tensor | float) -> Tensor:
    steps = steps[:, :, None]
    error = form.element.round(w / steps).mul_(steps).sub_(w)
    return error.square_().mul_(weigh).sum(-1)
