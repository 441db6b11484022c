"""LQER and L2QER, by the invariants of their card."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tersely.codecs import Encoded
from tersely.codecs.low_rank import LowRank, LowRankForm
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.encode.lqer import LQER, lqer_scale
from tersely.methods.encode.rtn import RTN

COLUMNS = 64
SHAPES = pytest.mark.parametrize("rows", [40, 96])


def weights(rows: int = 40, seed: int = 0) -> Tensor:
    return torch.randn((rows, COLUMNS), generator=torch.Generator().manual_seed(seed)) / 8


def activations(tokens: int = 256, seed: int = 0) -> Tensor:
    """(T, I), inputs of very different size."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn((tokens, COLUMNS), generator=generator) * torch.logspace(-2, 1, COLUMNS)


def measured(x_TI: Tensor) -> Statistics:
    stats = Statistics(COLUMNS, needs=LQER().needs)
    stats.add(x_TI)
    return stats.finish()


def lqer(**settings: Any) -> LQER:
    return LQER(**{"group": 16, "rank": 12, "factors": "plain", **settings})


def correction(encoded: Encoded) -> LowRank:
    part = encoded.parts[1]
    assert isinstance(part, LowRank)
    return part


def left_over(weight_OI: Tensor, encoded: Encoded, scale_I: Tensor) -> float:
    """||(W - W_hat) diag(s)||, parts in float64."""
    decoded = sum((part.decode().double() for part in encoded.parts), torch.zeros_like(weight_OI).double())
    return float(((weight_OI.double() - decoded) * scale_I).norm())


@SHAPES
@pytest.mark.parametrize("scaled", [True, False])
def test_a_full_rank_gives_back_the_weight(rows: int, scaled: bool) -> None:
    weight_OI = weights(rows)
    encoded = lqer(rank=1000, scaled=scaled)(weight_OI, measured(activations()))
    assert correction(encoded).form.rank == min(rows, COLUMNS)
    torch.testing.assert_close(encoded.decode(), weight_OI, rtol=0, atol=1e-6)


@SHAPES
@pytest.mark.parametrize("scaled", [True, False])
def test_the_scaled_error_is_the_tail_of_the_singular_values_and_falls_with_the_rank(rows: int, scaled: bool) -> None:
    weight_OI, stats = weights(rows), measured(activations())
    assert stats.absmean_I is not None
    scale_I = lqer_scale(stats.absmean_I) if scaled else torch.ones(COLUMNS)
    errors = []
    for rank in (1, 2, 4, 8, 16, 32):
        encoded = lqer(rank=rank, scaled=scaled)(weight_OI, stats)
        sigma = torch.linalg.svdvals((weight_OI.double() - encoded.parts[0].decode().double()) * scale_I)
        errors.append(left_over(weight_OI, encoded, scale_I))
        assert errors[-1] == pytest.approx(float(sigma[rank:].norm()), rel=1e-4)
    assert all(more < fewer for fewer, more in pairwise(errors))


def test_inputs_of_equal_size_make_l2qer_lqer() -> None:
    weight_OI = weights()
    signs_TI = activations().sign() * 3
    scaled, plain = (lqer(scaled=s)(weight_OI, measured(signs_TI)) for s in (True, False))
    torch.testing.assert_close(scaled.decode(), plain.decode(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("unit", [2.0**-30, 2.0**20])
def test_the_unit_of_the_inputs_makes_no_difference(unit: float) -> None:
    weight_OI, x_TI = weights(), activations()
    one, other = (lqer()(weight_OI, measured(x_TI * u)) for u in (1.0, unit))
    assert torch.equal(one.decode(), other.decode())


def test_the_scale_is_the_papers_with_a_floor_under_inputs_that_are_hardly_there() -> None:
    mean_I = torch.tensor([1.0, 4.0, 16.0])
    torch.testing.assert_close(lqer_scale(mean_I), (mean_I / 4).double())
    dead_I = lqer_scale(torch.tensor([0.0, 1.0, 2.0]))
    assert float(dead_I[0] / dead_I[1]) == pytest.approx(1e-4)
    assert lqer_scale(torch.zeros(3)).tolist() == [1, 1, 1]


def test_weighing_the_inputs_lowers_the_error_of_the_outputs() -> None:
    """On the mean over seeds: between the two there is no theorem."""
    ratio = 0.0
    for seed in range(4):
        weight_OI, x_TI = weights(seed=seed), activations(seed=seed)
        delta = [
            float(((weight_OI - lqer(scaled=s)(weight_OI, measured(x_TI)).decode()) @ x_TI.t()).norm())
            for s in (True, False)
        ]
        ratio += delta[0] / delta[1] / 4
    assert ratio < 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_of_8_bits_lose_little_and_cost_half_of_16(dtype: torch.dtype) -> None:
    weight_OI, x_TI = weights().to(dtype), activations()
    scale_I = lqer_scale(measured(x_TI).absmean_I)  # type: ignore[arg-type]
    short, whole = (lqer(factors=f)(weight_OI, measured(x_TI)) for f in ("mxint8", "plain"))
    assert left_over(weight_OI, short, scale_I) < 1.02 * left_over(weight_OI, whole, scale_I)
    of_bytes = [LowRankForm(64, f, "quantized").nbytes(4096, 4096, torch.bfloat16) for f in ("mxint8", "plain")]
    assert of_bytes[0] * 2 == of_bytes[1] * 17 / 16


def test_without_tokens_all_inputs_count_alike_and_the_note_says_so() -> None:
    weight_OI = weights()
    nothing = Statistics(COLUMNS, needs=LQER().needs)
    encoded = lqer()(weight_OI, nothing)
    assert encoded.note == "no tokens: all inputs count alike in the low-rank part"
    plain = lqer(scaled=False)(weight_OI, nothing)
    assert plain.note == ""
    assert not lqer(scaled=False).needs
    assert torch.equal(encoded.decode(), plain.decode())


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_integers_are_those_of_rounding_to_nearest_and_the_forms_as_foretold(symmetric: bool) -> None:
    weight_OI, stats = weights(), measured(activations())
    method = lqer(symmetric=symmetric, factors="mxint8")
    encoded = method(weight_OI, stats)
    assert torch.equal(encoded.parts[0].decode(), RTN(group=16, symmetric=symmetric)(weight_OI, stats).decode())
    assert encoded.forms == method.forms(40, COLUMNS)


@pytest.mark.parametrize(
    "settings",
    [{"bits": 1}, {"rank": 0}, {"factors": "int8"}, {"inputs": "both"}, {"clip": "max"}],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_that_do_not_exist_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        LQER(**settings)


def test_a_group_that_does_not_divide_is_refused_beforehand() -> None:
    with pytest.raises(UsageError, match="group=100 does not divide 4096"):
        LQER(group=100).check(4096)
