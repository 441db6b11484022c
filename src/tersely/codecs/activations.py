"""What the inputs of a weight are rounded to when the model runs, as compressed-tensors' forward computes it.

    x_hat = scale * round(clip(x / scale, lowest, highest))

in the dtype of x throughout, scale included, so that what is measured here is what its readers run. Dynamic scales
are taken from the inputs themselves; static ones are fixed beforehand, from the largest |x| of calibration text, and
stored beside the weight. Rounding is to nearest, ties to even.

Shapes: ... any leading dimensions (tokens), I inputs, G blocks of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from tersely.codecs import IntegerForm, Scheme
from tersely.codecs.floats import BLOCK, E2M1, E4M3


class Activations(Protocol):
    """A quantizer of inputs. A frozen dataclass of plain values."""

    leaf: ClassVar[str]
    """Name of its stored static scale; "": it has none."""
    group: ClassVar[int]
    """The number of inputs must be a multiple of it."""

    @property
    def needs(self) -> frozenset[str]:
        """What must be measured for the static scale: "absmax", or nothing."""
        ...

    @property
    def entry(self) -> Mapping[str, Any] | None:
        """What `input_activations` of a compressed-tensors config group differs in from its defaults; None where
        it cannot say this."""
        ...

    def scale(self, absmax_I: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The static scale as it is stored, (1,), from the largest |x| of each input, for a model of this dtype; 1
        where all are zero. None: it has none."""
        ...

    def __call__(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """x rounded, (..., I), in its dtype. scale: the static one, where there is one."""
        ...


@dataclass(frozen=True)
class Number:
    """What a scaled input is rounded to."""

    type: str
    bits: int

    @property
    def half(self) -> float:
        """Half of the range, which the largest |x| is divided by."""
        return E4M3.largest if self.type == "float" else ((1 << self.bits) - 1) / 2

    def fake(self, x: Tensor, scale: Tensor) -> Tensor:
        """x on the grid of `scale`."""
        scaled = x / scale
        if self.type == "float":
            return scaled.clamp(-E4M3.largest, E4M3.largest).to(torch.float8_e4m3fn).to(scale.dtype) * scale
        top = float(1 << (self.bits - 1))
        return scaled.clamp(-top, top - 1).round() * scale

    def fitted(self, largest: Tensor) -> Tensor:
        """Scale of the largest |x|, in its dtype."""
        # A tensor, since division by a number is multiplication with its reciprocal on some devices.
        scale = largest / torch.full((), self.half, dtype=largest.dtype, device=largest.device)
        return torch.where(scale == 0, torch.finfo(largest.dtype).eps, scale)

    @property
    def entry(self) -> dict[str, Any]:
        return {"num_bits": self.bits, "type": self.type}


@dataclass(frozen=True)
class PerToken:
    """A scale for each token, from its largest |x|."""

    leaf: ClassVar[str] = ""
    group: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()

    number: Number

    @property
    def entry(self) -> dict[str, Any]:
        return {**self.number.entry, "strategy": "token", "dynamic": True}

    def scale(self, absmax_I: Tensor, dtype: torch.dtype) -> None:  # noqa: ARG002 (of the protocol)
        return None

    def __call__(self, x: Tensor, scale: Tensor | None = None) -> Tensor:  # noqa: ARG002 (of the protocol)
        return self.number.fake(x, self.number.fitted(x.abs().amax(-1, keepdim=True))) if x.numel() else x


@dataclass(frozen=True)
class PerBlock:
    """A scale for each 128 inputs of a token: what engines do that multiply blocks of FP8."""

    leaf: ClassVar[str] = ""
    group: ClassVar[int] = BLOCK
    needs: ClassVar[frozenset[str]] = frozenset()

    number: Number

    @property
    def entry(self) -> dict[str, Any]:
        return {**self.number.entry, "strategy": "group", "group_size": self.group, "dynamic": True}

    def scale(self, absmax_I: Tensor, dtype: torch.dtype) -> None:  # noqa: ARG002 (of the protocol)
        return None

    def __call__(self, x: Tensor, scale: Tensor | None = None) -> Tensor:  # noqa: ARG002 (of the protocol)
        blocks = x.reshape(*x.shape[:-1], x.shape[-1] // self.group, self.group)
        return PerToken(self.number)(blocks).flatten(-2)


@dataclass(frozen=True)
class PerTensor:
    """One static scale for all inputs of a weight."""

    leaf: ClassVar[str] = "input_scale"
    group: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset({"absmax"})

    number: Number

    @property
    def entry(self) -> dict[str, Any]:
        return {**self.number.entry, "strategy": "tensor", "dynamic": False, "observer": "static_minmax"}

    def scale(self, absmax_I: Tensor, dtype: torch.dtype) -> Tensor:
        largest = absmax_I.amax().view(1).to(dtype)
        return torch.where(largest == 0, 1.0, self.number.fitted(largest))

    def __call__(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.number.fake(x, _given(scale).to(x.dtype))


@dataclass(frozen=True)
class Outliers:
    """LLM.int8() (Dettmers et al., NeurIPS 2022, arXiv 2208.07339): int8 per token, but large inputs stay.

    An input of which any token has |x| >= threshold stays as it is for all of them. The others are rounded to
    c / 127 * (-127 .. 127), c being the largest |x| below the threshold of their token.
    """

    leaf: ClassVar[str] = ""
    group: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()
    entry: ClassVar[None] = None

    threshold: float = 6.0

    def scale(self, absmax_I: Tensor, dtype: torch.dtype) -> None:  # noqa: ARG002 (of the protocol)
        return None

    def __call__(self, x: Tensor, scale: Tensor | None = None) -> Tensor:  # noqa: ARG002 (of the protocol)
        if not x.numel():
            return x
        value = x.float()
        large = value.abs() >= self.threshold
        step = value.masked_fill(large, 0).abs().amax(-1, keepdim=True) / 127
        step = torch.where(step == 0, 1.0, step)
        rounded = (value / step).round_().clamp_(-127, 127).mul_(step).to(x.dtype)
        return torch.where(large.view(-1, x.shape[-1]).any(0), x, rounded)


@dataclass(frozen=True)
class MXFP4Blocks:
    """E2M1 with a power of two for every 32 inputs of a token.

    2^e, e = floor(log2 amax) - 2, and one more where amax is 1.75 * 2^floor(log2 amax) or above.
    """

    leaf: ClassVar[str] = ""
    group: ClassVar[int] = 32
    needs: ClassVar[frozenset[str]] = frozenset()

    @property
    def entry(self) -> dict[str, Any]:
        return {**_E2M1, "strategy": "group", "group_size": self.group, "dynamic": True, "scale_dtype": "torch.uint8"}

    def scale(self, absmax_I: Tensor, dtype: torch.dtype) -> None:  # noqa: ARG002 (of the protocol)
        return None

    def __call__(self, x: Tensor, scale: Tensor | None = None) -> Tensor:  # noqa: ARG002 (of the protocol)
        if not x.numel():
            return x
        blocks = x.reshape(*x.shape[:-1], x.shape[-1] // self.group, self.group)
        largest = blocks.abs().amax(-1, keepdim=True)
        # Beyond three quarters of the way to the next power of two, it is the next.
        mantissa = _MANTISSA[x.dtype]
        bits = largest.view(torch.int32 if x.dtype == torch.float32 else torch.int16)
        power = ((bits + (1 << (mantissa - 2))) >> mantissa << mantissa).view(x.dtype)
        exponent = (127 + power.log2().floor() - 2).clamp(0, 255)
        step = torch.exp2(exponent.float() - 127).to(x.dtype)
        # float16 has no number that small.
        step = torch.where(step == 0, 1.0, step)
        return (E2M1.round((blocks / step).float()) * step).to(x.dtype).flatten(-2)


@dataclass(frozen=True)
class NVFP4Blocks:
    """E2M1 with an E4M3 scale for every 16 inputs of a token, over a static float32 divisor: 448 * 6 / largest |x|."""

    leaf: ClassVar[str] = "input_global_scale"
    group: ClassVar[int] = 16
    needs: ClassVar[frozenset[str]] = frozenset({"absmax"})

    @property
    def entry(self) -> dict[str, Any]:
        return {
            **_E2M1,
            "strategy": "tensor_group",
            "group_size": self.group,
            "dynamic": "local",
            "observer": "static_minmax",
            "scale_dtype": "torch.float8_e4m3fn",
        }

    def scale(self, absmax_I: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG002 (of the protocol)
        largest = absmax_I.float().amax().view(1)
        return torch.where(largest > 2.0**-100, E4M3.largest * E2M1.largest / largest, 1.0)

    def __call__(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        divisor = _given(scale)
        if not x.numel():
            return x
        blocks = x.reshape(*x.shape[:-1], x.shape[-1] // self.group, self.group)
        largest = blocks.abs().amax(-1, keepdim=True)
        step = largest / torch.full((), E2M1.largest, dtype=x.dtype, device=x.device)
        step = (step * divisor).clamp(-E4M3.largest, E4M3.largest).to(torch.float8_e4m3fn).float()
        step = torch.where(step == 0, 0.125, step) / divisor
        return (E2M1.round(blocks / step) * step).to(x.dtype).flatten(-2)


def _given(scale: Tensor | None) -> Tensor:
    if scale is None:
        raise TypeError("these activations have a static scale, which must be given")
    return scale


_E2M1 = {"num_bits": 4, "type": "float"}
_MANTISSA = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}

ACTIVATIONS: Mapping[str, Activations] = {
    "int8": PerToken(Number("int", 8)),
    "int6": PerToken(Number("int", 6)),
    "int4": PerToken(Number("int", 4)),
    "int8-static": PerTensor(Number("int", 8)),
    "int8-outliers": Outliers(),
    "fp8": PerToken(Number("float", 8)),
    "fp8-block": PerBlock(Number("float", 8)),
    "fp8-static": PerTensor(Number("float", 8)),
    "mxfp4": MXFP4Blocks(),
    "nvfp4": NVFP4Blocks(),
}
"""Name in a recipe -> what the inputs go through."""


def layout(scheme: Scheme) -> Scheme:
    """A scheme as compressed-tensors lays it out: engines that multiply integers read a byte for each code."""
    multiplied = scheme.activations in ("int8", "int8-static")
    parts = tuple(
        replace(form, packed=False) if multiplied and isinstance(form, IntegerForm) and form.bits in (4, 8) else form
        for form in scheme.parts
    )
    return replace(scheme, parts=parts)
