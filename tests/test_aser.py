"""ASER, by the letters of its card, then its settings, its notes and the smoothing that goes with it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tersely.codecs import Encoded, Integers
from tersely.codecs.low_rank import LowRank
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.encode.aser import ASER, aser_scale, square_root
from tersely.methods.encode.gptq import GPTQ
from tersely.methods.encode.lqer import LQER
from tersely.methods.encode.rtn import RTN

COLUMNS, TOKENS, OUTLIERS = 64, 256, 6
SHAPES = pytest.mark.parametrize("rows", [40, 96])
ROUNDINGS = pytest.mark.parametrize("rounding", ["nearest", "gptq"])
NEEDS = frozenset({"gram", "absmean"})


def weights(rows: int = 40, seed: int = 0) -> Tensor:
    return torch.randn((rows, COLUMNS), generator=torch.Generator().manual_seed(seed)) / 8


def activations(tokens: int = TOKENS, seed: int = 0) -> Tensor:
    """Correlated, (T, I), some inputs much larger than others."""
    generator = torch.Generator().manual_seed(1000 + seed)
    mix = torch.randn((COLUMNS, COLUMNS), generator=generator) * torch.rand(COLUMNS, generator=generator) ** 2
    x_TI = torch.randn((tokens, COLUMNS), generator=generator) @ mix
    x_TI[:, 3::13] *= 30
    return x_TI


def measured(x_TI: Tensor) -> Statistics:
    stats = Statistics(x_TI.shape[1], needs=NEEDS)
    stats.add(x_TI)
    return stats.finish()


def parts(encoded: Encoded) -> tuple[Integers, LowRank]:
    codes, correction = encoded.parts
    assert isinstance(codes, Integers)
    assert isinstance(correction, LowRank)
    return codes, correction


def output_error(weight_OI: Tensor, encoded: Encoded, x_TI: Tensor) -> float:
    """||(W - W_hat) X||, parts in float64."""
    decoded = sum((part.decode().double() for part in encoded.parts), torch.zeros_like(weight_OI).double())
    return float(((weight_OI.double() - decoded) @ x_TI.double().t()).norm())


def aser(**settings: Any) -> ASER:
    return ASER(**{"outliers": OUTLIERS, "rank": 12, **settings})


@ROUNDINGS
@SHAPES
@pytest.mark.parametrize("outliers", [0, OUTLIERS])
@pytest.mark.parametrize("smooth", [False, True])
def test_a_full_rank_gives_back_the_layer(rounding: str, rows: int, outliers: int, smooth: bool) -> None:
    weight_OI, x_TI = weights(rows), activations()
    expected_TO = x_TI @ weight_OI.t()
    if smooth:
        scale_I = aser_scale(measured(x_TI).absmean_I, [weight_OI], outliers)  # type: ignore[arg-type]
        weight_OI, x_TI = weight_OI * scale_I, x_TI / scale_I
    method = aser(rounding=rounding, rank=1000, outliers=outliers)
    encoded = method(weight_OI, measured(x_TI))
    assert parts(encoded)[1].form.rank == min(rows, COLUMNS)
    y_TO = x_TI @ encoded.decode().t()
    assert float((y_TO - expected_TO).norm() / expected_TO.norm()) < 1e-5


@ROUNDINGS
@SHAPES
def test_b_the_calibration_error_is_the_tail_of_the_whitened_error_and_falls_with_the_rank(
    rounding: str, rows: int
) -> None:
    weight_OI, x_TI = weights(rows), activations()
    stats = measured(x_TI)
    errors = []
    for rank in (1, 2, 4, 8, 16, 32):
        encoded = aser(rounding=rounding, rank=rank, damping=1e-9)(weight_OI, stats)
        error_OI = weight_OI.double() - encoded.parts[0].decode().double()
        sigma = torch.linalg.svdvals(error_OI @ x_TI.double().t())
        errors.append(output_error(weight_OI, encoded, x_TI))
        assert errors[-1] == pytest.approx(float(sigma[rank:].norm()), rel=1e-3)
    assert all(more < fewer for fewer, more in pairwise(errors))


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("seed", range(3))
def test_c_no_correction_of_equal_rank_is_better_on_the_calibration(rank: int, seed: int) -> None:
    weight_OI, x_TI = weights(seed=seed), activations(seed=seed)
    stats = measured(x_TI)
    grid: dict[str, Any] = {"group": 0, "clip": "none", "rank": rank, "factors": "plain"}
    own = aser(rounding="nearest", outliers=0, damping=1e-9, **grid)(weight_OI, stats)
    for scaled in (True, False):
        other = LQER(scaled=scaled, **grid)(weight_OI, stats)
        assert torch.equal(other.parts[0].decode(), own.parts[0].decode())
        assert output_error(weight_OI, own, x_TI) < output_error(weight_OI, other, x_TI)


@ROUNDINGS
@SHAPES
def test_integers_and_correction_found_in_turns_lose_less_in_as_many_bytes(rounding: str, rows: int) -> None:
    weight_OI, x_TI = weights(rows), activations()
    stats = measured(x_TI)
    encoded = [aser(rounding=rounding, passes=passes)(weight_OI, stats) for passes in (1, 2, 4, 16)]
    once, *more = [output_error(weight_OI, each, x_TI) for each in encoded]
    assert all(later <= sooner * (1 + 1e-4) for sooner, later in pairwise([once, *more]))
    assert more[-1] < 0.95 * once
    assert all(each.forms == encoded[0].forms for each in encoded)


def test_the_rank_by_energy_is_that_of_the_first_pass() -> None:
    once, more = (
        aser(rank=COLUMNS, energy=0.5, passes=passes)(weights(), measured(activations())) for passes in (1, 4)
    )
    assert once.forms == more.forms


def test_d_any_square_root_of_the_gram_matrix_gives_the_same_correction() -> None:
    weight_OI, stats = weights(), measured(activations())
    codes, correction = parts(aser(rank=5)(weight_OI, stats))
    assert stats.gram_II is not None
    damped = stats.gram_II.double()
    damped += aser().damping * damped.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(damped)
    root = vectors * values.sqrt()
    left, sigma, right = torch.linalg.svd((weight_OI.double() - codes.decode().double()) @ root, full_matrices=False)
    expected = left[:, :5] * sigma[:5] @ torch.linalg.solve(root, right[:5], left=False)
    product = correction.b_OR.double() @ correction.a_RI.double()
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-6)


@ROUNDINGS
def test_e_without_outliers_the_integers_are_those_of_the_rounding_alone(rounding: str) -> None:
    weight_OI, stats = weights(), measured(activations())
    alone = (GPTQ if rounding == "gptq" else RTN)(group=0, clip="mse")(weight_OI, stats)
    codes, _ = parts(aser(rounding=rounding, outliers=0)(weight_OI, stats))
    assert torch.equal(codes.codes_OI, alone.parts[0].codes_OI)  # type: ignore[attr-defined]
    assert torch.equal(codes.decode(), alone.decode())


@ROUNDINGS
def test_e_with_every_column_an_outlier_it_truncates_the_whitened_weight(rounding: str) -> None:
    weight_OI, x_TI = weights(), activations()
    encoded = aser(rounding=rounding, outliers=COLUMNS, damping=1e-9)(weight_OI, measured(x_TI))
    assert not encoded.parts[0].decode().any()
    sigma = torch.linalg.svdvals(weight_OI.double() @ x_TI.double().t())
    assert output_error(weight_OI, encoded, x_TI) == pytest.approx(float(sigma[12:].norm()), rel=1e-3)


@ROUNDINGS
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("outliers", [1, OUTLIERS])
def test_f_exactly_the_outliers_are_zero_in_the_integers(
    rounding: str, symmetric: bool, group: int, outliers: int
) -> None:
    weight_OI, x_TI = weights(), activations()
    encoded = aser(rounding=rounding, symmetric=symmetric, group=group, outliers=outliers)(weight_OI, measured(x_TI))
    zero_I = (encoded.parts[0].decode() == 0).all(0)
    expected = (x_TI.abs().mean(0) * weight_OI.abs().mean(0)).topk(outliers).indices
    assert torch.equal(zero_I.nonzero().flatten(), expected.sort().values)


@ROUNDINGS
def test_outliers_lower_the_error_where_some_columns_are_large(rounding: str) -> None:
    """On the mean over seeds: a few columns would set the scale of every row."""
    ratio = 0.0
    for seed in range(4):
        weight_OI, x_TI = weights(seed=seed), activations(seed=seed)
        weight_OI[:, 3::13] *= 10
        errors = [
            output_error(weight_OI, aser(rounding=rounding, outliers=f)(weight_OI, measured(x_TI)), x_TI)
            for f in (OUTLIERS, 0)
        ]
        ratio += errors[0] / errors[1] / 4
    assert ratio < 0.8


@ROUNDINGS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_of_half_the_digits_keeps_its_dtype_and_its_gain(rounding: str, dtype: torch.dtype) -> None:
    weight_OI, x_TI = weights().to(dtype), activations()
    stats = measured(x_TI)
    encoded = aser(rounding=rounding)(weight_OI, stats)
    assert {t.dtype for name, t in encoded.tensors().items() if "low_rank" in name} == {dtype}
    assert encoded.decode().dtype == dtype
    alone = (GPTQ if rounding == "gptq" else RTN)(group=0, clip="mse")(weight_OI, stats)
    assert output_error(weight_OI, encoded, x_TI) < 0.6 * output_error(weight_OI, alone, x_TI)


# Few tokens, dead inputs, no statistics


@ROUNDINGS
@pytest.mark.parametrize("tokens", [1, 20, COLUMNS - 1])
def test_fewer_tokens_than_inputs_still_help_and_are_told(rounding: str, tokens: int) -> None:
    weight_OI, x_TI = weights(), activations(tokens)
    encoded = aser(rounding=rounding)(weight_OI, measured(x_TI))
    alone = aser(rounding="nearest", outliers=0)(weight_OI, Statistics(COLUMNS))
    assert output_error(weight_OI, encoded, x_TI) < output_error(weight_OI, alone, x_TI)
    assert f"{tokens} tokens for 64 inputs: directions without any count by damping alone" in encoded.note


@ROUNDINGS
def test_dead_inputs_leave_finite_factors_and_the_error_of_the_others(rounding: str) -> None:
    weight_OI, x_TI = weights(), activations()
    x_TI[:, 10:30] = 0
    encoded = aser(rounding=rounding)(weight_OI, measured(x_TI))
    assert all(bool(t.isfinite().all()) for t in encoded.tensors().values() if t.is_floating_point())
    zero = aser(rounding=rounding)(weight_OI, measured(torch.zeros_like(x_TI)))
    assert bool(zero.decode().isfinite().all())
    assert output_error(weight_OI, encoded, x_TI) < output_error(weight_OI, zero, x_TI)


@ROUNDINGS
def test_without_tokens_the_error_of_the_weight_is_made_up_for_and_the_note_says_so(rounding: str) -> None:
    weight_OI = weights()
    encoded = aser(rounding=rounding)(weight_OI, Statistics(COLUMNS, needs=NEEDS))
    assert "no tokens: the low-rank part makes up for the error of the weight" in encoded.note
    error_OI = weight_OI.double() - encoded.parts[0].decode().double()
    left = (weight_OI.double() - encoded.parts[0].decode().double() - encoded.parts[1].decode().double()).norm()
    assert float(left) == pytest.approx(float(torch.linalg.svdvals(error_OI)[12:].norm()), rel=1e-4)


def test_a_gram_matrix_that_is_no_such_thing_is_told() -> None:
    stats = measured(activations())
    stats.gram_II = -torch.eye(COLUMNS)
    note = aser(rounding="nearest")(weights(), stats).note
    assert "the Gram matrix has no Cholesky factor with damping up to 1" in note
    assert square_root(torch.full((4, 4), torch.nan), 0.01) is None


def test_damping_that_had_to_grow_is_told() -> None:
    stats = measured(activations())
    assert stats.gram_II is not None
    mean = float(stats.gram_II.diagonal().mean())
    stats.gram_II[0, 0] = -0.005 * mean
    stats.gram_II[0, 1:] = stats.gram_II[1:, 0] = 0
    assert "damping of the low-rank part raised to 0.01" in aser(rounding="nearest")(weights(), stats).note


def test_a_rank_below_the_outliers_is_told() -> None:
    assert "rank 3 is too low for 6 outliers" in aser(rank=3)(weights(), measured(activations())).note


def test_the_rank_by_energy_is_at_most_the_rank() -> None:
    weight_OI, stats = weights(), measured(activations())
    ranks = [parts(aser(energy=e, rank=20)(weight_OI, stats))[1].form.rank for e in (0.1, 0.5, 1.0)]
    assert ranks[0] < ranks[1] <= ranks[2] == 20


# Settings


@pytest.mark.parametrize("rank", [5, 1000])
def test_the_forms_are_those_that_it_leaves(rank: int) -> None:
    method = aser(rank=rank, factors="mxint8", inputs="full")
    encoded = method(weights(), measured(activations()))
    assert encoded.forms == method.forms(40, COLUMNS)
    stored = sum(t.numel() * t.element_size() for t in encoded.tensors().values())
    assert stored == sum(form.nbytes(40, COLUMNS, torch.float32) for form in encoded.forms)


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 9},
        {"rounding": "floor"},
        {"rank": 0},
        {"energy": 1.5},
        {"outliers": -1},
        {"passes": 0},
        {"damping": 0.0},
        {"factors": "int8"},
        {"inputs": "both"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_that_do_not_exist_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        ASER(**settings)


def test_more_outliers_than_columns_and_groups_that_do_not_divide_are_refused_beforehand() -> None:
    with pytest.raises(UsageError, match="outliers=32: the weight has 16 columns in all"):
        ASER().check(16)
    with pytest.raises(UsageError, match="group=100 does not divide 4096"):
        ASER(group=100).check(4096)
    ASER().check(32)


# Smoothing


def test_the_scale_brings_the_outliers_down_to_the_least_of_them_and_leaves_the_rest() -> None:
    weight_OI, x_TI = weights(), activations()
    mean_I = x_TI.abs().mean(0)
    scale_I = aser_scale(mean_I, [weight_OI[:30], weight_OI[30:]], OUTLIERS)
    chosen = (mean_I * weight_OI.abs().mean(0)).topk(OUTLIERS).indices
    smoothed_I = mean_I / scale_I
    least = mean_I[chosen].min()
    torch.testing.assert_close(smoothed_I[chosen], least.expand(OUTLIERS))
    assert float(scale_I.min()) == 1
    assert int((scale_I > 1).sum()) == OUTLIERS - 1
    assert bool((scale_I[[i for i in range(COLUMNS) if i not in chosen]] == 1).all())


def test_the_columns_that_are_taken_out_are_the_same_after_smoothing() -> None:
    weight_OI, x_TI = weights(), activations()
    scale_I = aser_scale(x_TI.abs().mean(0), [weight_OI], OUTLIERS)
    plain = aser()(weight_OI, measured(x_TI)).parts[0].decode()
    smoothed = aser()(weight_OI * scale_I, measured(x_TI / scale_I)).parts[0].decode()
    assert torch.equal((plain == 0).all(0), (smoothed == 0).all(0))
    torch.testing.assert_close(plain, smoothed)


def test_dead_inputs_are_never_smoothed() -> None:
    mean_I = torch.tensor([0.0, 8.0, 2.0, 0.0])
    assert aser_scale(mean_I, [torch.ones(3, 4)], 4).tolist() == [1, 4, 1, 1]
    assert aser_scale(torch.zeros(4), [torch.ones(3, 4)], 4).tolist() == [1, 1, 1, 1]
    assert aser_scale(mean_I, [torch.ones(3, 4)], 0).tolist() == [1, 1, 1, 1]
