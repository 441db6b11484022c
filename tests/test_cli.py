"""The command line: what it prints where, and how it ends."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tersely
from tersely.cli import main
from tersely.families import families
from tersely.methods import CUTS, DROPS, METHODS, REBASES, SPLITS, TRIMS, TUNES
from tersely.plan.reading import presets
from tests.tiny import tiny
from tests.tokens import write_text, write_tokenizer

VERBS = (
    *("inspect", "compress", "evaluate", "blame", "speed", "report", "runs", "tasks"),
    *("generate", "verify", "families", "methods", "recipes", "demo"),
)
GROUP = ("--set", "group=16")
TEXT = ("--set", "calibration.samples=8", "--set", "calibration.context=32")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tiny("llama", tmp_path_factory.mktemp("llama"), blocks=1))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def small(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished output."""
    out = tmp_path_factory.mktemp("small") / "out"
    assert (
        main(["compress", str(llama), str(out), "--recipe", "w4a16-gptq", "--calibration", str(text), *GROUP, *TEXT])
        == 0
    )
    return out


def contents(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def complaint(captured: Any) -> str:
    """The one line that says what was wrong."""
    assert captured.out == ""
    assert "Traceback" not in captured.err
    lines = captured.err.strip().splitlines()
    assert [line.startswith("tersely: ") for line in lines].count(True) == 1
    assert lines[-1].startswith("tersely: ")
    return str(lines[-1])


# Results


def test_inspect_reads_headers_and_gives_json(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(llama), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model_type"] == "llama"
    assert found["roles"]["attention"]["tensors"] == 4
    assert found["parameters"] == sum(role["parameters"] for role in found["roles"].values())
    assert main(["inspect", str(llama)]) == 0
    captured = capsys.readouterr()
    assert "llama" in captured.out
    assert "model.layers.0" in captured.out
    assert captured.err == ""


def test_compress_gives_its_report_as_json_and_the_expected_cost_on_standard_error(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = ["compress", str(llama), str(tmp_path / "out"), "--recipe", "w4a16-gptq", "--calibration", str(text), *GROUP]
    assert main([*job, *TEXT, "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["out"] == str(tmp_path / "out")
    assert report["recipe"]["steps"][0]["group"] == 16
    assert report["recipe"]["calibration"] == {"samples": 8, "context": 32}
    assert len(report["rows"]) == 7
    assert report["seconds"] > 0
    for word in ("memory", "disk", "time", "wrote"):
        assert word in captured.err
    written = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert {k: v for k, v in report.items() if k not in ("out", "seconds")} == written


def test_compress_prints_a_table(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a [bold] name"  # brackets are no markup
    assert main(["compress", str(llama), str(out), "--recipe", "w8a16", "--seed", "3"]) == 0
    captured = capsys.readouterr()
    for word in ("attention", "mlp", "rtn", "times smaller"):
        assert word in captured.out
    assert f"wrote {out} in" in captured.err
    assert "seed = 3" in (out / "recipe.toml").read_text("utf-8")


def test_a_dry_run_writes_nothing(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = ["compress", str(llama), str(tmp_path / "out"), "--recipe", "w4a16", *GROUP, "--dry-run"]
    assert main([*job, "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)
    assert 0 < cost["output"] < cost["disk"] < cost["disk_available"]
    assert 0 < cost["memory"] < cost["memory_available"]
    assert cost["seconds"] > 0
    assert main(job) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_resuming_a_finished_job_gives_its_report_again(
    llama: Path, text: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(small)
    job = ["compress", str(llama), str(small), "--recipe", "w4a16-gptq", "--calibration", str(text), *GROUP, *TEXT]
    assert main([*job, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == str(small)
    assert contents(small) == before


@pytest.fixture(scope="module")
def store(llama: Path, small: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with an evaluation, a blame and a speed of the finished output."""
    file = str(tmp_path_factory.mktemp("store") / "runs.sqlite")
    pair = [str(small), "--against", str(llama), "--text", str(text), "--store", file]
    assert main(["evaluate", *pair, "--writing", "1"]) == 0
    assert main(["blame", *pair, "--samples", "4"]) == 0
    grid = ["--batch", "1", "--length", "8", "--tokens", "2", "--repeats", "1"]
    assert main(["speed", str(small), str(llama), *grid, "--store", file]) == 0
    return file


def test_evaluate_compares_with_a_base(
    llama: Path, small: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = ["evaluate", str(small), "--against", str(llama), "--no-store", "--text"]
    assert main([*pair, str(text), "--json", "--writing", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"]["divergence"]["kl"]["value"] > 0
    assert found["text"]["documents"] == 16
    assert main([*pair, f"{text}[:3]"]) == 0
    captured = capsys.readouterr()
    for word in ("Verdict", "loss", "perplexity", "bits per byte", "KL divergence", "same top token", "by place"):
        assert word in captured.out


def test_what_was_measured_is_listed_shown_compared_and_exported(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    runs = ["runs", "--store", store]
    assert main([*runs, "--json"]) == 0
    assert [run["kind"] for run in json.loads(capsys.readouterr().out)] == ["speed", "speed", "blame", "evaluation"]
    assert main(runs) == 0
    assert "evaluation" in capsys.readouterr().out
    for show in ([*runs, "show", "1"], ["runs", "show", "1", "--store", store]):
        assert main(show) == 0
        assert "KL" in capsys.readouterr().out
    assert main([*runs, "compare", "3", "4"]) == 0
    assert capsys.readouterr().out
    for suffix in ("json", "csv"):
        file = tmp_path / f"all.{suffix}"
        assert main([*runs, "export", str(file)]) == 0
        assert file.stat().st_size > 1000
        assert main([*runs, "export", str(file)]) == 5
        assert main([*runs, "export", str(file), "--overwrite"]) == 0
    capsys.readouterr()
    assert main([*runs, "show", "99"]) == 2
    assert "99" in complaint(capsys.readouterr())


def test_the_report_shows_all_that_was_measured(
    small: Path, llama: Path, store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    job = ["report", str(small), str(llama), "--store", store, "--out", str(page)]
    assert main(job) == 0
    assert str(page) in capsys.readouterr().out
    html = page.read_text("utf-8")
    for word in ("What was kept", "KL divergence", "What each block costs", "tokens a second"):
        assert word.lower() in html.lower(), word
    assert main(job) == 5
    assert "--overwrite" in complaint(capsys.readouterr())
    assert main([*job, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["page"] == str(page)


def test_tasks_are_listed_with_the_place_of_their_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["tasks", "--data", str(tmp_path)]) == 0
    assert "blimp" in (listed := capsys.readouterr().out)
    assert ".jsonl" in listed or "blimp/" in listed
    assert main(["tasks", "--json"]) == 0
    assert {"blimp", "mmlu", "gsm8k"} <= {task["name"] for task in json.loads(capsys.readouterr().out)}


def test_a_budget_that_is_no_time_ends_with_code_2(llama: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("soon", "0s", "10 parsecs", "-5min"):
        assert main(["evaluate", str(llama), "--text", str(text), f"--budget={wrong}", "--no-store"]) == 2
        assert "write it as 90s, 10min or 1h30min" in complaint(capsys.readouterr())


def test_an_unknown_task_names_the_nearest(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(llama), "--tasks", "blimb", "--no-store"]) == 2
    assert "blimp" in complaint(capsys.readouterr())


def test_missing_data_of_a_task_say_where_they_belong(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(llama), "--tasks", "blimp", "--data", str(tmp_path), "--no-store"]) == 4
    assert "blimp" in (said := complaint(capsys.readouterr()))
    assert str(tmp_path) in said


def test_generate_prints_the_continuation(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = ["generate", str(small), "the cat", "--tokens", "5"]
    assert main([*job, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompt"] == "the cat"
    assert main(job) == 0
    assert capsys.readouterr().out.rstrip("\n") == found["text"]


def test_verify_says_what_it_checked(llama: Path, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(small), "--source", str(llama), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ran"], found["source_unchanged"], found["encoded"]) == (True, True, 7)
    assert main(["verify", str(small), "--no-run"]) == 0
    assert "it was not run" in " ".join(capsys.readouterr().out.split())


def test_lists_of_families_methods_and_recipes_are_complete(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families", "--json"]) == 0
    assert {row["model_type"] for row in json.loads(capsys.readouterr().out)} == set(families())
    listed = [m.name for m in (*TRIMS, *CUTS, *DROPS, *SPLITS, *REBASES, *METHODS, *TUNES)]
    assert main(["methods", "--json"]) == 0
    assert [row["method"] for row in json.loads(capsys.readouterr().out)] == listed
    assert main(["recipes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == dict(presets())
    for verb, known in (("families", families()), ("methods", listed), ("recipes", presets())):
        assert main([verb]) == 0
        shown = capsys.readouterr().out
        assert all(name in shown for name in known)


# Help


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_and_its_options(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: tersely {verb}" in shown
    options = [line for line in shown.splitlines() if line.startswith("  -")]
    assert len(options) >= 2
    assert "--json" in shown


def test_the_help_lists_verbs_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"    {verb}" in shown for verb in VERBS)
    assert "exit codes: 0 done; 2 an argument or recipe; 3 the checkpoint; 4 the text; 5 the output folder" in shown


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"tersely {tersely.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["squeeze"], ["compress"], ["inspect"], ["compress", "a", "b"]], ids=str)
def test_wrong_arguments_end_with_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: tersely" in capsys.readouterr().err


# Bad checkpoints


def config(source: Path, **change: Any) -> None:
    found = json.loads((source / "config.json").read_text("utf-8"))
    (source / "config.json").write_text(json.dumps({**found, **change}), "utf-8")


def truncated(source: Path) -> None:
    os.truncate(source / "model.safetensors", (source / "model.safetensors").stat().st_size - 100)


def no_safetensors(source: Path) -> None:
    (source / "model.safetensors").write_bytes(b"hello, this is text")


def indexed(source: Path, file: str) -> None:
    names = load_file(source / "model.safetensors").keys()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, file)}
    (source / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    (source / "model.safetensors").rename(source / "shard.safetensors")


def pickled(source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")


def with_nan(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})


def broken_config(source: Path) -> None:
    (source / "config.json").write_text("{")


def without(source: Path, name: str) -> None:
    (source / name).unlink()


def lacking(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})


BAD: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "truncated shard": (truncated, ["model.safetensors is cut off", "download it again"]),
    "no safetensors": (no_safetensors, ["not a safetensors file"]),
    "index out of its folder": (lambda s: indexed(s, "../shard.safetensors"), ["'../shard.safetensors'", "plain name"]),
    "index at a missing file": (lambda s: indexed(s, "other.safetensors"), ["other.safetensors", "download"]),
    "shape against config": (lambda s: config(s, intermediate_size=128), ["[96, 64]", "intermediate_size = 128"]),
    "fewer blocks than stored": (lambda s: config(s, num_hidden_layers=0), ["num_hidden_layers = 0"]),
    "more blocks than stored": (lambda s: config(s, num_hidden_layers=3), ["model.layers.1", "missing"]),
    "NaN": (with_nan, ["model.layers.0.mlp.up_proj.weight contains NaN or Inf"]),
    "missing tensor": (lacking, ["model.layers.0.mlp.up_proj.weight is missing"]),
    "unknown family": (lambda s: config(s, model_type="llamma"), ["'llamma'", "nearest: llama", "known: "]),
    "no family": (lambda s: config(s, model_type=None), ["no family table"]),
    "pickle": (pickled, ["pytorch_model.bin", "pickle"]),
    "remote code": (lambda s: config(s, auto_map={"AutoModel": "m.M"}), ["auto_map", "never runs it"]),
    "no config": (lambda s: without(s, "config.json"), ["no config.json"]),
    "config is no JSON": (broken_config, ["config.json", "JSON"]),
    "nothing there": (lambda s: shutil.rmtree(s), ["no folder"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_checkpoint_ends_with_one_line_and_code_3(
    name: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, words = BAD[name]
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    spoil(source)
    before = contents(tmp_path)
    assert main(["compress", str(source), str(tmp_path / "out"), "--recipe", "w4a16", *GROUP]) == 3
    line = complaint(capsys.readouterr())
    for word in words:
        assert word in line
    assert not (tmp_path / "out").exists()
    assert {k: v for k, v in contents(tmp_path).items() if ".partial/" not in k} == before


@pytest.mark.parametrize("name", [n for n in BAD if n != "NaN"])
def test_inspect_refuses_the_same_checkpoints(
    name: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    BAD[name][0](source)
    assert main(["inspect", str(source)]) == 3
    complaint(capsys.readouterr())


# Other bad input


def test_arguments_and_recipes_end_with_code_2(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        ("--recipe", "w5a16"): "no recipe named 'w5a16'",
        ("--recipe", "w4a16"): "group=128 does not divide 64; use 32 or 64, or 0",
        ("--recipe", "w4a16", "--set", "grop=16"): "did you mean group",
        ("--recipe", "w4a16", *GROUP, "--set", "where=expert"): "`expert` matches no linear weight",
        ("--recipe", "w4a16", *GROUP, "--calibration", str(text)): "no effect",
        ("--recipe", "w4a16-gptq", *GROUP): "--calibration",
        ("--recipe", "w4a16", *GROUP, "--device", "tpu"): "--device tpu",
        ("--recipe", "w4a16", *GROUP, "--device", "cuda:99"): "--device cuda",
    }
    for options, named in cases.items():
        assert main(["compress", str(llama), str(tmp_path / "out"), *options]) == 2
        assert named in complaint(capsys.readouterr())
    assert not list(tmp_path.iterdir())


def test_a_missing_device_ends_with_code_2_in_every_verb_that_has_one(
    llama: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = ["--against", str(llama), "--text", str(text), "--no-store"]
    for job in (
        ["evaluate", str(llama), *pair],
        ["blame", str(llama), *pair],
        ["speed", str(llama), "--no-store"],
        ["generate", str(llama), "the cat"],
    ):
        assert main([*job, "--device", "cuda:99"]) == 2
        assert "cuda" in complaint(capsys.readouterr())


def test_a_bad_text_ends_with_code_4(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = write_text(tmp_path / "short.txt", documents=3)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("café".encode("latin-1"))
    cases = {
        str(short): "asks for 8 samples, but there are only 3",
        str(tmp_path / "absent.txt"): "no such text file",
        str(empty): "no text",
        str(latin): "not UTF-8",
        f"{short}[7:9]": "none of the 3 documents",
    }
    before = contents(tmp_path)
    for data, named in cases.items():
        job = ["compress", str(llama), str(tmp_path / "out"), "--recipe", "w4a16-gptq", *GROUP, *TEXT]
        assert main([*job, "--calibration", data]) == 4
        assert named in complaint(capsys.readouterr())
    assert contents(tmp_path) == before


def test_an_output_that_exists_ends_with_code_5(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("out", "file", "file/below"):
        assert main(["compress", str(llama), str(tmp_path / name), "--recipe", "w4a16", *GROUP]) == 5
        assert str(tmp_path / "file" if "file" in name else tmp_path / name) in complaint(capsys.readouterr())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, ["the disk is full", "make room"]),
        (errno.EDQUOT, ["quota"]),
        (errno.EROFS, ["read-only"]),
        (errno.EIO, ["Input/output error"]),
    ],
    ids=["full", "quota", "read-only", "broken"],
)
@pytest.mark.parametrize("after", [1, 5, 12])
def test_a_disk_that_fails_ends_with_code_5_and_the_job_continues_when_it_is_mended(
    after: int,
    code: int,
    words: list[str],
    llama: Path,
    text: Path,
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own, calls = os.fsync, 0

    def failing(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= after:
            raise OSError(code, os.strerror(code))
        own(descriptor)

    job = ["compress", str(llama), str(tmp_path / "out"), "--recipe", "w4a16-gptq", "--calibration", str(text)]
    job += [*GROUP, *TEXT]
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing)
        assert main(job) == 5
    line = complaint(capsys.readouterr())
    for word in [*words, "cannot write"]:
        assert word in line
    assert not (tmp_path / "out").exists()
    if after > 1:
        assert "--resume" in line
        assert main(job) == 5  # not without --resume
    assert main([*job, "--resume"]) == 0
    assert {Path(p).name: h for p, h in contents(tmp_path / "out").items()} == {
        Path(p).name: h for p, h in contents(small).items()
    }


def test_a_folder_without_permission_ends_with_code_5(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = os.mkdir

    def refused(path: str | Path, *settings: Any) -> None:
        if Path(path).is_relative_to(tmp_path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        own(path, *settings)

    monkeypatch.setattr(os, "mkdir", refused)
    assert main(["compress", str(llama), str(tmp_path / "out"), "--recipe", "w4a16", *GROUP]) == 5
    assert "permission denied" in complaint(capsys.readouterr())


@pytest.mark.parametrize("resource", ["memory", "disk"])
def test_a_job_that_cannot_fit_ends_with_code_6(
    resource: str,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if resource == "memory":
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 20))
    else:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 10))
    for more in ([], ["--dry-run"]):
        assert main(["compress", str(llama), str(tmp_path / "out"), "--recipe", "w4a16", *GROUP, *more]) == 6
        line = complaint(capsys.readouterr())
        assert f"of {resource}" in line
        assert "are free" in line
    assert not list(tmp_path.iterdir())


def test_a_folder_that_does_not_verify_ends_with_code_7(
    llama: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(small, tmp_path / "out"))
    (out / "tokenizer.json").write_text("{}")
    assert main(["verify", str(out)]) == 7
    assert "tokenizer.json has changed" in complaint(capsys.readouterr())
    assert main(["verify", str(llama)]) == 7
    complaint(capsys.readouterr())


# Ctrl-C


def test_ctrl_c_ends_with_code_130_and_resume_continues(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_tokenizer(tiny("llama", tmp_path / "source", blocks=25))
    out = tmp_path / "out"
    # Enough work that the job is not over before the signal, however busy the machine is.
    long = tmp_path / "long.txt"
    long.write_text(text.read_text() * 200)
    much = ("--set", "calibration.samples=320", "--set", "calibration.context=128")
    job = ["compress", str(source), str(out), "--recipe", "w4a16-gptq", "--calibration", str(long), *GROUP, *much]
    # Behind this process, which must see the first block in time.
    command = ["nice", "-n", "19", sys.executable, "-m", "tersely", *job]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        units = tmp_path / "out.partial" / "units"
        limit = time.monotonic() + 60
        while running.poll() is None and not list(units.glob("block-*.safetensors")) and time.monotonic() < limit:
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        printed, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    assert printed == ""
    assert "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith("tersely: stopped; what is finished is kept")
    assert not out.exists()
    assert len(list(units.glob("block-*.safetensors"))) < 25
    assert main([*job, "--resume"]) == 0
    assert main(["verify", str(out), "--source", str(source), "--no-run"]) == 0
    capsys.readouterr()
    assert torch.get_num_threads() >= 1


def test_an_interrupt_in_another_verb_ends_with_code_130(
    llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tersely.checkpoint.open_checkpoint", interrupt)
    assert main(["inspect", str(llama)]) == 130
    assert complaint(capsys.readouterr()) == "tersely: stopped"


def test_the_module_runs_as_a_program() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tersely", "inspect", "nowhere/at/all"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 3
    assert ran.stderr.startswith("tersely: no folder nowhere/at/all")
    assert ran.stderr.count("\n") == 1
