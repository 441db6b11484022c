"""A recipe's cache: written with the checkpoint, used when it writes, seen by what is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tersely.checkpoint import open_checkpoint
from tersely.compression import compress
from tersely.errors import UsageError
from tersely.evaluation.evaluator import evaluate
from tersely.methods.encode.rtn import RTN
from tersely.plan.reading import load_recipe, recipe_from_toml
from tersely.plan.recipe import Recipe, Step
from tersely.runtime import generate
from tersely.runtime.policy import FP8, KIVI
from tersely.verify import verify
from tests.tiny import tiny
from tests.tokens import write_text, write_tokenizer

STEPS = (Step("linear", RTN(bits=8, group=16)),)
COARSE = KIVI(bits=2, group=8, residual=8)


@pytest.fixture(scope="module")
def llama(source: Callable[[str], Path]) -> Path:
    return source("llama")


@pytest.mark.parametrize("format", ["compressed-tensors", "tersely", "dense"])
@pytest.mark.parametrize("cache", [COARSE, FP8()], ids=lambda c: c.method)
def test_the_cache_of_a_recipe_is_in_the_checkpoint_and_in_what_is_measured(
    cache: Any, format: Any, llama: Path, tmp_path: Path
) -> None:
    text = write_text(tmp_path / "text.txt", documents=6, words=30, seed=2)
    plain, cached = tmp_path / "plain", tmp_path / "cached"
    compress(llama, Recipe(STEPS), plain, format=format)
    compress(llama, Recipe(STEPS, cache=cache), cached, format=format)
    assert verify(cached).ran
    one, other = (evaluate(cached, text, against=path, store=None).text for path in (plain, cached))
    assert one is not None
    assert other is not None
    assert one.divergence is not None
    assert other.divergence is not None
    assert one.divergence.kl.value > 1e-6
    assert other.divergence.kl.value == 0
    assert isinstance(generate(cached, "ab cd", max_new_tokens=20), str)


def test_a_recipe_with_a_cache_is_read_back_and_can_be_set() -> None:
    recipe = Recipe(STEPS, cache=COARSE)
    assert recipe_from_toml(recipe.to_toml()) == recipe
    assert recipe.hash != Recipe(STEPS).hash
    assert load_recipe("w4a16", ["cache.method=kivi", "cache.bits=2"]).cache == KIVI(bits=2)
    for wrong, said in (
        ("cache.method=lru", "kivi or fp8"),
        ("cache.bits=2", "no cache method"),
        ("cache.bots=2", "cache"),
    ):
        with pytest.raises(UsageError, match=said):
            load_recipe("w4a16", [wrong])


def test_a_cache_that_the_model_cannot_have_is_refused_before_anything_is_written(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not divide the"):
        compress(llama, Recipe(STEPS, cache=KIVI(group=24, residual=48)), tmp_path / "out")
    t5 = write_tokenizer(tiny("t5", tmp_path / "t5"))
    with pytest.raises(UsageError, match="writes no text from a cache"):
        compress(t5, Recipe(STEPS, cache=FP8()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scales_of_an_fp8_cache_are_accounted_for(llama: Path, tmp_path: Path) -> None:
    compress(llama, Recipe(STEPS, cache=FP8()), tmp_path / "out")
    out = open_checkpoint(tmp_path / "out")
    scales = [name for name in out if name.endswith(("k_scale", "v_scale"))]
    assert len(scales) == 2 * out.config["num_hidden_layers"]
    assert all(torch.equal(out[name], torch.ones(1, dtype=out[name].dtype)) for name in scales)
    assert out.config["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8
