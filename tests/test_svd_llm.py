"""SVD-LLM, by the invariants of its card."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tersely.codecs import Encoded
from tersely.codecs.low_rank import LowRank, LowRankForm
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.encode.asvd import ASVD
from tersely.methods.encode.projection import leading, thin_form
from tersely.methods.encode.svd_llm import SVDLLM

COLUMNS = 64
SHAPES = pytest.mark.parametrize("rows", [24, 64, 160])
EXACT = 1e-12
"""A damping that leaves the Gram matrix as it is."""


def weights(rows: int = 64, seed: int = 0) -> Tensor:
    return torch.randn((rows, COLUMNS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def activations(tokens: int = 512, seed: int = 0, rank: int = COLUMNS) -> Tensor:
    """(T, I), correlated and of very different size, in a subspace of so many dimensions."""
    generator = torch.Generator().manual_seed(1000 + seed)
    mix_RI = torch.randn((rank, COLUMNS), generator=generator, dtype=torch.float64)
    size_R = torch.logspace(-1, 1, rank, dtype=torch.float64)
    return torch.randn((tokens, rank), generator=generator, dtype=torch.float64) * size_R @ mix_RI


def measured(x_TI: Tensor) -> Statistics:
    """In float64, so that the only rounding is the method's own."""
    return Statistics(
        COLUMNS,
        needs=frozenset({"gram", "absmean"}),
        tokens=len(x_TI),
        gram_II=x_TI.t() @ x_TI,
        abssum_I=x_TI.abs().sum(0),
    )


def factors(encoded: Encoded) -> LowRank:
    (part,) = encoded.parts
    assert isinstance(part, LowRank)
    return part


def product(encoded: Encoded) -> Tensor:
    """In float64, where a part decodes in float32."""
    part = factors(encoded)
    return part.b_OR.double() @ part.a_RI.double()


def lost(weight_OI: Tensor, encoded: Encoded, x_TI: Tensor) -> float:
    """||(W - W_hat) X||^2."""
    return float(((weight_OI - product(encoded)) @ x_TI.t()).square().sum())


@SHAPES
def test_a_a_full_rank_gives_back_the_weight(rows: int) -> None:
    """No ratio leads there: the directions themselves are tested."""
    weight_OI = weights(rows)
    u_OR = leading(weight_OI @ torch.linalg.cholesky(measured(activations()).gram_II), min(rows, COLUMNS))
    torch.testing.assert_close(u_OR.t() @ u_OR, torch.eye(u_OR.shape[1], dtype=torch.float64))
    torch.testing.assert_close(u_OR @ (u_OR.t() @ weight_OI), weight_OI)


@SHAPES
@pytest.mark.parametrize("rank", [4, 9])
def test_a_activations_of_that_rank_lose_nothing(rows: int, rank: int) -> None:
    """W X has no more than `rank` dimensions, whatever the rank of W."""
    weight_OI, x_TI = weights(rows), activations(rank=rank)
    method = SVDLLM(ratio=0.4, damping=EXACT)
    assert factors(method(weight_OI, measured(x_TI))).form.rank >= rank
    encoded = method(weight_OI, measured(x_TI))
    assert lost(weight_OI, encoded, x_TI) < 1e-9 * float((weight_OI @ x_TI.t()).square().sum())
    assert float((weight_OI - product(encoded)).norm()) > 0.1 * float(weight_OI.norm())


@SHAPES
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9])
def test_b_what_is_lost_is_the_tail_of_the_singular_values_of_w_s(rows: int, ratio: float) -> None:
    weight_OI, x_TI = weights(rows), activations()
    encoded = SVDLLM(ratio=ratio, damping=EXACT)(weight_OI, measured(x_TI))
    sigma = torch.linalg.svdvals(weight_OI @ torch.linalg.cholesky(x_TI.t() @ x_TI))
    tail = float(sigma[factors(encoded).form.rank :].square().sum())
    assert lost(weight_OI, encoded, x_TI) == pytest.approx(tail, rel=1e-6)


@SHAPES
@pytest.mark.parametrize("ratio", [0.2, 0.6])
def test_c_on_its_activations_nothing_of_that_rank_is_better(rows: int, ratio: float) -> None:
    for seed in range(4):
        weight_OI, x_TI = weights(rows, seed), activations(seed=seed)
        own = lost(weight_OI, SVDLLM(ratio=ratio, damping=EXACT)(weight_OI, measured(x_TI)), x_TI)
        for alpha in (0.0, 0.5, 1.0):
            other = ASVD(ratio=ratio, alpha=alpha)(weight_OI, measured(x_TI))
            assert own <= lost(weight_OI, other, x_TI) * (1 + 1e-9)


def test_c_the_error_falls_as_less_is_removed() -> None:
    weight_OI, x_TI = weights(), activations()
    errors = [lost(weight_OI, SVDLLM(ratio=r)(weight_OI, measured(x_TI)), x_TI) for r in (0.8, 0.6, 0.4, 0.2)]
    assert all(more > 1.2 * less for more, less in pairwise(errors))


@pytest.mark.parametrize("scale", [2.0**-10, 1000.0])
def test_d_the_unit_of_the_activations_changes_nothing(scale: float) -> None:
    weight_OI, x_TI = weights(), activations()
    expected = product(SVDLLM()(weight_OI, measured(x_TI)))
    torch.testing.assert_close(product(SVDLLM()(weight_OI, measured(x_TI * scale))), expected)


