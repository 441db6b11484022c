"""Jobs: what is refused, what is written beside the weights, and what happens when a job is stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tersely
from tersely.checkpoint import open_checkpoint
from tersely.compression import compress, run
from tersely.encoding import Format
from tersely.errors import CheckpointError, DataError, OutputError, ResourceError, UsageError
from tersely.job import prepare
from tersely.methods.encode.gptq import GPTQ
from tersely.methods.encode.rtn import RTN
from tersely.plan.reading import recipe_from_toml
from tersely.plan.recipe import Calibration, Recipe, Step
from tersely.results import Report, Row
from tests.tiny import forward, tiny
from tests.tokens import write_text, write_tokenizer

FREE = Recipe((Step("linear", RTN(bits=4, group=16)),))
TEXT = Calibration(samples=8, context=32)
MEASURED = Recipe((Step("linear", GPTQ(bits=4, group=16)),), TEXT)
MIXED = Recipe((Step("linear", GPTQ(bits=4, group=16)), Step("attention", RTN(bits=8, group=0))), TEXT)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tiny("llama", tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def stopping(after: int) -> Callable[[str, float], None]:
    """A progress that is Ctrl-C at its n-th report."""
    reports = 0

    def say(_: str, __: float) -> None:
        nonlocal reports
        reports += 1
        if reports > after:
            raise KeyboardInterrupt

    return say


def stopped(source: Path, recipe: Recipe, out: Path, text: Path | None = None, after: int = 5) -> None:
    """Leave an unfinished job behind."""
    with pytest.raises(KeyboardInterrupt):
        compress(source, recipe, out, calibration=text, progress=stopping(after))
    assert not out.exists()
    assert (out.with_name(out.name + ".partial") / "job.json").is_file()


# Killed at any moment


@pytest.mark.parametrize(
    ("model_type", "recipe", "format", "stride"),
    [
        ("llama", MEASURED, "compressed-tensors", 7),
        ("gpt2", MEASURED, "dense", 11),
        ("mixtral", MIXED, "compressed-tensors", 11),
        ("t5", FREE, "compressed-tensors", 9),
    ],
    ids=["llama-measured", "gpt2-dense", "mixtral-mixed", "t5-data-free"],
)
def test_a_job_killed_at_any_moment_and_continued_ends_with_the_same_bytes(
    model_type: str, recipe: Recipe, format: Format, stride: int, text: Path, tmp_path: Path
) -> None:
    source = write_tokenizer(tiny(model_type, tmp_path / "source"))
    before = contents(source)
    plan = {
        "source": str(source),
        "recipe": recipe.to_toml(),
        "calibration": str(text) if recipe.needs else None,
        "format": format,
        "folder": str(tmp_path),
        "stride": stride,
    }
    (tmp_path / "job.json").write_text(json.dumps(plan), "utf-8")
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("killing.py")), str(tmp_path / "job.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout.splitlines()[-1])
    assert result["failed"] == [], ran.stderr
    assert result["moments"] > 20
    whole = contents(tmp_path / "whole")
    assert {"config.json", "manifest.json", "recipe.toml", "report.json", "model.safetensors"} <= whole.keys()
    for number in result["killed"]:
        assert contents(tmp_path / f"killed-{number}") == whole, number
    assert contents(source) == before
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("recipe", [FREE, MEASURED, MIXED], ids=["data-free", "measured", "mixed"])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_job_that_is_stopped_and_continued_ends_with_the_same_files(
    after: int, recipe: Recipe, llama: Path, text: Path, tmp_path: Path
) -> None:
    data = text if recipe.needs else None
    whole = compress(llama, recipe, tmp_path / "whole", calibration=data)
    stopped(llama, recipe, tmp_path / "out", data, min(after, 1) if recipe is FREE else after)
    report = compress(llama, recipe, tmp_path / "out", calibration=data, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert report.to_dict() == whole.to_dict()


# Continuing another job


def other_text(_: Path, tmp_path: Path) -> dict[str, Any]:
    return {"calibration": write_text(tmp_path / "other.txt", seed=1)}


def other_source(llama: Path, tmp_path: Path) -> dict[str, Any]:
    copy = Path(shutil.copytree(llama, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return {"source": copy}


def other_config(llama: Path, tmp_path: Path) -> dict[str, Any]:
    copy = Path(shutil.copytree(llama, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text("utf-8"))
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}), "utf-8")
    return {"source": copy}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda *_: {"recipe": Recipe((Step("linear", GPTQ(bits=3, group=16)),), TEXT)}, "recipe.steps.0.bits: 4 .*3"),
        (lambda *_: {"recipe": Recipe(MEASURED.steps, TEXT, seed=1)}, "recipe.seed: 0 then, 1 now"),
        (
            lambda *_: {"recipe": Recipe(MEASURED.steps, Calibration(7, 32))},
            "recipe.calibration.samples: 8 then, 7 now",
        ),
        (lambda *_: {"format": "dense"}, "format: .*compressed-tensors.* then, .*dense.* now"),
        (other_text, "calibration: "),
        (other_source, "source.model.safetensors: "),
        (other_config, "source.config.json: "),
    ],
    ids=["recipe", "seed", "samples", "format", "text", "weights", "config"],
)
@pytest.mark.parametrize("finished", [False, True], ids=["unfinished", "finished"])
def test_continuing_another_job_is_refused_with_the_difference_named(
    finished: bool,
    change: Callable[[Path, Path], dict[str, Any]],
    named: str,
    llama: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    if finished:
        compress(llama, MEASURED, out, calibration=text)
    else:
        stopped(llama, MEASURED, out, text)
    kept = contents(out if finished else tmp_path / "out.partial" / "units")
    same: dict[str, Any] = {"source": llama, "recipe": MEASURED, "out": out, "calibration": text, "resume": True}
    with pytest.raises(OutputError, match=named):
        compress(**{**same, **change(llama, tmp_path)})
    assert contents(out if finished else tmp_path / "out.partial" / "units") == kept
    compress(**same)


def test_continuing_a_finished_job_changes_nothing_and_gives_its_report(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    first = compress(llama, MEASURED, tmp_path / "out", calibration=text)

    def state() -> dict[Path, tuple[int, int]]:
        return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (tmp_path / "out").iterdir()}

    before = state()
    again = compress(llama, MEASURED, tmp_path / "out", calibration=text, resume=True)
    assert again.to_dict() == first.to_dict()
    assert state() == before


def test_nothing_is_overwritten(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    for resume in (False, True):
        with pytest.raises(OutputError, match=str(tmp_path / "out")):
            compress(llama, FREE, tmp_path / "out", resume=resume)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine"]
    stopped(llama, FREE, tmp_path / "other", after=1)
    with pytest.raises(OutputError, match="--resume"):
        compress(llama, FREE, tmp_path / "other")


def test_resume_without_an_unfinished_job_starts_one(llama: Path, tmp_path: Path) -> None:
    compress(llama, FREE, tmp_path / "out", resume=True)
    compress(llama, FREE, tmp_path / "plain")
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


# What is written


def test_equal_jobs_give_equal_bytes_wherever_and_whenever_they_run(llama: Path, text: Path, tmp_path: Path) -> None:
    for name in ("a", "b/c/d"):
        compress(llama, MEASURED, tmp_path / name, calibration=text)
    assert contents(tmp_path / "a") == contents(tmp_path / "b/c/d")
    written = b"".join(p.read_bytes() for p in (tmp_path / "a").iterdir() if p.suffix in (".json", ".toml"))
    assert str(tmp_path / "a").encode() not in written


def test_everything_of_the_source_is_carried_over_or_named(llama: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    (source / "LICENSE").write_text("terms")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "report.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"")
    (source / ".git").mkdir()
    report = compress(source, FREE, tmp_path / "out")
    out = tmp_path / "out"
    for name in ("LICENSE", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert not (out / "pytorch_model.bin").exists()
    assert {"pytorch_model.bin was left behind", ".git/ was left behind"} <= set(report.notes)
    assert json.loads((out / "report.json").read_text("utf-8"))["format"] == "compressed-tensors"


def test_recipe_manifest_and_report_say_what_was_done(llama: Path, text: Path, tmp_path: Path) -> None:
    report = compress(llama, MIXED, tmp_path / "out", calibration=text)
    out = tmp_path / "out"
    assert recipe_from_toml((out / "recipe.toml").read_text("utf-8")) == MIXED
    manifest = json.loads((out / "manifest.json").read_text("utf-8"))
    assert manifest["tersely"] == tersely.__version__
    assert manifest["seed"] == 0
    assert manifest["recipe_hash"] == MIXED.hash
    assert manifest["versions"]["torch"] == torch.__version__.partition("+")[0] or torch.__version__
    checkpoint = open_checkpoint(llama)
    assert manifest["source"]["files"] == checkpoint.sha256()
    assert manifest["tensors"].keys() == set(checkpoint)
    assert manifest["files"] == {n: h for n, h in contents(out).items() if n != "manifest.json"}
    assert report.calibration is not None
    assert manifest["data"] == report.calibration
    plain = json.loads((out / "report.json").read_text("utf-8"))
    assert plain == json.loads(json.dumps(report.to_dict()))
    assert Row(**{k: v for k, v in plain["rows"][0].items() if k != "bits"}) == report.rows[0]


def test_a_report_counts_bits_with_scales(llama: Path, tmp_path: Path) -> None:
    report: Report = compress(llama, FREE, tmp_path / "out")
    row = next(r for r in report.rows if r.name.endswith("mlp.down_proj.weight"))
    numbers = 64 * 96
    assert row.parameters == numbers
    assert row.bytes_before == 4 * numbers
    assert row.bytes_after == numbers // 2 + 4 * (numbers // 16) + 16  # codes, float32 scales, the shape
    assert row.bits == 8 * row.bytes_after / numbers


def test_progress_rises_to_the_end(llama: Path, text: Path, tmp_path: Path) -> None:
    said: list[tuple[str, float]] = []
    compress(
        llama, MEASURED, tmp_path / "out", calibration=text, progress=lambda what, share: said.append((what, share))
    )
    shares = [share for _, share in said]
    assert shares == sorted(shares)
    assert 0 <= shares[0] < 1
    assert said[-1] == ("finished", 1.0)


def test_sharded_sources_are_compressed_like_single_files(llama: Path, text: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    plain: Any = LlamaForCausalLM  # untyped in transformers
    sharded = Path(shutil.copytree(llama, tmp_path / "sharded", ignore=shutil.ignore_patterns("*.safetensors")))
    plain.from_pretrained(llama).save_pretrained(sharded, max_shard_size="50KB")
    assert (sharded / "model.safetensors.index.json").is_file()
    for name, source in (("one", llama), ("many", sharded)):
        compress(source, MEASURED, tmp_path / name, calibration=text)
    one, many = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "many")
    assert set(one) == set(many)
    assert all(torch.equal(one[name], many[name]) for name in one)


# What is refused


def test_a_job_that_cannot_fit_is_refused_before_anything_is_written(llama: Path, tmp_path: Path) -> None:
    import dataclasses

    job = prepare(llama, FREE, tmp_path / "out")
    for change, named in (({"memory_available": 1}, "of memory"), ({"disk_available": 1}, "of disk")):
        small = dataclasses.replace(job, cost=dataclasses.replace(job.cost, **change))
        with pytest.raises(ResourceError, match=named):
            run(small)
    assert not list(tmp_path.iterdir())


def test_preparing_writes_nothing_and_tells_the_size_of_the_output(llama: Path, text: Path, tmp_path: Path) -> None:
    for recipe, data in ((FREE, None), (MEASURED, text), (MIXED, text)):
        job = prepare(llama, recipe, tmp_path / "out", calibration=data)
        assert not list(tmp_path.iterdir())
        report = run(job)
        assert report.bytes_after == job.cost.output
        shutil.rmtree(tmp_path / "out")


def test_a_recipe_and_a_calibration_must_go_together(llama: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--calibration"):
        prepare(llama, MEASURED, tmp_path / "out")
    with pytest.raises(UsageError, match="no effect"):
        prepare(llama, FREE, tmp_path / "out", calibration=text)
    with pytest.raises(UsageError, match="'zip'"):
        prepare(llama, FREE, tmp_path / "out", format="zip")  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:99", "cud"])
def test_a_device_that_is_not_there_is_refused(device: str, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--device"):
        prepare(llama, FREE, tmp_path / "out", device=device)


def test_a_calibration_text_that_is_too_short_is_refused(llama: Path, tmp_path: Path) -> None:
    short = write_text(tmp_path / "short.txt", documents=3)
    with pytest.raises(DataError, match="calibration asks for 8 samples, but there are only 3"):
        prepare(llama, MEASURED, tmp_path / "out", calibration=short)


def test_a_source_without_a_tokenizer_is_refused_where_text_is_needed(text: Path, tmp_path: Path) -> None:
    bare = tiny("llama", tmp_path / "bare")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        prepare(bare, MEASURED, tmp_path / "out", calibration=text)
    compress(bare, FREE, tmp_path / "out")


def test_a_source_that_is_compressed_already_is_refused(llama: Path, tmp_path: Path) -> None:
    compress(llama, FREE, tmp_path / "once")
    with pytest.raises(CheckpointError, match=r"quantized already \(compressed-tensors\)"):
        compress(tmp_path / "once", FREE, tmp_path / "twice")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"]
)
@pytest.mark.parametrize("format", ["compressed-tensors", "dense"])
def test_weights_that_are_not_finite_are_refused_by_name(
    format: Format, name: str, value: float, llama: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    before = contents(source)
    with pytest.raises(CheckpointError, match=rf"{name} contains NaN or Inf"):
        compress(source, FREE, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()
    assert contents(source) == before


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"])
def test_a_measured_job_refuses_weights_that_are_not_finite_too(
    name: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name} contains NaN or Inf"):
        compress(source, MEASURED, tmp_path / "out", calibration=text)
    assert not (tmp_path / "out").exists()


def test_a_step_that_reaches_only_what_needs_no_data_still_says_what_a_block_is(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    """A recipe whose measured step selects the second block only leaves the first as it was."""
    recipe = Recipe((Step("blocks 1", GPTQ(bits=4, group=16)),), TEXT)
    report = compress(llama, recipe, tmp_path / "out", calibration=text)
    assert {row.block for row in report.rows} == {1}
    written, source = open_checkpoint(tmp_path / "out"), open_checkpoint(llama)
    kept = [n for n in source if n in written]
    assert all(torch.equal(written[n], source[n]) for n in kept)
    assert forward(tmp_path / "out").isfinite().all()


def test_no_thread_count_is_left_changed(llama: Path, tmp_path: Path) -> None:
    """Not that of this thread, and not that of threads which are made later."""
    import threading

    counts: list[int] = []

    def watch() -> None:
        counts.append(torch.get_num_threads())

    for _ in range(2):
        watch()
        thread = threading.Thread(target=watch)
        thread.start()
        thread.join()
        if len(counts) == 2:
            compress(llama, FREE, tmp_path / "out")
    assert len(set(counts)) == 1
    assert len(os.sched_getaffinity(0)) >= counts[0]
