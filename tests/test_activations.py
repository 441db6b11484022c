"""What inputs are rounded to: bit for bit what compressed-tensors' own forward computes, and the laws of its card."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStatus
from compressed_tensors.quantization.lifecycle import forward
from torch import Tensor, nn

from tersely.codecs.activations import ACTIVATIONS, Activations, MXFP4Blocks, Outliers, PerTensor

THEIRS: Any = forward  # untyped
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
NAMES = pytest.mark.parametrize("name", ACTIVATIONS)
SAYABLE = pytest.mark.parametrize("name", [name for name, each in ACTIVATIONS.items() if each.entry is not None])


def hidden(seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """(2, 9, 256) with large inputs, a token of zeros, ties and numbers at the ends of the dtype."""
    x_BLI = torch.randn((2, 9, 256), generator=torch.Generator().manual_seed(seed)) * scale
    x_BLI[..., ::17] *= 20
    x_BLI[0, 3] = 0
    x_BLI[1, 2, :32] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(4)
    x_BLI[1, 3, :32] = -7.0
    x_BLI[1, 4] *= 1e-6
    x_BLI[1, 5, 32:64] = torch.finfo(dtype).tiny / 4
    return x_BLI.to(dtype)


def given(activations: Activations, x: Tensor) -> Tensor | None:
    """The static scale, taken from half of the inputs, so that some lie beyond it."""
    return activations.scale(x[0].abs().flatten(0, -2).amax(0).float() / 2, x.dtype)


def theirs(activations: Activations, x: Tensor) -> Tensor:
    assert activations.entry is not None
    args = QuantizationArgs.model_validate(dict(activations.entry))
    module: Any = nn.Module()
    module.quantization_status = QuantizationStatus.COMPRESSED
    scale = given(activations, x)
    if scale is not None:
        module.register_parameter(activations.leaf, nn.Parameter(scale, requires_grad=False))
    result: Tensor = THEIRS.forward_quantize(module, x, "input", args)
    return result


@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0])
@DTYPES
@SAYABLE
def test_inputs_are_rounded_bit_for_bit_as_compressed_tensors_does(name: str, dtype: torch.dtype, scale: float) -> None:
    activations = ACTIVATIONS[name]
    x = hidden(scale=scale, dtype=dtype)
    own = activations(x, given(activations, x))
    assert own.dtype == dtype
    assert torch.equal(own, theirs(activations, x))
    assert not torch.equal(own, x)


@DTYPES
@NAMES
def test_inputs_are_left_as_they_were_and_zeros_stay_zero(name: str, dtype: torch.dtype) -> None:
    activations, x = ACTIVATIONS[name], hidden(dtype=dtype)
    before = x.clone()
    rounded = activations(x, given(activations, x))
    assert torch.equal(x, before)
    assert bool((rounded[0, 3] == 0).all())
    assert bool(torch.isfinite(rounded).all())
    nothing = x[:, :0]
    assert activations(nothing, given(activations, x)).shape == nothing.shape


@NAMES
def test_a_token_is_rounded_alike_in_any_batch(name: str) -> None:
    """Of LLM.int8() the outliers are those of a batch: below its threshold there are none."""
    activations = ACTIVATIONS[name]
    x = hidden().clamp(-5.9, 5.9)
    scale = given(activations, x)
    assert torch.equal(activations(x, scale)[1, 4], activations(x[1, 4], scale))
    assert torch.equal(activations(x, scale).flatten(0, 1), activations(x.flatten(0, 1), scale))


@NAMES
def test_what_needs_a_static_scale_says_what_must_be_measured_and_refuses_to_go_without(name: str) -> None:
    activations, x = ACTIVATIONS[name], hidden()
    scale = given(activations, x)
    assert (scale is not None) == bool(activations.leaf) == (activations.needs == {"absmax"})
    assert x.shape[-1] % activations.group == 0
    if scale is not None:
        assert scale.shape == (1,)
        with pytest.raises(TypeError, match="static scale"):
            activations(x)
        unseen = activations.scale(torch.zeros(256), torch.bfloat16)
        assert unseen is not None
        assert float(unseen) == 1


@pytest.mark.parametrize("name", ["int8", "int6", "int4", "fp8", "int8-static", "fp8-static", "int8-outliers"])
def test_the_error_of_a_scaled_input_is_half_a_step_or_a_sixteenth(name: str) -> None:
    activations = ACTIVATIONS[name]
    x = torch.randn((5, 64), generator=torch.Generator().manual_seed(1))
    scale = activations.scale(x.abs().amax(0), torch.float32)
    error = (activations(x, scale) - x).abs()
    largest = x.abs().amax() if scale is not None else x.abs().amax(-1, keepdim=True)
    if "fp8" in name:
        assert bool((error <= torch.maximum(x.abs() / 16, largest / 448 * 2.0**-10) * (1 + 1e-5)).all())
    else:
        bits = int(name[3])
        half = 127.0 if name == "int8-outliers" else ((1 << bits) - 1) / 2
        assert bool((error <= largest / half / 2 * (1 + 1e-5)).all())


@pytest.mark.parametrize("name", ["fp8", "mxfp4", "int8", "int4"])
def test_dynamic_scales_follow_powers_of_two(name: str) -> None:
    x = torch.randn((5, 64), generator=torch.Generator().manual_seed(2))
    assert torch.equal(ACTIVATIONS[name](x * 2.0**7), ACTIVATIONS[name](x) * 2.0**7)


def test_beyond_a_static_scale_inputs_saturate_and_are_no_nan() -> None:
    for name, top in (("fp8-static", 448), ("int8-static", 127)):
        activations = ACTIVATIONS[name]
        assert isinstance(activations, PerTensor)
        scale = torch.ones(1)
        assert float(activations(torch.tensor([[1e6]]), scale)) == top


# LLM.int8(), by its card


def outlying(seed: int = 0) -> Tensor:
    x = torch.randn((32, 64), generator=torch.Generator().manual_seed(seed)).clamp(-5, 5)
    x[:, [3, 40]] *= 12
    return x


def test_with_a_tiny_threshold_every_input_stays() -> None:
    x = outlying()
    assert torch.equal(Outliers(1e-30)(x), x)


def test_with_an_infinite_threshold_it_is_plain_int8_per_token() -> None:
    x = outlying()
    scale = x.abs().amax(-1, keepdim=True) / 127
    assert torch.equal(Outliers(float("inf"))(x), (x / scale).round() * scale)


def test_outliers_stay_and_make_the_error_of_the_rest_much_smaller() -> None:
    x = outlying()
    kept = (x.abs() >= 6).any(0)
    assert 1 <= int(kept.sum()) <= 2
    rounded = ACTIVATIONS["int8-outliers"](x)
    assert torch.equal(rounded[:, kept], x[:, kept])
    plain = ACTIVATIONS["int8"](x)
    assert float((rounded - x).square().sum()) < 0.1 * float((plain - x).square().sum())


def test_the_integers_of_the_rest_are_those_of_the_published_algorithm() -> None:
    """Row maxima are taken after the outlying entries are zeroed, but the rest of their columns counts."""
    x = outlying(3)
    large = x.abs() >= 6
    kept = large.any(0)
    top = torch.where(large, 0.0, x).abs().amax(-1, keepdim=True)
    codes = torch.where(kept, 0.0, (127 * x.double() / top.double()).round()).long()
    weight = torch.randint(-127, 128, (16, 64), generator=torch.Generator().manual_seed(4))
    reference = (codes @ weight.t()).double() * (top.double() / 127)
    own = torch.where(kept, 0.0, ACTIVATIONS["int8-outliers"](x)).double() @ weight.double().t()
    assert torch.allclose(own, reference, rtol=1e-5, atol=1e-4)


def test_blocks_of_mxfp4_whose_largest_is_6_times_a_power_of_two_are_exact() -> None:
    block = torch.tensor([6.0, 4, 3, 2, 1.5, 1, 0.5, 0]).repeat(4)
    x = torch.stack([block * 2.0**k for k in (-9, 0, 5)])
    assert torch.equal(MXFP4Blocks()(x), x)
