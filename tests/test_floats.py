"""FP8, MXFP4 and NVFP4: elements, scales and packing as on their cards, and the methods that leave them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersely.codecs.floats import (
    E2M1,
    E4M3,
    Element,
    Floats,
    FP8Form,
    MXFP4Form,
    NVFP4Form,
    fit_fp8,
    fit_mxfp4,
    fit_nvfp4,
    pack,
    round_to_floats,
    unpack,
)
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.encode.fp8 import FP8
from tersely.methods.encode.mxfp4 import MXFP4
from tersely.methods.encode.nvfp4 import NVFP4

LOOKUP: Any = BaseCompressor  # untyped
ELEMENTS = pytest.mark.parametrize("element", [E4M3, E2M1], ids=["E4M3", "E2M1"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
KINDS = ("tensor", "channel", "block", "mxfp4", "nvfp4")
EVERY = pytest.mark.parametrize("kind", KINDS)
METHODS = pytest.mark.parametrize("method", [FP8, MXFP4, NVFP4])
seeds = st.integers(0, 2**31)


def gaussian(rows: int = 32, columns: int = 256, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)).to(dtype)


def nearest(weight_OI: Tensor, kind: str, rule: str = "") -> Floats:
    """By the rules that leave most to the scales' own: no search."""
    if kind == "mxfp4":
        return round_to_floats(weight_OI, fit_mxfp4(weight_OI, rule or "ceil"), None, MXFP4Form())  # type: ignore[arg-type]
    if kind == "nvfp4":
        return round_to_floats(weight_OI, *fit_nvfp4(weight_OI, rule or "absmax"), NVFP4Form())  # type: ignore[arg-type]
    return round_to_floats(weight_OI, fit_fp8(weight_OI, kind), None, FP8Form(kind))  # type: ignore[arg-type]


def exactly(part: Floats) -> Tensor:
    """Element times step in float64."""
    rows, columns = part.codes_OI.shape
    elements = part.form.element.decode(part.codes_OI).double().view(rows, part.steps_OG.shape[1], -1)
    return (elements * part.steps_OG.double()[:, :, None]).view(rows, columns)


def rmse(weight_OI: Tensor, part: Floats) -> float:
    return float((exactly(part) - weight_OI.double()).square().mean().sqrt())


def measured(columns: int = 256, seed: int = 0, tokens: int = 512) -> Statistics:
    generator = torch.Generator().manual_seed(1000 + seed)
    mix = torch.randn((columns, columns), generator=generator) * torch.rand(columns, generator=generator) ** 2
    stats = Statistics(columns)
    stats.add(torch.randn((tokens, columns), generator=generator) @ mix)
    return stats.finish()


def lost(weight_OI: Tensor, decoded_OI: Tensor, gram_II: Tensor) -> float:
    delta = (weight_OI - decoded_OI).double()
    return float((delta @ gram_II.double() * delta).sum())


# Elements


@ELEMENTS
def test_all_codes_of_an_element_round_trip(element: Element) -> None:
    codes = torch.arange(256 if element is E4M3 else 16, dtype=torch.uint8)
    values = element.decode(codes)
    kept = values.isfinite()
    assert int((~kept).sum()) == (2 if element is E4M3 else 0)
    assert torch.equal(element.encode(values)[kept], codes[kept])
    assert float(values[kept].max()) == element.largest == -float(values[kept].min())


@ELEMENTS
@given(seed=seeds, exponent=st.integers(-12, 12))
@settings(deadline=None, max_examples=30)
def test_elements_are_the_nearest_ones(element: Element, seed: int, exponent: int) -> None:
    value = gaussian(1, 512, seed)[0] * 2.0**exponent
    all_codes = torch.arange(256 if element is E4M3 else 16, dtype=torch.uint8)
    every = element.decode(all_codes)
    every = every[every.isfinite()]
    error = (value[:, None] - every).abs().amin(1)
    rounded = element.round(value)
    assert torch.equal((rounded - value).abs(), error)
    assert torch.equal(element.decode(element.encode(value)), rounded)
    order = value.argsort()
    assert bool((rounded[order].diff() >= 0).all())


def test_ties_of_four_bits_go_to_the_even_mantissa() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    ends = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    assert torch.equal(E2M1.round(ties), ends)
    assert torch.equal(E2M1.round(-ties), -ends)
    up, down = torch.nextafter(ties, torch.tensor(9.0)), torch.nextafter(ties, torch.tensor(0.0))
    assert torch.equal(E2M1.round(up), torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]))
    assert torch.equal(E2M1.round(down), torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]))


