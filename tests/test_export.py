"""A compressed model in another folder: the values stay, and what a form cannot say is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tersely.checkpoint import open_checkpoint
from tersely.compression import compress
from tersely.errors import CheckpointError, OutputError, UsageError
from tersely.export.folder import export_folder
from tersely.methods import METHODS, Encode
from tersely.methods.encode.aser import ASER
from tersely.methods.encode.fp8 import FP8
from tersely.methods.encode.gptq import GPTQ
from tersely.methods.encode.lqer import LQER
from tersely.methods.encode.nf4 import NF4
from tersely.methods.encode.rtn import RTN
from tersely.plan.reading import method_fields
from tersely.plan.recipe import Calibration, Recipe, Step
from tersely.stored import open_stored
from tersely.verify import verify
from tests.tiny import forward

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of peft
TEXT = Calibration(samples=16, context=40)


@pytest.fixture(scope="module")
def llama(source: Callable[[str], Path]) -> Path:
    return source("llama")


def made(llama: Path, out: Path, step: Step, text: Path, **settings: Any) -> Path:
    recipe = Recipe((step,), TEXT) if step.needs else Recipe((step,))
    compress(llama, recipe, out, calibration=text if step.needs else None, **settings)
    return out


def fitting(method: type[Encode]) -> Encode:
    return method(**({"group": 16} if "group" in method_fields(method) else {}))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_every_form_leaves_as_an_ordinary_checkpoint_of_the_same_values(
    method: type[Encode], llama: Path, text: Path, tmp_path: Path
) -> None:
    out = made(llama, tmp_path / "out", Step("linear", fitting(method)), text, format="tersely")
    export_folder(out, tmp_path / "dense", "hf")
    stored, dense = open_stored(out), open_checkpoint(tmp_path / "dense")
    assert set(dense) == set(stored)
    assert "quantization_config" not in dense.config
    assert all(torch.equal(dense[name], stored[name]) for name in dense)
    assert forward(tmp_path / "dense").isfinite().all()


@pytest.mark.parametrize(
    "method", [GPTQ(group=16), RTN(group=16, symmetric=False, bits=3), FP8()], ids=lambda m: m.name
)
def test_a_form_that_compressed_tensors_has_leaves_as_if_it_had_been_written_so(
    method: Any, llama: Path, text: Path, tmp_path: Path
) -> None:
    own = made(llama, tmp_path / "own", Step("linear", method), text, format="tersely")
    direct = made(llama, tmp_path / "direct", Step("linear", method), text, format="compressed-tensors")
    export_folder(own, tmp_path / "exported", "compressed-tensors")
    one, other = open_checkpoint(direct), open_checkpoint(tmp_path / "exported")
    assert one.config == other.config
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert verify(tmp_path / "exported").ran


@pytest.mark.parametrize("method", [ASER(rank=4, outliers=2, group=16), LQER(rank=4, group=16)], ids=lambda m: m.name)
def test_a_low_rank_part_leaves_as_an_adapter_beside_a_standard_checkpoint(
    method: Any, llama: Path, text: Path, tmp_path: Path
) -> None:
    out = made(llama, tmp_path / "out", Step("linear", method), text)
    export_folder(out, tmp_path / "with", "adapter")
    assert sorted(p.name for p in (tmp_path / "with" / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert verify(tmp_path / "with").ran
    from tersely.runtime import load_model

    base: Any = load_model(tmp_path / "with")
    if not isinstance(base, peft.PeftModel) and not getattr(base, "_hf_peft_config_loaded", False):
        base = peft.PeftModel.from_pretrained(base, str(tmp_path / "with" / "adapter"))
    export_folder(out, tmp_path / "dense", "hf")
    expected = forward(tmp_path / "dense")
    ids = torch.arange(expected.shape[1])[None]
    with torch.inference_mode():
        found = base(input_ids=ids).logits
        plain = load_model(tmp_path / "dense")(input_ids=ids).logits
    torch.testing.assert_close(found, plain, rtol=0, atol=2e-4)


def test_what_a_form_cannot_say_is_refused_and_nothing_is_written(llama: Path, text: Path, tmp_path: Path) -> None:
    nf4 = made(llama, tmp_path / "nf4", Step("linear", NF4()), text)
    rounded = made(llama, tmp_path / "rounded", Step("linear", RTN(bits=8, group=0), "int8"), text)
    branch = made(llama, tmp_path / "branch", Step("linear", ASER(rank=4, outliers=2), "int8"), text)
    before = sorted(tmp_path.iterdir())
    for source, to, message in (
        (nf4, "compressed-tensors", "no form for nf4"),
        (nf4, "adapter", "no weight has a low-rank part"),
        (rounded, "hf", "inputs are rounded"),
        (branch, "adapter", 'inputs = "full"'),
    ):
        with pytest.raises(UsageError, match=message):
            export_folder(source, tmp_path / "new", to)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="nothing in it is encoded"):
        export_folder(llama, tmp_path / "new", "hf")
    with pytest.raises(OutputError, match="never overwrites"):
        export_folder(nf4, rounded, "hf")
    assert sorted(tmp_path.iterdir()) == before
