"""FineQuant, by the letters of its card."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tersely.codecs.integer import IntegerForm
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.encode.finequant import FineQuant
from tersely.methods.encode.rtn import RTN

COLUMNS = 1024


def gaussian(columns: int = COLUMNS, seed: int = 0) -> Tensor:
    return torch.randn((32, columns), generator=torch.Generator().manual_seed(seed))


def with_outliers(columns: int = COLUMNS, seed: int = 0) -> Tensor:
    """One of 50 standard deviations in every output."""
    weight_OI = gaussian(columns, seed)
    places = torch.randint(0, columns, (32, 1), generator=torch.Generator().manual_seed(seed + 1))
    return weight_OI.scatter_(1, places, 50.0)


def heavy_tailed(seed: int = 0) -> Tensor:
    return gaussian(seed=seed) / gaussian(seed=seed + 1).abs().clamp_min(0.05)


def group_of(weight_OI: Tensor, **settings: Any) -> int:
    """That was chosen, in inputs."""
    (part,) = FineQuant(**settings)(weight_OI, Statistics(weight_OI.shape[1])).parts
    assert isinstance(part.form, IntegerForm)
    return part.form.group or weight_OI.shape[1]


def squared_error(weight_OI: Tensor, decoded_OI: Tensor) -> float:
    return float((weight_OI.double() - decoded_OI.double()).square().sum())


@pytest.mark.parametrize("seed", range(3))
def test_a_gaussian_weight_keeps_one_group_per_output_and_outliers_force_small_groups(seed: int) -> None:
    """(a)"""
    assert group_of(gaussian(seed=seed)) == COLUMNS
    assert group_of(with_outliers(seed=seed)) == 64
    assert group_of(with_outliers(seed=seed), min_group=32) == 32


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("make", [gaussian, with_outliers, heavy_tailed])
def test_the_chosen_groups_lose_no_more_than_one_group_per_output(make: Any, bits: int) -> None:
    """(b)"""
    weight_OI = make()
    nothing = Statistics(COLUMNS)
    base = squared_error(weight_OI, RTN(bits=bits, group=0)(weight_OI, nothing).decode())
    for threshold in (0.01, 0.1, 0.3):
        chosen = FineQuant(bits=bits, shrink_threshold=threshold)(weight_OI, nothing)
        assert squared_error(weight_OI, chosen.decode()) <= base


def test_smaller_groups_are_left_alone_where_they_would_round_worse() -> None:
    """Integers, and one of -7.5 in every output: its grid holds them, those of ranges of 3 do not."""
    weight_OI = (gaussian(256) * 2).round().clamp(-3, 3)
    weight_OI[:, 5] = -7.5
    encoded = FineQuant()(weight_OI, Statistics(256))
    assert squared_error(weight_OI, encoded.decode()) == pytest.approx(32 * 0.25)
    assert group_of(weight_OI) == 256
    assert "rounds worse" in encoded.note


@pytest.mark.parametrize("make", [gaussian, with_outliers, heavy_tailed])
def test_a_lower_threshold_never_makes_the_groups_larger(make: Any) -> None:
    """(c)"""
    groups = [group_of(make(), shrink_threshold=t, min_group=16) for t in (0.5, 0.3, 0.2, 0.1, 0.05, 0.01)]
    assert groups == sorted(groups, reverse=True)
    assert len(set(groups)) > 1


@pytest.mark.parametrize("scale", [2.0**-12, 2.0**5, 0.37])
def test_the_choice_does_not_depend_on_the_scale_of_the_weight(scale: float) -> None:
    """(d)"""
    for weight_OI in (gaussian(), with_outliers(), heavy_tailed()):
        assert group_of(weight_OI * scale) == group_of(weight_OI)


@pytest.mark.parametrize(("columns", "expected"), [(192, 64), (96, 96), (7, 7), (11008 // 8, 32), (1 << 10, 32)])
def test_groups_are_powers_of_two_that_divide_the_inputs(columns: int, expected: int) -> None:
    weight_OI = with_outliers(columns)
    method = FineQuant(min_group=32 if expected == 32 else 64)
    assert group_of(weight_OI, min_group=method.min_group) == expected
    (largest,) = method.forms(*weight_OI.shape)
    encoded = method(weight_OI, Statistics(columns))
    assert encoded.forms == (largest,)
    stored = sum(t.numel() * t.element_size() for t in encoded.tensors().values())
    assert stored == largest.nbytes(32, columns, torch.float32)


def test_the_note_says_what_was_chosen_and_why() -> None:
    assert FineQuant()(with_outliers(256), Statistics(256)).note.startswith("groups of 64: ranges shrink by 0.")
    assert "one group per output: ranges shrink by 0.0" in FineQuant()(gaussian(), Statistics(COLUMNS)).note
    assert FineQuant()(gaussian(7), Statistics(7)).note == "one group per output"


def test_a_weight_of_zeros_stays_zero() -> None:
    encoded = FineQuant()(torch.zeros((4, 256)), Statistics(256))
    assert not encoded.decode().any()


@pytest.mark.parametrize("settings", [{"bits": 9}, {"min_group": 48}, {"shrink_threshold": 0.0}])
def test_settings_that_do_not_exist_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        FineQuant(**settings)