def test_the_relative_error_of_fp8_is_a_sixteenth_at_most() -> None:
    value = gaussian(64) * torch.linspace(-5, 5, 64).exp2()[:, None]
    normal = (value.abs() >= 2.0**-6) & (value.abs() <= 448)
    assert bool(((E4M3.round(value) - value).abs() <= value.abs() / 16)[normal].all())


@ELEMENTS
def test_what_is_too_large_saturates_and_is_no_nan(element: Element) -> None:
    huge = torch.tensor([1e6 * element.largest, -1e30, torch.inf])
    assert torch.equal(element.round(huge), element.largest * torch.tensor([1.0, -1, 1]))


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 5), pairs=st.integers(1, 9), seed=seeds)
def test_packed_codes_unpack_to_themselves_with_the_even_input_in_the_low_half(
    rows: int, pairs: int, seed: int
) -> None:
    codes = torch.randint(0, 16, (rows, 2 * pairs), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes)), codes)
    assert torch.equal(pack(codes)[:, 0] & 15, codes[:, 0])


# Against the library whose layout it is


PRESETS = {"channel": "FP8_DYNAMIC", "tensor": "FP8", "block": "FP8_BLOCK", "mxfp4": "MXFP4A16", "nvfp4": "NVFP4A16"}
FORMATS = {"mxfp4": "mxfp4-pack-quantized", "nvfp4": "nvfp4-pack-quantized"}


@DTYPES
@EVERY
def test_stored_tensors_are_those_of_compressed_tensors_and_decode_alike(kind: str, dtype: torch.dtype) -> None:
    weight_OI = gaussian(160, dtype=dtype)
    part = nearest(weight_OI, kind)
    stored = part.tensors()
    scheme = preset_name_to_scheme(PRESETS[kind], ["Linear"])
    compressor = LOOKUP.get_value_from_registry(FORMATS.get(kind, "float-quantized"))
    scale = stored["weight_scale"]
    if kind in FORMATS:
        form = part.form
        scale = form.steps(part.scale_OG, None if part.global_scale is None else torch.ones(1))
    # In float32 they divide as exactly as we do.
    given = {"weight": weight_OI.float(), "weight_scale": scale}
    if part.global_scale is not None:
        given["weight_global_scale"] = part.global_scale
    theirs = compressor.compress(given, scheme)
    assert theirs.keys() == stored.keys()
    for name, tensor in stored.items():
        assert theirs[name].dtype == tensor.dtype, name
        assert torch.equal(theirs[name].view(torch.uint8), tensor.view(torch.uint8)), name
    decoded = compressor.decompress(dict(stored), scheme)["weight"].to(dtype)
    assert torch.equal(part.decode(), decoded)
    assert part.decode().dtype == dtype


@DTYPES
@EVERY
def test_what_is_stored_is_read_back_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    part = nearest(gaussian(160, dtype=dtype), kind)
    stored = part.tensors()
    read = part.form.read(stored, 160, 256, dtype)
    assert torch.equal(read.decode(), part.decode())
    assert all(torch.equal(t.view(torch.uint8), stored[n].view(torch.uint8)) for n, t in read.tensors().items())
    assert sum(t.numel() * t.element_size() for t in stored.values()) == part.form.nbytes(160, 256, dtype)
    with pytest.raises(ValueError, match="is expected"):
        part.form.read(stored, 161, 256, dtype)


# Scales


@DTYPES
@EVERY
def test_decoded_weights_round_to_the_same_codes_with_their_scales(kind: str, dtype: torch.dtype) -> None:
    part = nearest(gaussian(dtype=dtype), kind)
    again = round_to_floats(part.decode(), part.scale_OG, part.global_scale, part.form)
    assert torch.equal(again.decode(), part.decode())


@pytest.mark.parametrize("kind", ["tensor", "channel", "block", "mxfp4"])
@given(seed=seeds, exponent=st.integers(-8, 8))
@settings(deadline=None, max_examples=10)
def test_powers_of_two_pass_through(kind: str, seed: int, exponent: int) -> None:
    weight_OI = gaussian(4, 128, seed)
    scaled = nearest(weight_OI * 2.0**exponent, kind)
    assert torch.equal(scaled.decode(), nearest(weight_OI, kind).decode() * 2.0**exponent)


