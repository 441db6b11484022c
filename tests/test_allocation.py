"""Bits for each weight from a mean."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from tersely.allocation import allocate, choices
from tersely.checkpoint import open_checkpoint
from tersely.compression import compress
from tersely.errors import UsageError
from tersely.graph import read_graph
from tersely.methods.encode.gptq import GPTQ
from tersely.methods.encode.nf4 import NF4
from tersely.methods.encode.shiftaddllm import ShiftAddLLM
from tersely.plan.recipe import Calibration, Recipe, Step
from tersely.stored import open_stored

Losses = dict[str, dict[int, float]]


def falling(count: int, seed: int, bits: tuple[int, ...] = (2, 3, 4)) -> Losses:
    """Losses that fall with each bit, by less and less."""
    draw = random.Random(seed)
    scales = {f"w{i}": draw.uniform(0.1, 10) for i in range(count)}
    return {name: {b: scale * 4.0**-b for b in bits} for name, scale in scales.items()}


@pytest.mark.parametrize("average", [2.0, 2.2, 2.5, 3.0, 3.7, 4.0])
def test_the_average_is_the_one_requested(average: float) -> None:
    losses = falling(10, 0)
    bits = allocate(losses, dict.fromkeys(losses, 4096), average)
    assert sum(bits.values()) / len(bits) == pytest.approx(average)


def test_weights_of_several_sizes_come_as_near_as_whole_weights_can() -> None:
    losses = falling(12, 1, (2, 3))
    sizes = {name: 1000 * (1 + i % 3) for i, name in enumerate(losses)}
    for average in (2.3, 2.6, 2.9):
        bits = allocate(losses, sizes, average)
        left = average * sum(sizes.values()) - sum(bits[n] * sizes[n] for n in bits)
        assert 0 <= left < min(sizes[n] for n in bits if bits[n] == 2)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("average", [1.4, 2.0, 2.6])
def test_no_other_bits_of_that_average_lose_less(average: float, seed: int) -> None:
    losses = falling(5, seed, (1, 2, 3, 4))

    def loss(bits: tuple[int, ...]) -> float:
        return sum(own[b] for own, b in zip(losses.values(), bits, strict=True))

    budget = round(average * 5)
    best = min(loss(bits) for bits in product((1, 2, 3, 4), repeat=5) if sum(bits) <= budget)
    found = allocate(losses, dict.fromkeys(losses, 7), average)
    assert loss(tuple(found.values())) == pytest.approx(best)


def test_a_width_that_is_not_worth_its_bit_is_passed_over() -> None:
    """Two bits that are little better than one, beside three that are much better."""
    losses = {"a": {1: 1.0, 2: 0.99, 3: 0.1}, "b": {1: 0.5, 2: 0.4, 3: 0.39}}
    assert allocate(losses, {"a": 1, "b": 1}, 2.0) == {"a": 3, "b": 1}
    assert allocate({"a": {2: 0.0, 3: 0.0}}, {"a": 1}, 3.0) == {"a": 2}


def test_an_average_that_no_weights_can_have_is_refused() -> None:
    with pytest.raises(UsageError, match="less than the fewest bits"):
        allocate({"a": {3: 1.0}}, {"a": 1}, 2.5)
    with pytest.raises(UsageError, match="has no bits to choose"):
        Step("linear", NF4(), average_bits=3.0)


def test_the_bits_to_choose_from_lie_around_the_mean_and_are_the_method_s() -> None:
    assert choices(Step("linear", GPTQ(), average_bits=2.5)) == [2, 3, 4]
    assert choices(Step("linear", GPTQ(), average_bits=3.0)) == [2, 3, 4]
    assert choices(Step("linear", ShiftAddLLM(), average_bits=1.5)) == [1, 2, 3]
    assert choices(Step("linear", GPTQ(), average_bits=8.0)) == [7, 8]


def test_in_a_job_the_mean_is_kept_and_the_outputs_lose_less_than_with_the_whole_number_below(
    source: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    calibration = Calibration(samples=12, context=24)

    def lost(name: str, step: Step) -> float:
        report = compress(source("llama"), Recipe((step,), calibration), tmp_path / name, calibration=text)
        return sum(row.error**2 for row in report.rows)

    mixed = lost("mixed", Step("linear", GPTQ(group=16), average_bits=3.5))
    assert lost("more", Step("linear", GPTQ(group=16, bits=4))) < mixed
    assert mixed < lost("less", Step("linear", GPTQ(group=16, bits=3)))
    stored, graph = open_stored(tmp_path / "mixed"), read_graph(open_checkpoint(source("llama")))
    bits = {name: entry.scheme.parts[0].bits for name, entry in stored.entries.items()}  # type: ignore[attr-defined]
    sizes = {name: graph.weight(name).rows * graph.weight(name).columns for name in bits}
    assert 3.3 < sum(bits[name] * sizes[name] for name in bits) / sum(sizes.values()) <= 3.5
