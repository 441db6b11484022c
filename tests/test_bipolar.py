"""Bit planes, exact products of them, and the method that rounds to their own grid; by the invariants of the card."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersely.codecs.integer import Integers
from tersely.codecs.planes import (
    GRIDS,
    Grid,
    Planes,
    PlanesForm,
    binary_product,
    bipolar_product,
    from_bipolar,
    integers_of,
    join_planes,
    planes_of,
    product,
    slice_planes,
    to_bipolar,
)
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.encode.bipolar import Bipolar, fit_scale, nearest_codes
from tersely.methods.encode.gptq import GPTQ
from tersely.methods.encode.rtn import RTN

BITS = range(1, 9)
COLUMNS = 64
widths = st.sampled_from(BITS)


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)


def gaussian(rows: int = 24, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))


def measured(seed: int = 0, columns: int = COLUMNS, tokens: int = 512) -> Statistics:
    generator = torch.Generator().manual_seed(1000 + seed)
    mix = torch.randn((columns, columns), generator=generator) * torch.rand(columns, generator=generator) ** 2
    x_TI = torch.randn((tokens, columns), generator=generator) @ mix
    return Statistics(columns, tokens=tokens, gram_II=x_TI.t() @ x_TI)


def encoded(weight_OI: Tensor, stats: Statistics, **settings: Any) -> Planes:
    (part,) = Bipolar(**{"group": 16, **settings})(weight_OI, stats).parts
    assert isinstance(part, Planes)
    return part


def lost(weight_OI: Tensor, decoded_OI: Tensor, gram_II: Tensor) -> float:
    delta = (weight_OI - decoded_OI).double()
    return float((delta @ gram_II.double() * delta).sum())


def random_part(rows: int, columns: int, group: int, bits: int, grid: Grid, seed: int) -> Planes:
    groups = columns // group if group else 1
    scale_OG = gaussian(rows, groups, seed).abs() + 0.1
    zero_OG = random_codes(rows, groups, bits, seed + 1) if grid == "asymmetric" else None
    return Planes(random_codes(rows, columns, bits, seed + 2), scale_OG, zero_OG, PlanesForm(bits, group, grid))


# Codes and planes


@pytest.mark.parametrize("bits", BITS)
def test_the_conversion_to_bipolar_is_bijective_onto_the_odd_integers_of_the_range(bits: int) -> None:
    codes = torch.arange(1 << bits, dtype=torch.uint8)
    values = to_bipolar(codes, bits)
    assert values.tolist() == list(range(1 - (1 << bits), 1 << bits, 2))
    assert torch.equal(from_bipolar(values, bits), codes)


@pytest.mark.parametrize("bits", BITS)
def test_a_signed_integer_becomes_twice_itself_and_one_by_flipping_its_sign_bit(bits: int) -> None:
    signed = torch.arange(-(1 << (bits - 1)), 1 << (bits - 1))
    pattern = (signed & ((1 << bits) - 1)).to(torch.uint8)
    assert torch.equal(to_bipolar(pattern ^ (1 << (bits - 1)), bits).long(), 2 * signed + 1)


@pytest.mark.parametrize("bits", BITS)
def test_negation_flips_every_bit(bits: int) -> None:
    codes = torch.arange(1 << bits, dtype=torch.uint8)
    assert torch.equal(to_bipolar(codes ^ ((1 << bits) - 1), bits), -to_bipolar(codes, bits))


@pytest.mark.parametrize("bits", BITS)
def test_each_bit_stands_for_plus_or_minus_its_power_of_two(bits: int) -> None:
    codes = torch.arange(1 << bits)
    values = sum(((2 * (codes >> i & 1) - 1) << i for i in range(bits)), torch.zeros_like(codes))
    assert torch.equal(values, to_bipolar(codes.to(torch.uint8), bits).long())


@settings(deadline=None, max_examples=40)
@given(bits=widths, rows=st.integers(1, 4), columns=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_planes_are_words_of_32_columns_and_join_to_the_codes(bits: int, rows: int, columns: int, seed: int) -> None:
    codes_RI = random_codes(rows, columns, bits, seed)
    planes_RNM = slice_planes(codes_RI, bits)
    assert planes_RNM.dtype == torch.int32
    assert planes_RNM.shape == (rows, bits, -(-columns // 32))
    assert torch.equal(join_planes(planes_RNM, columns), codes_RI)
    last = columns - 1
    bit = (planes_RNM[:, :, last // 32] >> (last % 32)) & 1
    assert torch.equal(bit, torch.stack([(codes_RI[:, last] >> n) & 1 for n in range(bits)], 1).to(torch.int32))


# Products


@pytest.mark.parametrize("columns", [1, 32, 77])
@pytest.mark.parametrize("inputs_bits", BITS)
@pytest.mark.parametrize("weight_bits", BITS)
def test_products_of_planes_are_those_of_integers(weight_bits: int, inputs_bits: int, columns: int) -> None:
    weight_OI, inputs_TI = random_codes(5, columns, weight_bits, 1), random_codes(3, columns, inputs_bits, 2)
    expected = to_bipolar(inputs_TI, inputs_bits).long() @ to_bipolar(weight_OI, weight_bits).long().t()
    assert torch.equal(bipolar_product(weight_OI, weight_bits, inputs_TI, inputs_bits), expected)


def test_products_of_the_largest_values_are_exact_beyond_32_bits() -> None:
    columns = 40_000
    ones = torch.full((1, columns), 255, dtype=torch.uint8)
    assert int(bipolar_product(ones, 8, ones, 8)) == columns * 255**2 > 2**31


def test_one_bit_is_the_product_of_signs() -> None:
    x_TI, w_OI = gaussian(6, 50, 1), gaussian(4, 50, 2)
    weight_OM, inputs_TM = (slice_planes((v >= 0).to(torch.uint8), 1)[:, 0] for v in (w_OI, x_TI))
    assert torch.equal(binary_product(weight_OM, inputs_TM, 50), (x_TI.sign() @ w_OI.sign().t()).long())


@pytest.mark.parametrize("inputs_grid", GRIDS)
@pytest.mark.parametrize("weight_grid", GRIDS)
@pytest.mark.parametrize(("columns", "group"), [(48, 16), (45, 9), (33, 0)])
def test_scales_and_the_zeros_of_both_operands_are_made_up_for(
    columns: int, group: int, weight_grid: Grid, inputs_grid: Grid
) -> None:
    for weight_bits, inputs_bits in ((3, 8), (4, 5), (8, 2)):
        weight = random_part(6, columns, group, weight_bits, weight_grid, 0)
        inputs = random_part(5, columns, 0, inputs_bits, inputs_grid, 7)
        made = [Planes(p.codes_OI, p.scale_OG.double(), p.zero_OG, p.form) for p in (weight, inputs)]
        expected = made[1].decode() @ made[0].decode().t()
        assert torch.allclose(product(weight, inputs), expected, rtol=1e-12, atol=1e-9)


# The stored form


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", BITS)
def test_what_is_stored_is_read_back_bit_for_bit_in_the_bytes_that_were_promised(bits: int, grid: Grid) -> None:
    part = random_part(7, 45, 9, bits, grid, 3)
    stored = part.tensors()
    again = part.form.read(stored, 7, 45, torch.float32)
    assert torch.equal(again.codes_OI, part.codes_OI)
    assert torch.equal(again.decode(), part.decode())
    assert sum(t.numel() * t.element_size() for t in stored.values()) == part.form.nbytes(7, 45, torch.float32)


@pytest.mark.parametrize("grid", GRIDS)
def test_pieces_and_samples_decode_to_those_of_the_whole(grid: Grid) -> None:
    part = random_part(24, 48, 16, 3, grid, 4)
    assert torch.equal(torch.cat([piece.decode() for piece in part.split([4, 20])]), part.decode())
    assert torch.equal(part.sample(1, 3).decode(), part.decode()[1::3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_any_integers_can_be_stored_as_planes_and_decode_alike(symmetric: bool, dtype: torch.dtype) -> None:
    (part,) = RTN(bits=5, group=16, symmetric=symmetric)(gaussian().to(dtype), Statistics(COLUMNS)).parts
    assert isinstance(part, Integers)
    planes = planes_of(part)
    assert torch.equal(planes.decode(), part.decode())
    again = integers_of(planes)
    assert again.form == part.form
    assert again.tensors().keys() == part.tensors().keys()
    assert all(torch.equal(t, again.tensors()[name]) for name, t in part.tensors().items())


# The method


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
@pytest.mark.parametrize("bits", BITS)
def test_every_value_is_an_odd_multiple_of_its_scale(bits: int, rounding: str, dtype: torch.dtype) -> None:
    part = encoded(gaussian().to(dtype), measured(), bits=bits, rounding=rounding)
    decoded = part.decode()
    assert decoded.dtype == dtype
    multiples = decoded.double().view(24, -1, 16) / part.scale_OG.double()[:, :, None]
    rounded = ((multiples - 1) / 2).round() * 2 + 1
    assert rounded.abs().max() <= (1 << bits) - 1
    assert torch.allclose(multiples, rounded, rtol=1e-2 if dtype != torch.float32 else 1e-6)
    assert torch.equal(rounded.view(24, -1).short(), to_bipolar(part.codes_OI, bits))


def test_one_bit_to_nearest_is_the_sign_and_the_mean_size() -> None:
    weight_OI = gaussian()
    part = encoded(weight_OI, Statistics(COLUMNS), bits=1, rounding="nearest")
    mean = weight_OI.view(24, -1, 16).abs().mean(-1, keepdim=True)
    assert torch.allclose(part.decode(), (weight_OI.view(24, -1, 16).sign() * mean).view(24, -1))


@pytest.mark.parametrize("bits", BITS)
def test_a_weight_on_its_own_grid_stays_there(bits: int) -> None:
    codes_OI = random_codes(24, COLUMNS, bits)
    codes_OI[:, ::16] = 0
    scale_OG = gaussian(24, COLUMNS // 16, 1).abs() + 0.5
    weight_OI = Planes(codes_OI, scale_OG, None, PlanesForm(bits, 16, "bipolar")).decode()
    for rounding in ("gptq", "nearest"):
        assert torch.allclose(encoded(weight_OI, measured(), bits=bits, rounding=rounding).decode(), weight_OI)


def test_codes_are_those_of_the_nearest_points() -> None:
    weight_OI = gaussian()
    scale_OG = fit_scale(weight_OI, bits=3, group=16, importance_I=None)
    points = torch.arange(-7, 8, 2) * scale_OG.repeat_interleave(16, 1)[:, :, None]
    brute = (weight_OI[:, :, None] - points).abs().argmin(-1)
    assert torch.equal(nearest_codes(weight_OI, scale_OG, 3).long(), brute)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_error_falls_as_bits_are_added(grid: Grid) -> None:
    weight_OI, stats = gaussian(), measured()
    assert stats.gram_II is not None
    fewest = 1 if grid == "bipolar" else 2
    errors = [
        lost(weight_OI, encoded(weight_OI, stats, bits=bits, grid=grid).decode(), stats.gram_II)
        for bits in range(fewest, 9)
    ]
    assert all(fewer > 1.5 * more for fewer, more in pairwise(errors))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_sweep_loses_less_than_the_nearest_points(bits: int) -> None:
    """On the mean over seeds."""
    swept = nearest = 0.0
    for seed in range(6):
        weight_OI, stats = gaussian(seed=seed), measured(seed)
        assert stats.gram_II is not None
        swept += lost(weight_OI, encoded(weight_OI, stats, bits=bits).decode(), stats.gram_II)
        nearest += lost(weight_OI, encoded(weight_OI, stats, bits=bits, rounding="nearest").decode(), stats.gram_II)
    assert swept < 0.8 * nearest


def test_a_grid_without_a_zero_serves_few_bits_better() -> None:
    weight_OI, nothing = gaussian(64, 256), Statistics(256)
    identity = torch.eye(256)
    own = encoded(weight_OI, nothing, bits=2, rounding="nearest").decode()
    usual = RTN(bits=2, group=16, clip="mse")(weight_OI, nothing).decode()
    assert lost(weight_OI, own, identity) < 0.9 * lost(weight_OI, usual, identity)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_other_grids_are_those_of_gptq_and_of_rounding(symmetric: bool) -> None:
    weight_OI, stats = gaussian(), measured()
    grid: Grid = "symmetric" if symmetric else "asymmetric"
    swept = encoded(weight_OI, stats, bits=3, grid=grid)
    assert torch.equal(swept.decode(), GPTQ(bits=3, group=16, symmetric=symmetric)(weight_OI, stats).decode())
    nearest = encoded(weight_OI, stats, bits=3, grid=grid, rounding="nearest")
    usual = RTN(bits=3, group=16, symmetric=symmetric, clip="mse")(weight_OI, stats).decode()
    assert torch.equal(nearest.decode(), usual)


def test_the_outputs_of_a_weight_are_independent_of_one_another() -> None:
    one, other, stats = gaussian(24, seed=1), gaussian(8, seed=2), measured()
    together = encoded(torch.cat([one, other]), stats, bits=2).split([24, 8])
    for piece, weight_OI in zip(together, (one, other), strict=True):
        assert torch.equal(piece.decode(), encoded(weight_OI, stats, bits=2).decode())


def test_without_enough_tokens_it_rounds_to_nearest_and_says_so() -> None:
    method = Bipolar(bits=2, group=16)
    expected = encoded(gaussian(), Statistics(COLUMNS), bits=2, rounding="nearest").decode()
    for stats in (Statistics(COLUMNS), measured(tokens=63)):
        result = method(gaussian(), stats)
        assert f"{stats.tokens} calibration tokens for 64 inputs" in result.note
        assert torch.equal(result.decode(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_group_of_zeros_decodes_to_next_to_nothing(dtype: torch.dtype) -> None:
    weight_OI = gaussian().to(dtype)
    weight_OI[3] = 0
    decoded = encoded(weight_OI, measured()).decode()
    assert decoded.isfinite().all()
    assert decoded[3].abs().max() <= 15 * torch.finfo(dtype).smallest_normal


@pytest.mark.parametrize(
    "settings",
    [{"bits": 0}, {"bits": 9}, {"grid": "round"}, {"rounding": "up"}, {"group": -1}, {"damping": 0.0}],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_that_do_not_exist_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        Bipolar(**settings)


def test_one_bit_needs_the_bipolar_grid() -> None:
    Bipolar(bits=1)
    with pytest.raises(UsageError, match="bits=1: a symmetric grid has 2 to 8 bits"):
        Bipolar(bits=1, grid="symmetric")