@pytest.mark.parametrize("rule", ["floor", "ceil", "mse"])
def test_a_block_of_mxfp4_whose_largest_is_6_times_a_power_of_two_is_exact(rule: str) -> None:
    block = torch.tensor([6.0, -4, 3, 2, 1.5, -1, 0.5, 0]).repeat(4)
    weight_OI = torch.stack([block * 2.0**k for k in range(-20, 20)])
    assert torch.equal(nearest(weight_OI, "mxfp4", rule).decode(), weight_OI)


def test_the_rules_of_mxfp4_differ_where_the_first_saturates() -> None:
    """floor(log2 amax) - 2 and ceil(log2(amax / 6)), in float64, also at their ends."""
    largest = torch.cat([torch.linspace(0.01, 40, 4001), 6 * torch.linspace(-9, 9, 19).exp2()])
    weight_OI = largest[:, None].repeat(1, 32)
    floor = fit_mxfp4(weight_OI, "floor")[:, 0].double() - 127
    ceil = fit_mxfp4(weight_OI, "ceil")[:, 0].double() - 127
    assert torch.equal(floor, largest.double().log2().floor() - 2)
    assert torch.equal(ceil, (largest.double() / 6).log2().ceil())
    assert bool((nearest(weight_OI, "mxfp4", "ceil").decode()[:, 0] >= largest * 0.7999).all())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_the_search_never_loses_in_any_block(kind: str, weighted: bool) -> None:
    weight_OI = gaussian(16, 128)
    weigh_I = torch.rand(128, generator=torch.Generator().manual_seed(1)) + 0.01 if weighted else None

    def loss(rule: str) -> Tensor:
        if kind == "mxfp4":
            part = round_to_floats(weight_OI, fit_mxfp4(weight_OI, rule, weigh_I), None, MXFP4Form())  # type: ignore[arg-type]
        else:
            part = round_to_floats(weight_OI, *fit_nvfp4(weight_OI, rule, weigh_I), NVFP4Form())  # type: ignore[arg-type]
        error = (exactly(part) - weight_OI).square() * (1 if weigh_I is None else weigh_I)
        return error.view(16, part.steps_OG.shape[1], -1).sum(-1)

    others = ("floor", "ceil") if kind == "mxfp4" else ("absmax",)
    searched = loss("mse")
    for rule in others:
        assert bool((searched <= loss(rule) * (1 + 1e-5)).all())
        assert float(searched.sum()) < float(loss(rule).sum())


@pytest.mark.parametrize(
    ("kind", "rule", "expected"),
    [("mxfp4", "floor", 0.1150), ("mxfp4", "ceil", 0.1153), ("nvfp4", "absmax", 0.0949)],
)
def test_the_error_on_gaussian_weights_is_the_published_one(kind: str, rule: str, expected: float) -> None:
    weight_OI = gaussian(512, 512)
    assert rmse(weight_OI, nearest(weight_OI, kind, rule)) == pytest.approx(expected, rel=0.01)


def test_nvfp4_loses_less_than_mxfp4_also_beside_outliers() -> None:
    for weight_OI in (gaussian(128, 512), gaussian(128, 512) * (1 + 49 * (torch.arange(512) % 50 == 0))):
        assert rmse(weight_OI, nearest(weight_OI, "nvfp4")) < rmse(weight_OI, nearest(weight_OI, "mxfp4", "mse"))


@DTYPES
@EVERY
def test_zeros_tiny_and_huge_weights_decode_to_finite_ones(kind: str, dtype: torch.dtype) -> None:
    weight_OI = gaussian(dtype=dtype)
    weight_OI[0] = 0
    weight_OI[1, :64] = 0
    weight_OI[2] = torch.finfo(dtype).tiny
    weight_OI[3] = torch.finfo(dtype).tiny / 64
    for weight in (weight_OI, weight_OI * 1e4, torch.zeros_like(weight_OI), weight_OI[3:4].expand(32, -1)):
        decoded = nearest(weight, kind).decode()
        assert bool(torch.isfinite(decoded).all())
        assert bool((decoded[weight == 0] == 0).all())
        assert bool(((decoded - weight).abs() <= weight.abs().amax()).all())


def test_small_weights_in_float16_keep_their_scales() -> None:
    weight_OI = gaussian(dtype=torch.float32).mul(1e-3).half()
    decoded = nearest(weight_OI, "channel").decode()
    assert float((decoded - weight_OI).float().norm() / weight_OI.float().norm()) < 0.04


