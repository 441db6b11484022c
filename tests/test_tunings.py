"""Tuning inside a job: block by block and the model as a whole, resumed, and refused where it cannot be."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tersely.checkpoint import open_checkpoint
from tersely.compression import compress
from tersely.errors import OutputError, UsageError
from tersely.methods.encode.gptq import GPTQ
from tersely.methods.encode.rtn import RTN
from tersely.methods.encode.squeezellm import SqueezeLLM
from tersely.methods.rebase.rotate import Rotate
from tersely.methods.rebase.smooth import Smooth
from tersely.methods.tune import PV, Distill, SignRound
from tersely.plan.reading import recipe_from_toml
from tersely.plan.recipe import Calibration, Change, Recipe, Step, Tuning
from tersely.stored import open_stored
from tests.tiny import tiny
from tests.tokens import write_tokenizer

TEXT = Calibration(samples=12, context=24)
FEW: dict[str, Any] = {"tokens": 3000, "batch": 100, "own_texts": 0, "held_out": 3, "checks": 3}


@pytest.fixture(scope="module")
def llama(source: Callable[[str], Path]) -> Path:
    return source("llama")


@pytest.mark.parametrize("method", [Distill(**FEW, rate=0.02), PV(**FEW, rate=0.02, change=0.1)], ids=lambda m: m.name)
@pytest.mark.parametrize("first", [(), (Change("residual", Rotate()),)], ids=["plain", "rotated"])
def test_a_tuned_model_is_nearer_to_its_source_and_as_large_as_before(
    first: tuple[Change, ...], method: Any, llama: Path, text: Path, tmp_path: Path
) -> None:
    encode = Step("linear", RTN(bits=3, group=16))
    plain = compress(llama, Recipe((*first, encode)), tmp_path / "plain")
    recipe = Recipe((*first, encode, Tuning("linear", method)), TEXT)
    tuned = compress(llama, recipe, tmp_path / "tuned", calibration=text)
    assert tuned.bytes_after == plain.bytes_after
    assert {row.name for row in tuned.rows} == {row.name for row in plain.rows}
    (note,) = (note for note in tuned.notes if note.startswith(f"{method.name}: KL from the source"))
    before, after = (float(part.split()[-1]) for part in note.removesuffix(" nats a token after").split(" before, "))
    assert after < before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plain", "tuned"]
    one, other = open_stored(tmp_path / "plain"), open_stored(tmp_path / "tuned")
    assert one.entries == other.entries
    assert any(not torch.equal(one[name], other[name]) for name in one.entries)


def test_static_scales_of_inputs_stay_what_they_were(llama: Path, text: Path, tmp_path: Path) -> None:
    encode = Step("linear", RTN(bits=8, group=0), "int8-static")
    compress(llama, Recipe((encode,), TEXT), tmp_path / "plain", calibration=text)
    recipe = Recipe((encode, Tuning("linear", Distill(**FEW))), TEXT)
    compress(llama, recipe, tmp_path / "tuned", calibration=text)
    plain, tuned = open_checkpoint(tmp_path / "plain"), open_checkpoint(tmp_path / "tuned")
    scales = [name for name in plain if name.endswith("input_scale")]
    assert scales
    assert all(torch.equal(plain[name], tuned[name]) for name in scales)


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt2", "t5"])
def test_learned_rounding_brings_each_block_nearer_to_what_it_gave(model_type: str, text: Path, tmp_path: Path) -> None:
    path = write_tokenizer(tiny(model_type, tmp_path / "source"))
    encode, method = Step("linear", RTN(bits=3, group=16)), SignRound(steps=20, batch=2, held_out=0, checks=4)
    compress(path, Recipe((encode,)), tmp_path / "plain", format="dense")
    recipe = Recipe((encode, Tuning("linear", method)), TEXT)
    report = compress(path, recipe, tmp_path / "tuned", calibration=text, format="dense")
    assert all("signround: the block's error" in row.note for row in report.rows)
    errors = {row.block: row.note.split("error ")[1].split(", then ") for row in report.rows}
    assert all(float(last) <= float(first) for first, last in errors.values())
    assert any(float(last) < 0.95 * float(first) for first, last in errors.values())
    before, after = (open_checkpoint(tmp_path / name) for name in ("plain", "tuned"))
    assert not all(torch.equal(before[row.name], after[row.name]) for row in report.rows)


@pytest.mark.parametrize("method", [Distill(**FEW), SignRound(steps=4, batch=2)], ids=lambda m: m.name)
def test_equal_tunings_give_equal_bytes(method: Any, llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = Recipe((Step("linear", GPTQ(bits=3, group=16)), Tuning("linear", method)), TEXT)
    compress(llama, recipe, tmp_path / "one", calibration=text)
    compress(llama, recipe, tmp_path / "other", calibration=text)
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "other").iterdir())
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "other" / n).read_bytes() for n in files)


def test_what_cannot_be_tuned_is_refused_before_anything_is_written(llama: Path, text: Path, tmp_path: Path) -> None:
    encode, tune = Step("attention", GPTQ(group=16)), Tuning("linear", Distill(**FEW))
    with pytest.raises(UsageError, match=r"tunes what is encoded, and .*mlp"):
        compress(llama, Recipe((encode, tune), TEXT), tmp_path / "out", calibration=text)
    smooth = Recipe((Change("normed", Smooth()), Step("linear", GPTQ(group=16)), tune), TEXT)
    with pytest.raises(UsageError, match="in the basis of the source"):
        compress(llama, smooth, tmp_path / "out", calibration=text)
    with pytest.raises(UsageError, match="and those that tune"):
        Recipe((tune, encode), TEXT)
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_tunes_is_read_back() -> None:
    recipe = Recipe(
        (Step("linear", GPTQ(), average_bits=2.5), Tuning("mlp", PV()), Tuning("linear", SignRound())), TEXT
    )
    assert recipe_from_toml(recipe.to_toml()) == recipe


def test_gradients_of_the_loss_reach_the_methods_that_ask_for_them(llama: Path, text: Path, tmp_path: Path) -> None:
    report = compress(llama, Recipe((Step("linear", SqueezeLLM(bits=3)),), TEXT), tmp_path / "out", calibration=text)
    assert report.format == "tersely"
    assert not any("no gradients" in row.note for row in report.rows)


def test_a_job_in_several_steps_continues_where_it_was_and_never_takes_what_another_left(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(
        (Change("residual", Rotate()), Step("linear", RTN(bits=3, group=16)), Tuning("linear", Distill(**FEW))), TEXT
    )
    compress(llama, recipe, tmp_path / "whole", calibration=text)

    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tersely.compression.tune_whole", stopped)
        with pytest.raises(KeyboardInterrupt):
            compress(llama, recipe, tmp_path / "out", calibration=text)
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "out.partial")
    with pytest.raises(OutputError, match="holds an unfinished job"):
        compress(llama, recipe, tmp_path / "out", calibration=text)
    other = dataclasses.replace(recipe, seed=1)
    with pytest.raises(OutputError, match="holds another job"):
        compress(llama, other, tmp_path / "out", calibration=text, resume=True)
    compress(llama, recipe, tmp_path / "out", calibration=text, resume=True)
    files = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "out").iterdir())
    assert all((tmp_path / "whole" / n).read_bytes() == (tmp_path / "out" / n).read_bytes() for n in files)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]
