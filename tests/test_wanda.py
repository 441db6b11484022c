"""Wanda, by the letters of its card (a and b for all sparsity in test_sparsity.py)."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from tersely.measure import Statistics
from tersely.methods.encode.magnitude import Magnitude
from tersely.methods.encode.wanda import Wanda

BOTH = pytest.mark.parametrize("method", [Wanda(), Wanda(0.7), Wanda(pattern="2:4")], ids=repr)


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))


def measured(x_TI: Tensor) -> Statistics:
    stats = Statistics(x_TI.shape[1], needs=frozenset({"square"}))
    stats.add(x_TI)
    return stats.finish()


@BOTH
def test_b_what_is_kept_is_the_weight_bit_for_bit(method: Wanda) -> None:
    weight_OI = random(16, 64).bfloat16()
    own = method(weight_OI, measured(random(200, 64, 1))).decode()
    assert torch.equal(own[own != 0], weight_OI[own != 0])


def test_c_inputs_of_one_size_give_the_magnitude_mask_of_each_row() -> None:
    weight_OI = random(16, 64)
    stats = Statistics(64, tokens=512, squares_I=torch.full((64,), 3.0))
    assert torch.equal(Wanda()(weight_OI, stats).decode(), Magnitude(scope="row")(weight_OI, stats).decode())


@BOTH
def test_d_scales_of_the_inputs_and_of_the_rows_change_no_mask(method: Wanda) -> None:
    weight_OI, x_TI = random(16, 64), random(200, 64, 1) * torch.linspace(0.1, 4, 64)
    own = method(weight_OI, measured(x_TI)).decode()
    assert torch.equal(method(weight_OI, measured(8 * x_TI)).decode(), own)
    rows = 2.0 ** torch.arange(-8, 8)[:, None]
    assert torch.equal(method(weight_OI * rows, measured(x_TI)).decode(), own * rows)


def test_e_on_inputs_that_do_not_correlate_no_other_mask_of_a_row_loses_less() -> None:
    weight_OI = random(6, 8)
    squares = torch.linspace(0.2, 5, 8)
    own = Wanda()(weight_OI, Statistics(8, tokens=100, squares_I=squares)).decode()
    for row, pruned in zip(weight_OI, own, strict=True):
        losses = [float((squares * row.square())[list(gone)].sum()) for gone in combinations(range(8), 4)]
        assert float((squares * (row - pruned).square()).sum()) == pytest.approx(min(losses))


def test_f_with_outlier_inputs_the_outputs_are_nearer_than_by_magnitude() -> None:
    weight_OI, x_TI = random(32, 64), random(300, 64, 1)
    x_TI[:, ::16] *= 20
    errors = [
        float((x_TI @ (weight_OI - method(weight_OI, measured(x_TI)).decode()).t()).norm())
        for method in (Wanda(), Magnitude(scope="row"), Magnitude())
    ]
    assert errors[0] < 0.7 * min(errors[1:])


def test_an_input_that_is_never_used_goes_first() -> None:
    x_TI = random(200, 64, 1)
    x_TI[:, 5] = 0
    assert not bool(Wanda(0.1)(random(16, 64), measured(x_TI)).decode()[:, 5].any())


def test_with_few_tokens_the_weights_alone_decide_and_the_note_says_so() -> None:
    weight_OI = random(16, 64)
    for tokens, stats in ((0, Statistics(64)), (6, measured(random(6, 64, 1)))):
        encoded = Wanda()(weight_OI, stats)
        assert f"{tokens} calibration tokens for 64 inputs" in encoded.note
        assert "pruned by magnitude" in encoded.note
        assert torch.equal(encoded.decode(), Magnitude(scope="row")(weight_OI, stats).decode())
    assert Wanda()(weight_OI, measured(random(7, 64, 1))).note == ""
