"""DSnoT, by the letters of its card (a and the counts of patterns in test_sparsity.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.encode.dsnot import DSnoT
from tersely.methods.encode.magnitude import Magnitude
from tersely.methods.encode.sparsegpt import SparseGPT
from tersely.methods.encode.wanda import Wanda

KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"sparsity": 0.7},
    {"pattern": "2:4"},
    {"start": "magnitude"},
    {"start": "sparsegpt"},
    {"threshold": 0.0, "power": 0.0},
)
EACH = pytest.mark.parametrize("settings", KINDS, ids=str)


def weights(rows: int = 24, columns: int = 64, seed: int = 0) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))


def measured(means: float = 1.0, columns: int = 64, seed: int = 0) -> Statistics:
    generator = torch.Generator().manual_seed(1000 + seed)
    x_TI = torch.randn((256, columns), generator=generator) * torch.linspace(0.2, 2, columns)
    x_TI = x_TI - x_TI.mean(0) + means * torch.randn(columns, generator=generator)
    stats = Statistics(columns, needs=frozenset({"mean", "square", "gram"}))
    stats.add(x_TI)
    return stats.finish()


def rest(weight_OI: Tensor, decoded_OI: Tensor, stats: Statistics) -> Tensor:
    """How far the mean of each output is from the source's."""
    assert stats.mean_I is not None
    return ((weight_OI - decoded_OI) @ stats.mean_I).abs()


@EACH
def test_b_what_is_kept_is_the_weight_bit_for_bit(settings: dict[str, Any]) -> None:
    weight_OI = weights()
    own = DSnoT(**settings)(weight_OI, measured()).decode()
    assert torch.equal(own[own != 0], weight_OI[own != 0])


@EACH
def test_a_the_counts_of_the_start_stay(settings: dict[str, Any]) -> None:
    weight_OI, stats = weights(), measured()
    start = DSnoT(**settings, cycles=0)(weight_OI, stats).decode() != 0
    own = DSnoT(**settings)(weight_OI, stats).decode() != 0
    assert not torch.equal(start, own)
    assert torch.equal(start.sum(1), own.sum(1))


@EACH
def test_c_no_swap_takes_the_mean_of_an_output_away_from_the_source(settings: dict[str, Any]) -> None:
    weight_OI, stats = weights(), measured()
    before = rest(weight_OI, DSnoT(**settings, cycles=0)(weight_OI, stats).decode(), stats)
    for cycles in (1, 2, 5, 50):
        after = rest(weight_OI, DSnoT(**settings, cycles=cycles)(weight_OI, stats).decode(), stats)
        assert bool((after <= before + 1e-5).all())
        before = after
    first = rest(weight_OI, DSnoT(**settings, cycles=0)(weight_OI, stats).decode(), stats)
    assert float(before.mean()) < 0.5 * float(first.mean())


@EACH
def test_d_inputs_whose_means_are_zero_leave_the_mask_as_it_is(settings: dict[str, Any]) -> None:
    weight_OI, stats = weights(), measured()
    stats.sum_I = torch.zeros(64)
    start = DSnoT(**settings, cycles=0)(weight_OI, stats).decode()
    assert torch.equal(DSnoT(**settings)(weight_OI, stats).decode(), start)


@pytest.mark.parametrize("kind", [{"sparsity": 0.7}, {"pattern": "2:4"}], ids=str)
def test_e_without_cycles_it_is_the_mask_that_it_starts_from(kind: dict[str, Any]) -> None:
    weight_OI, stats = weights(), measured()
    for start, method in (
        ("wanda", Wanda(**kind)),
        ("magnitude", Magnitude(**kind, scope="row")),
        ("sparsegpt", SparseGPT(**kind, scope="row", update=False)),
    ):
        own = DSnoT(**kind, start=start, cycles=0)  # type: ignore[arg-type]
        assert torch.equal(own(weight_OI, stats).decode(), method(weight_OI, stats).decode())
        assert method.needs <= own.needs


def test_a_swap_is_the_one_of_the_paper() -> None:
    """Of what is removed, the one with the larger share of what the mean lacks returns; the cheapest of those whose
    share has the other sign goes, if that leaves less."""
    weight_OI = torch.tensor([[0.5, -1.0, 3.0, 2.0, 3.0, 4.0]])
    mean_I = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.5, -1.0])
    variance_I = torch.ones(6)
    stats = Statistics(6, tokens=100, sum_I=100 * mean_I, squares_I=100 * (variance_I + mean_I.square()))
    start = DSnoT(sparsity=1 / 3, start="magnitude", cycles=0)(weight_OI, stats).decode()
    assert start.tolist() == [[0, 0, 3, 2, 3, 4]]
    # 0.5 - 2 = -1.5 is lacking. With the second again it is 0.5, and without the fourth, the cheapest, 2.5: no swap.
    own = DSnoT(sparsity=1 / 3, start="magnitude", cycles=1)(weight_OI, stats).decode()
    assert own.tolist() == [[0, 0, 3, 2, 3, 4]]
    mean_I[3] = 0.4
    stats = Statistics(6, tokens=100, sum_I=100 * mean_I, squares_I=100 * (variance_I + mean_I.square()))
    # Without the fourth it is 1.3 now.
    own = DSnoT(sparsity=1 / 3, start="magnitude", cycles=1)(weight_OI, stats).decode()
    assert own.tolist() == [[0, -1, 3, 0, 3, 4]]


def test_without_tokens_it_is_the_start_and_its_note() -> None:
    weight_OI = weights()
    encoded = DSnoT()(weight_OI, Statistics(64))
    assert "pruned by magnitude" in encoded.note
    assert torch.equal(encoded.decode(), Magnitude(scope="row")(weight_OI, Statistics(64)).decode())


@pytest.mark.parametrize("settings", [{"cycles": -1}, {"threshold": -0.1}, {"start": "rtn"}], ids=str)
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        DSnoT(**settings)
