"""Estimators of the vocabulary size against values computed from the published constants."""

from __future__ import annotations

import itertools
import math

import pytest

from tersely.errors import UsageError
from tersely.vocabulary.scaling import (
    cheapest_size,
    loss,
    optimal_flops,
    optimal_parameters,
    suggest_size,
    tokens_per_character,
    width_for,
)

GOLDEN = (
    # N, d, F, V by the power law, by the derivative, by the loss
    (2.87e9, 3200, 1.186e21, 37942, 40993, 35272),
    (3e9, 3200, 1.295e21, 39368, 42539, 36648),
    (7e9, 4096, 7.052e21, 62281, 67450, 59548),
    (13e9, 5120, 2.432e22, 83429, 90504, 81347),
    (30e9, 6048, 1.295e23, 141711, 154071, 141899),
    (70e9, 8192, 7.052e23, 211860, 230861, 217961),
    (130e9, 12288, 2.432e24, 236501, 258138, 248188),
    (300e9, 16384, 1.295e25, 355894, 389324, 383659),
)
CHEAPEST = ((33e6, 10323), (85e6, 15939), (151e6, 24593), (302e6, 32777), (631e6, 40942), (1.13e9, 49416))
SIZES = [10 ** (7.6 + n / 8) for n in range(33)]


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"{row[0]:.3g}")
def test_the_estimates_are_the_published_ones(row: tuple[float, ...]) -> None:
    parameters, *expected = row
    found = suggest_size(parameters)
    own = (found.width, found.flops, found.isoflops, found.derivative, found.loss)
    assert own == pytest.approx(expected, rel=5e-4)


@pytest.mark.parametrize(("parameters", "size"), CHEAPEST)
def test_the_cheapest_size_is_where_training_on_a_text_takes_the_fewest_operations(
    parameters: float, size: int
) -> None:
    width = width_for(parameters)
    found = cheapest_size(parameters, width)
    assert found == pytest.approx(size, rel=1e-4)

    def cost(v: float) -> float:
        return (parameters + v * width) * tokens_per_character(v)

    assert cost(found) < min(cost(0.99 * found), cost(1.01 * found))


@pytest.mark.parametrize(("share", "size"), [(0.2, 10188), (0.5, 13056), (1, 15759), (2, 19033), (5, 24453)])
def test_more_training_asks_for_a_larger_vocabulary(share: float, size: int) -> None:
    assert suggest_size(302e6, flops=share * optimal_flops(302e6)).loss == pytest.approx(size, rel=1e-4)


@pytest.mark.parametrize("parameters", [33e6, 1e9, 7e9, 300e9])
def test_the_loss_is_lowest_at_its_estimate(parameters: float) -> None:
    found = suggest_size(parameters)
    lowest = loss(parameters, found.loss, found.width, found.flops)
    assert lowest < loss(parameters, 0.98 * found.loss, found.width, found.flops)
    assert lowest < loss(parameters, 1.02 * found.loss, found.width, found.flops)


def test_the_vocabulary_grows_with_the_model_but_slower() -> None:
    for name in ("isoflops", "derivative", "loss"):
        own = [(n, getattr(suggest_size(n), name) * width_for(n)) for n in SIZES]
        for (n, vocabulary), (more, larger) in itertools.pairwise(own):
            assert 0 < math.log(larger / vocabulary) / math.log(more / n) < 1, (name, n)


@pytest.mark.parametrize("flops", [1e18, 1e21, 1e25])
def test_the_power_law_of_parameters_is_undone_by_its_inverse(flops: float) -> None:
    assert optimal_flops(optimal_parameters(flops)) == pytest.approx(flops)


def test_tokens_of_a_character_are_the_fitted_ones_and_level_off() -> None:
    found = [tokens_per_character(size) for size in (4096, 32000, 128000, 200000)]
    assert found == pytest.approx([0.3318, 0.2524, 0.2293, 0.2272], abs=5e-5)
    assert tokens_per_character(1e6) == tokens_per_character(200_000)


def test_a_given_width_counts_instead_of_the_table() -> None:
    assert suggest_size(7e9, width=2048).derivative == pytest.approx(2 * suggest_size(7e9).derivative)


@pytest.mark.parametrize("wrong", [{"parameters": 0.0}, {"width": -1.0}, {"flops": math.inf}])
def test_a_number_that_is_not_positive_is_refused_by_name(wrong: dict[str, float]) -> None:
    settings = {"parameters": 1e9, **wrong}
    with pytest.raises(UsageError, match=next(iter(wrong))):
        suggest_size(settings.pop("parameters"), **settings)