def test_d_any_root_of_the_gram_matrix_gives_the_same() -> None:
    weight_OI, x_TI = weights(), activations()
    value, basis = torch.linalg.eigh(x_TI.t() @ x_TI)
    root_II = basis * value.sqrt() @ basis.t()
    encoded = SVDLLM(damping=EXACT)(weight_OI, measured(x_TI))
    u_OR = leading(weight_OI @ root_II, factors(encoded).form.rank)
    torch.testing.assert_close(u_OR @ (u_OR.t() @ weight_OI), product(encoded), rtol=0, atol=1e-7)


@pytest.mark.parametrize("multiple", [1, 8, 1000])
@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.5, 0.9])
@SHAPES
def test_e_the_parameters_are_no_more_than_the_share_that_is_kept(rows: int, ratio: float, multiple: int) -> None:
    form = factors(SVDLLM(ratio=ratio, multiple=multiple)(weights(rows), measured(activations()))).form
    kept = (1 - ratio) * rows * COLUMNS
    assert form.rank * (rows + COLUMNS) <= kept + 1e-6
    assert form.nbytes(rows, COLUMNS, torch.float32) == 4 * form.rank * (rows + COLUMNS)
    assert (form,) == SVDLLM(ratio=ratio, multiple=multiple).forms(rows, COLUMNS)
    largest = thin_form(rows, COLUMNS, ratio, 1, "plain").rank
    assert (largest + 1) * (rows + COLUMNS) > kept
    assert form.rank == (largest if largest < multiple else largest // multiple * multiple)


def test_e_a_rank_that_is_whole_is_not_rounded_down() -> None:
    assert thin_form(100, 100, 0.9, 1, "plain").rank == 5
    assert thin_form(80, 80, 0.2, 1, "plain").rank == 32


@SHAPES
def test_f_activations_without_correlations_give_the_plain_svd(rows: int) -> None:
    weight_OI = weights(rows)
    encoded = SVDLLM()(weight_OI, replace(measured(activations()), gram_II=7 * torch.eye(COLUMNS)))
    u, sigma, v = torch.linalg.svd(weight_OI, full_matrices=False)
    rank = factors(encoded).form.rank
    torch.testing.assert_close(product(encoded), u[:, :rank] * sigma[:rank] @ v[:rank])
    torch.testing.assert_close(product(encoded), product(ASVD(alpha=0.0)(weight_OI, Statistics(COLUMNS))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_fit_the_dtype_of_the_weight_however_the_sizes_of_the_inputs_differ(dtype: torch.dtype) -> None:
    weight_OI, x_TI = weights().to(dtype), activations() * torch.logspace(-6, 3, COLUMNS, dtype=torch.float64)
    encoded = SVDLLM(ratio=0.4)(weight_OI, measured(x_TI))
    part = factors(encoded)
    assert part.a_RI.dtype == part.b_OR.dtype == dtype
    exact = SVDLLM(ratio=0.4)(weight_OI.double(), measured(x_TI))
    whole = float((weight_OI.double() @ x_TI.t()).square().sum())
    rounding = torch.finfo(dtype).eps ** 2
    assert lost(weight_OI.double(), encoded, x_TI) < lost(weight_OI.double(), exact, x_TI) + 4 * rounding * whole


def test_factors_of_8_bits_take_half_of_16_and_lose_little_more() -> None:
    weight_OI, x_TI = weights(), activations()
    plain, short = (SVDLLM(ratio=0.4, factors=f)(weight_OI, measured(x_TI)) for f in ("plain", "mxint8"))
    assert lost(weight_OI, short, x_TI) < 1.02 * lost(weight_OI, plain, x_TI)
    of_bytes = [LowRankForm(64, f, "quantized").nbytes(4096, 4096, torch.bfloat16) for f in ("mxint8", "plain")]
    assert of_bytes[0] * 2 == of_bytes[1] * 17 / 16


def test_what_is_wrong_with_the_statistics_is_said_and_gives_numbers_all_the_same() -> None:
    weight_OI, few_TI = weights(), activations(tokens=10)
    nothing = SVDLLM()(weight_OI, Statistics(COLUMNS))
    assert nothing.note == "no tokens: truncated by the error of the weight, not of its outputs"
    assert torch.equal(product(nothing), product(ASVD(alpha=0.0)(weight_OI, Statistics(COLUMNS))))
    few = SVDLLM()(weight_OI, measured(few_TI))
    assert few.note == "10 tokens for 64 inputs: directions without any count by damping alone"
    assert lost(weight_OI, few, few_TI) < 1e-6 * float((weight_OI @ few_TI.t()).square().sum())
    broken = replace(measured(activations()), gram_II=torch.diag(torch.linspace(-0.1, 2, COLUMNS).double()))
    assert SVDLLM()(weight_OI, broken).note == "damping raised to 1"
    hopeless = replace(broken, gram_II=-torch.eye(COLUMNS).double())
    assert "no Cholesky factor" in SVDLLM()(weight_OI, hopeless).note


@pytest.mark.parametrize(
    "settings",
    [{"ratio": 0.0}, {"ratio": 1.0}, {"multiple": 0}, {"factors": "int8"}, {"damping": 0.0}],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_that_do_not_exist_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        SVDLLM(**settings)


def test_a_weight_that_no_factors_make_smaller_is_refused() -> None:
    with pytest.raises(UsageError, match="1 x 64 are not smaller at any rank; leave it out of `where`"):
        SVDLLM(ratio=0.2).forms(1, COLUMNS)
