"""Binary matrices with power-of-two scales: the stored form, the fit, the sweep, and bits by importance."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tersely.codecs import Encoded
from tersely.codecs.binary import Binary, BinaryForm, snap
from tersely.codecs.binary import product as lookup_product
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.encode.shiftaddllm import (
    ShiftAddLLM,
    fit,
    greedy_signs,
    nearest_signs,
    signed_sums,
    solve_scales,
)

COLUMNS = 48
MODES = pytest.mark.parametrize(("mode", "group"), [("accuracy", 0), ("accuracy", 6), ("latency", 0)])


def gaussian(rows: int = 24, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))


def measured(seed: int = 0, columns: int = COLUMNS, tokens: int = 512) -> Statistics:
    generator = torch.Generator().manual_seed(1000 + seed)
    mix = torch.randn((columns, columns), generator=generator) * torch.rand(columns, generator=generator) ** 2
    x_TI = torch.randn((tokens, columns), generator=generator) @ mix
    return Statistics(columns, tokens=tokens, gram_II=x_TI.t() @ x_TI)


def encoded(weight_OI: Tensor, stats: Statistics, **settings: Any) -> Binary:
    return only(ShiftAddLLM(**settings)(weight_OI, stats))


def only(made: Encoded) -> Binary:
    (part,) = made.parts
    assert isinstance(part, Binary)
    return part


def lost(weight_OI: Tensor, decoded_OI: Tensor, stats: Statistics) -> float:
    assert stats.gram_II is not None
    delta = (weight_OI - decoded_OI).double()
    return float((delta @ stats.gram_II.double() * delta).sum())


def fit_error(weight_DS: Tensor, codes_DS: Tensor, alpha_DN: Tensor) -> Tensor:
    return (signed_sums(alpha_DN).gather(1, codes_DS.long()) - weight_DS).square().sum(1)


# The stored form


@MODES
@pytest.mark.parametrize("terms", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_stored_is_read_back_bit_for_bit_in_the_bytes_that_were_promised(
    mode: str, group: int, terms: int, dtype: torch.dtype
) -> None:
    weight_OI = gaussian().to(dtype)
    part = encoded(weight_OI, measured(), mode=mode, group=group, terms=terms)
    stored = part.tensors()
    again = part.form.read(stored, 24, COLUMNS, dtype)
    assert torch.equal(again.codes_OI, part.codes_OI)
    assert torch.equal(again.decode(), part.decode())
    assert part.decode().dtype == dtype
    assert sum(t.numel() * t.element_size() for t in stored.values()) == part.form.nbytes(24, COLUMNS, dtype)


@MODES
def test_signs_are_one_or_minus_one_and_the_weight_is_their_sum_times_powers_of_two(mode: str, group: int) -> None:
    """(a)"""
    part = encoded(gaussian(), measured(), mode=mode, group=group)
    groups, blocks = part.form.shape(24, COLUMNS)
    alpha_AJN = torch.zeros((groups, blocks, 3), dtype=torch.float64)
    for sign, exponent in part.alpha_AJN.terms():
        assert set(sign.flatten().tolist()) <= {-1.0, 0.0, 1.0}
        alpha_AJN += sign.double() * 2.0 ** exponent.double()
    total = torch.zeros((24, COLUMNS), dtype=torch.float64)
    for k in range(3):
        signs_OI = 2 * ((part.codes_OI >> k) & 1).double() - 1
        assert signs_OI.abs().eq(1).all()
        alpha_OI = alpha_AJN[:, :, k].repeat_interleave(24 // groups, 0).repeat_interleave(COLUMNS // blocks, 1)
        total += signs_OI * alpha_OI
    assert torch.allclose(part.decode().double(), total, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("mode", "group", "columns"),
    [("accuracy", 0, 48), ("accuracy", 6, 40), ("accuracy", 0, 21), ("latency", 0, 48), ("latency", 0, 40)],
)
def test_lookups_shifts_and_sums_are_the_product_with_the_decoded_weight(mode: str, group: int, columns: int) -> None:
    """(e)"""
    part = encoded(gaussian(24, columns), measured(columns=columns), mode=mode, group=group)
    x_TI = gaussian(5, columns, seed=3).double()
    assert torch.allclose(lookup_product(part, x_TI), x_TI @ part.decode().double().t(), rtol=1e-6, atol=1e-5)


@MODES
def test_pieces_and_samples_decode_to_those_of_the_whole(mode: str, group: int) -> None:
    part = encoded(gaussian(), measured(), mode=mode, group=group)
    for rows in ([6, 18], [5, 19]):
        pieces = part.split(rows)
        assert torch.equal(torch.cat([piece.decode() for piece in pieces]), part.decode())
        for piece, count in zip(pieces, rows, strict=True):
            again = piece.form.read(piece.tensors(), count, COLUMNS, torch.float32)
            assert torch.equal(again.decode(), piece.decode())
    assert torch.equal(part.sample(1, 5).decode(), part.decode()[1::5])
    assert part.split([6, 18])[0].form == part.form


# Powers of two


@pytest.mark.parametrize("terms", [1, 2, 3, 4])
def test_numbers_are_sums_of_few_powers_of_two_within_a_relative_error_that_falls_with_each(terms: int) -> None:
    """(d): one term is off by at most 2^0.5 - 1, and each further one leaves that share of what is left."""
    numbers = torch.logspace(-20, 20, 4001, base=2)
    powers, values = snap(numbers, terms)
    assert torch.equal(powers.values(), values)
    relative = (powers.values() - numbers).abs() / numbers
    assert relative.max() <= (2**0.5 - 1) ** terms * 1.001
    assert relative.mean() < 0.2**terms * 1.5
    assert len(list(powers.terms())) == terms
    mantissa = torch.frexp(powers.values()).mantissa * 2**24
    assert torch.equal(mantissa, mantissa.round())


def test_powers_of_two_and_zero_are_kept() -> None:
    numbers = torch.tensor([0.0, 1.0, 0.5, 2.0**-30, 2.0**40, 3.0, 0.75, 7.0])
    assert torch.equal(snap(numbers, 3)[1], numbers)


def test_a_product_with_powers_is_shifts_of_the_other_factor() -> None:
    numbers, x = torch.rand(50) + 0.01, gaussian(1, 50)[0]
    powers, _ = snap(numbers, 3)
    assert torch.allclose(powers.shifted(x), powers.values() * x)
    assert torch.equal(powers[3:9].values(), powers.values()[3:9])


def test_a_term_too_small_for_its_four_bits_is_left_out() -> None:
    numbers = torch.tensor([1 + 2.0**-7, 1 + 2.0**-9])
    assert snap(numbers, 2)[1].tolist() == [1 + 2.0**-7, 1.0]


# The fit


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_turns_without_snapping_never_lose_more(bits: int) -> None:
    """(b)"""
    weight_DS = gaussian(6, 100)
    codes = greedy_signs(weight_DS, bits)
    errors = []
    for _ in range(12):
        alpha = solve_scales(weight_DS, codes, bits)
        codes = nearest_signs(weight_DS, alpha)
        errors.append(fit_error(weight_DS, codes, alpha))
    assert all((after <= before * (1 + 1e-5)).all() for before, after in pairwise(errors))
    assert bits == 1 or (errors[-1] < errors[0]).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_signs_are_the_best_of_all(bits: int) -> None:
    """(c)"""
    weight_DS = gaussian(5, 64)
    alpha_DN = gaussian(5, bits, 1).abs()
    brute = (signed_sums(alpha_DN)[:, None] - weight_DS[:, :, None]).abs().amin(-1)
    found = signed_sums(alpha_DN).gather(1, nearest_signs(weight_DS, alpha_DN).long())
    assert torch.allclose((found - weight_DS).abs(), brute)


def test_a_gaussian_is_fitted_about_as_well_as_by_the_best_levels_there_are() -> None:
    """Lloyd-Max levels leave 0.363, 0.1175 and 0.0345 of the variance."""
    weight_DS = gaussian(1, 1 << 15)
    for bits, best in ((1, 0.3634), (2, 0.1175), (3, 0.0345)):
        alpha = fit(weight_DS, bits=bits, terms=3, rounds=50).values()
        left = float(fit_error(weight_DS, nearest_signs(weight_DS, alpha), alpha)) / (1 << 15)
        assert best * 0.97 < left < best * 1.15


def test_columns_of_zeros_and_of_one_size_are_exact() -> None:
    weight_DS = torch.stack([torch.zeros(32), gaussian(1, 32)[0].sign() * 0.75])
    for bits in (1, 2, 3):
        alpha = fit(weight_DS, bits=bits, terms=3, rounds=20).values()
        assert torch.allclose(
            signed_sums(alpha).gather(1, nearest_signs(weight_DS, alpha).long()), weight_DS, atol=1e-5
        )


# The method


@MODES
def test_the_error_falls_as_bits_are_added(mode: str, group: int) -> None:
    """(f)"""
    weight_OI, stats = gaussian(), measured()
    errors = [
        lost(weight_OI, encoded(weight_OI, stats, bits=b, mode=mode, group=group).decode(), stats) for b in (1, 2, 3, 4)
    ]
    assert all(fewer > 1.5 * more for fewer, more in pairwise(errors))


@pytest.mark.parametrize("mode", ["accuracy", "latency"])
def test_the_sweep_loses_less_than_the_fit_alone(mode: str) -> None:
    """On the mean over seeds."""
    swept = alone = 0.0
    for seed in range(4):
        weight_OI, stats = gaussian(seed=seed), measured(seed)
        swept += lost(weight_OI, encoded(weight_OI, stats, mode=mode).decode(), stats)
        alone += lost(weight_OI, encoded(weight_OI, stats, mode=mode, minimum_tokens=1e6).decode(), stats)
    assert swept < 0.8 * alone


@pytest.mark.parametrize("mode", ["accuracy", "latency"])
def test_inputs_that_are_not_correlated_are_fitted_alone(mode: str) -> None:
    diagonal = Statistics(COLUMNS, tokens=512, gram_II=torch.diag(torch.rand(COLUMNS) + 0.5))
    swept = encoded(gaussian(), diagonal, mode=mode).decode()
    alone = encoded(gaussian(), Statistics(COLUMNS), mode=mode).decode()
    assert torch.allclose(swept, alone, atol=1e-5)


@pytest.mark.parametrize("mode", ["accuracy", "latency"])
def test_permuting_the_inputs_permutes_the_answer(mode: str) -> None:
    """In latency mode the blocks of them."""
    weight_OI, stats = gaussian(), measured()
    assert stats.gram_II is not None
    width = 8 if mode == "latency" else 1
    blocks = torch.randperm(COLUMNS // width, generator=torch.Generator().manual_seed(0))
    order = (blocks[:, None] * width + torch.arange(width)).flatten()
    permuted = Statistics(COLUMNS, tokens=stats.tokens, gram_II=stats.gram_II[order[:, None], order])
    one = encoded(weight_OI, stats, mode=mode).decode()[:, order]
    other = encoded(weight_OI[:, order], permuted, mode=mode).decode()
    assert torch.allclose(one, other, atol=1e-4)


def test_latency_mode_shares_scales_over_8_inputs_and_an_eighth_of_the_outputs() -> None:
    assert encoded(gaussian(), measured(), mode="latency").form == BinaryForm(3, 3, 8, 3)
    assert encoded(gaussian(21), measured(), mode="latency").form == BinaryForm(3, 3, 8, 3)
    assert encoded(gaussian(13), measured(), mode="latency").form == BinaryForm(3, 0, 8, 3)
    with pytest.raises(UsageError, match="takes 8 inputs at once, and 12 is no multiple"):
        ShiftAddLLM(mode="latency").check(12)
    ShiftAddLLM().check(12)


def test_what_could_not_be_done_is_said() -> None:
    made = ShiftAddLLM(group=5)(gaussian(), measured(tokens=7))
    assert "7 calibration tokens for 48 inputs" in made.note
    assert "group=5 does not divide 24 outputs" in made.note
    assert only(made).form.rows == 0
    assert ShiftAddLLM(group=6)(gaussian(), measured()).note == ""


@pytest.mark.parametrize(
    "settings",
    [{"bits": 0}, {"mode": "fast"}, {"group": -1}, {"terms": 5}, {"rounds": 0}, {"damping": 0}, {"minimum_tokens": -1}],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_that_do_not_exist_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        ShiftAddLLM(**settings)