@pytest.mark.parametrize("exponent", range(-40, 41, 8))
def test_scales_of_nvfp4_fit_and_their_divisor_is_the_same_for_weights_of_usual_sizes(exponent: int) -> None:
    weight_OI = gaussian() * 2.0**exponent
    part = nearest(weight_OI, "nvfp4")
    assert part.global_scale is not None
    divisor, largest = float(part.global_scale), float(weight_OI.abs().max())
    assert float(part.scale_OG.float().min()) >= 2.0**-9
    assert float(part.scale_OG.float().max()) <= 448
    if 0.041 < largest < 21:
        assert divisor == 128
    else:
        assert divisor <= 448 * 6 / largest < 2 * divisor
    error = (part.decode() - weight_OI).norm() / weight_OI.norm()
    assert float(error) == pytest.approx(0.095, rel=0.02)


# Parts


@EVERY
def test_splitting_and_sampling_are_those_of_the_decoded_weight(kind: str) -> None:
    part = nearest(gaussian(384), kind)
    decoded = part.decode()
    assert torch.equal(part.sample(3, 7).decode(), decoded[3::7])
    pieces = part.split([128, 256])
    assert torch.equal(torch.cat([piece.decode() for piece in pieces]), decoded)
    read = [p.form.read(p.tensors(), len(p.codes_OI), 256, torch.float32).decode() for p in pieces]
    assert torch.equal(torch.cat(read), decoded)
    if kind == "block":
        with pytest.raises(ValueError, match="cannot be cut"):
            part.split([100, 284])


# Methods


@METHODS
def test_rounding_to_nearest_needs_no_data_and_the_sweep_a_gram_matrix(method: Any) -> None:
    assert method(rounding="nearest").needs == frozenset()
    assert method(rounding="gptq").needs == {"gram"}


@pytest.mark.parametrize(
    ("method", "settings"),
    [(FP8, {}), (FP8, {"scales": "tensor"}), (FP8, {"scales": "block"}), (MXFP4, {}), (NVFP4, {})],
)
def test_the_sweep_loses_less_of_the_output_than_rounding(method: Any, settings: dict[str, Any]) -> None:
    swept = rounded = 0.0
    for seed in range(4):
        weight_OI, stats = gaussian(seed=seed), measured(seed=seed)
        assert stats.gram_II is not None
        own = method(rounding="gptq", **settings)(weight_OI, stats)
        assert own.note == ""
        swept += lost(weight_OI, own.decode(), stats.gram_II)
        rounded += lost(weight_OI, method(rounding="nearest", **settings)(weight_OI, stats).decode(), stats.gram_II)
    assert swept < 0.5 * rounded


@DTYPES
@METHODS
def test_with_independent_inputs_the_sweep_is_rounding_to_nearest(method: Any, dtype: torch.dtype) -> None:
    weight_OI = gaussian(dtype=dtype)
    stats = Statistics(256, tokens=512, gram_II=torch.eye(256) * 512)
    one, other = (method(rounding=rounding)(weight_OI, stats) for rounding in ("gptq", "nearest"))
    assert torch.equal(one.decode(), other.decode())


@METHODS
def test_without_enough_tokens_it_rounds_to_nearest_and_says_so(method: Any) -> None:
    weight_OI = gaussian()
    few = method(rounding="gptq")(weight_OI, measured(tokens=255))
    assert "255 calibration tokens for 256 inputs" in few.note
    assert torch.equal(few.decode(), method(rounding="nearest")(weight_OI, Statistics(256)).decode())


@pytest.mark.parametrize("method", [FP8(), MXFP4(rounding="nearest"), MXFP4(), FP8(rounding="gptq")])
def test_outputs_are_independent_where_a_method_says_so(method: Any) -> None:
    assert method.row_wise
    one, other, stats = gaussian(24, seed=1), gaussian(8, seed=2), measured()
    together = method(torch.cat([one, other]), stats).split([24, 8])
    for piece, weight_OI in zip(together, (one, other), strict=True):
        assert torch.equal(piece.decode(), method(weight_OI, stats).decode())
    assert not FP8("tensor").row_wise
    assert not NVFP4().row_wise


@METHODS
def test_settings_and_widths_that_cannot_be_are_refused_by_name(method: Any) -> None:
    with pytest.raises(UsageError, match="rounding='up'"):
        method(rounding="up")
    field = "scales" if method is FP8 else "scale"
    with pytest.raises(UsageError, match=f"{field}='row'"):
        method(**{field: "row"})
    with pytest.raises(UsageError, match="40"):
        (FP8("block") if method is FP8 else method()).check(40)
    method().check(256)
