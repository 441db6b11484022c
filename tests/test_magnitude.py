"""Magnitude pruning, by its card: counts and patterns are in test_sparsity.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersely.measure import Statistics
from tersely.methods.encode.magnitude import Magnitude


def weights(rows: int = 16, columns: int = 64) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(0))


def decoded(method: Magnitude, weight_OI: Tensor) -> Tensor:
    return method(weight_OI, Statistics(weight_OI.shape[1])).decode()


@pytest.mark.parametrize("method", [Magnitude(), Magnitude(scope="row"), Magnitude(pattern="2:4")], ids=repr)
def test_it_is_idempotent_moves_with_the_scale_and_leaves_what_is_kept_as_it_is(method: Magnitude) -> None:
    weight_OI = weights()
    own = decoded(method, weight_OI)
    assert torch.equal(decoded(method, own), own)
    assert torch.equal(decoded(method, 4 * weight_OI), 4 * own)
    assert torch.equal(own[own != 0], weight_OI[own != 0])


def test_in_a_tensor_the_smallest_go_wherever_they_are_and_in_a_row_as_many_of_each() -> None:
    weight_OI = weights()
    weight_OI[0] *= 0.01
    whole, rows = decoded(Magnitude(0.25), weight_OI), decoded(Magnitude(0.25, scope="row"), weight_OI)
    assert float(whole[whole != 0].abs().min()) >= float(weight_OI[whole == 0].abs().max())
    assert not bool(whole[0].any())
    assert bool(((rows == 0).sum(1) == 16).all())


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_more_sparsity_removes_what_less_removes(scope: str) -> None:
    weight_OI = weights().mul(4).round()
    before = torch.zeros_like(weight_OI, dtype=torch.bool)
    for sparsity in (0.1, 0.5, 0.9):
        zeros = decoded(Magnitude(sparsity, scope=scope), weight_OI) == 0  # type: ignore[arg-type]
        assert bool((zeros | ~before).all())
        before = zeros
