"""ASVD, by the invariants of its card."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.encode.asvd import ASVD
from tests.test_svd_llm import COLUMNS, SHAPES, activations, factors, lost, measured, product, weights


@SHAPES
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_it_is_the_truncated_svd_of_the_scaled_weight(rows: int, alpha: float) -> None:
    """By the published steps: W diag(s) = U diag(sigma) V^T, cut, and diag(s)^-1 put back."""
    weight_OI, stats = weights(rows), measured(activations())
    encoded = ASVD(ratio=0.3, alpha=alpha)(weight_OI, stats)
    assert stats.absmean_I is not None
    scale_I = stats.absmean_I**alpha + 1e-6 if alpha else torch.ones(COLUMNS).double()
    u, sigma, v = torch.linalg.svd(weight_OI * scale_I, full_matrices=False)
    rank = factors(encoded).form.rank
    torch.testing.assert_close(product(encoded), u[:, :rank] * sigma[:rank] @ (v[:rank] / scale_I), rtol=0, atol=1e-6)


def test_weighing_the_inputs_lowers_the_error_of_the_outputs() -> None:
    """On the mean over seeds, where inputs differ in size and are independent: between the two there is no theorem."""
    ratio = 0.0
    for seed in range(4):
        x_TI = torch.randn((512, COLUMNS), generator=torch.Generator().manual_seed(seed)).double()
        x_TI *= torch.logspace(-1, 1, COLUMNS, dtype=torch.float64)
        weight_OI = weights(seed=seed)
        errors = [lost(weight_OI, ASVD(alpha=alpha)(weight_OI, measured(x_TI)), x_TI) for alpha in (0.5, 0.0)]
        ratio += errors[0] / errors[1] / 4
    assert ratio < 0.5


def test_only_the_weighing_is_measured_and_without_tokens_the_note_says_so() -> None:
    assert ASVD().needs == {"absmean"}
    assert not ASVD(alpha=0.0).needs
    weight_OI, nothing = weights(), Statistics(COLUMNS, needs=ASVD().needs)
    assert ASVD()(weight_OI, nothing).note == "no tokens: all inputs count alike"
    plain = ASVD(alpha=0.0)(weight_OI, nothing)
    assert plain.note == ""
    assert torch.equal(ASVD()(weight_OI, nothing).decode(), plain.decode())


def test_inputs_that_are_always_zero_are_left_to_chance_and_harm_nothing() -> None:
    weight_OI, x_TI = weights(), activations()
    x_TI[:, :40] = 0
    encoded = ASVD(ratio=0.2)(weight_OI, measured(x_TI))
    assert bool(product(encoded).isfinite().all())
    assert lost(weight_OI, encoded, x_TI) < 1e-9 * float((weight_OI @ x_TI.t()).square().sum())


@pytest.mark.parametrize(
    "settings",
    [{"ratio": 1.5}, {"alpha": -0.1}, {"alpha": 2.0}, {"multiple": -1}, {"factors": "fp8"}],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_that_do_not_exist_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        ASVD(**settings)
