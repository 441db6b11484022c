import errno
import gc
import hashlib
import io
import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import tersely.writer
from tersely.checkpoint import DTYPES, open_checkpoint, read_header
from tersely.errors import OutputError
from tersely.writer import Writer, clear_work, write_safetensors

INDEX = "model.safetensors.index.json"
JOB = {"recipe": {"steps": [{"bits": 4, "group": 128}]}, "seed": 0}


def units_of(count: int = 3, size: int = 8) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"block.{number}": {
            f"layers.{number}.weight": torch.randn((size, size), generator=generator),
            f"layers.{number}.scale": torch.randn(size, generator=generator).bfloat16(),
            f"layers.{number}.packed": torch.randint(0, 9, (3,), generator=generator).to(torch.uint8),
        }
        for number in range(count)
    }


def written(out: Path, units: dict[str, dict[str, Tensor]], shard_bytes: int = 600, **files: Any) -> Path:
    writer = Writer(out, JOB, resume=False, shard_bytes=shard_bytes)
    for unit, tensors in units.items():
        writer.put(unit, tensors, {})
    return writer.finish(list(units), {"config.json": b"{}"} | files)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def as_bytes(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1)).view(torch.uint8)


def same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(as_bytes(left), as_bytes(right))


# The file format


def saved(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> str:
    with path.open("wb") as file:
        return write_safetensors(file, tensors, metadata)


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = {name: torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(3, 0), "none": torch.empty(0)}
    tensors |= {
        "ä": torch.ones(2),
        "turned": torch.arange(6.0).view(2, 3).T,
        "spread": torch.ones(1).expand(4),
        "strided": torch.arange(9.0)[3::20],
    }
    digest = saved(tmp_path / "x.safetensors", tensors, format="pt")
    assert digest == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(same(read[name], tensor) for name, tensor in tensors.items())


@settings(deadline=None, max_examples=50)
@given(
    shapes=st.dictionaries(st.text(max_size=5), st.lists(st.integers(0, 4), max_size=3), max_size=5),
    dtype=st.sampled_from(list(DTYPES.values())),
)
def test_files_of_one_dtype_are_the_library_s_byte_for_byte(
    shapes: dict[str, list[int]], dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("format")
    tensors = {name: torch.ones(shape).to(dtype) for name, shape in shapes.items()}
    save_file(tensors, folder / "theirs", {"format": "pt"})
    saved(folder / "ours", tensors, format="pt")
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()


def test_every_tensor_is_aligned_whatever_the_order(tmp_path: Path) -> None:
    tensors = {
        "a": torch.ones(3, dtype=torch.uint8),
        "b": torch.ones(1, dtype=torch.float64),
        "c": torch.ones(1),
    }
    first = saved(tmp_path / "x", tensors)
    assert first == saved(tmp_path / "x", dict(reversed(tensors.items())))
    specs, metadata = read_header(tmp_path / "x")
    assert all(spec.offset % spec.dtype.itemsize == 0 for spec in specs.values())
    assert metadata == {}


def test_what_the_format_cannot_store_is_refused() -> None:
    for tensors in ({"a": torch.ones(1, dtype=torch.complex64)}, {"__metadata__": torch.ones(1)}):
        with pytest.raises(ValueError, match="cannot store"):
            write_safetensors(io.BytesIO(), tensors, {})


# The folder


def test_the_finished_folder_opens_with_everything_in_it(tmp_path: Path) -> None:
    units = units_of()
    (tmp_path / "tokenizer.json").write_text("{}")
    hashes: dict[str, str] = {}

    def manifest(of: Mapping[str, str]) -> bytes:
        hashes.update(of)
        return b"manifest"

    files: dict[str, Any] = {"manifest.json": manifest, "tokenizer.json": tmp_path / "tokenizer.json"}
    out = written(tmp_path / "new" / "out", units, **files)
    assert out == tmp_path / "new" / "out"
    checkpoint = open_checkpoint(out)
    every = {name: tensor for tensors in units.values() for name, tensor in tensors.items()}
    assert set(checkpoint) == set(every)
    assert all(same(checkpoint[name], tensor) for name, tensor in every.items())
    assert checkpoint.companions == ("manifest.json", "tokenizer.json")
    on_disk = {name: hashlib.sha256(data).hexdigest() for name, data in contents(out).items()}
    assert hashes == {name: digest for name, digest in on_disk.items() if name != "manifest.json"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_units_share_a_shard_up_to_the_limit_and_the_index_is_transformers_s(tmp_path: Path) -> None:
    units = units_of(4)  # 275 bytes each
    units["big"] = {"big": torch.zeros(1000)}
    units["end"] = {"end": torch.zeros(1)}
    out = written(tmp_path / "out", units)
    names = [f"model-{number:05}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    assert sorted(contents(out)) == ["config.json", *names, INDEX]
    assert set(load_file(out / names[0])) == {*units["block.0"], *units["block.1"]}
    assert set(load_file(out / names[2])) == {"big"}
    assert read_header(out / names[0])[1] == {"format": "pt"}
    text = (out / INDEX).read_text()
    index = json.loads(text)
    assert index["metadata"] == {"total_size": 4 * 275 + 4000 + 4}
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    assert text == json.dumps(index, indent=2) + "\n"


def test_one_shard_is_a_single_file_without_an_index(tmp_path: Path) -> None:
    assert sorted(contents(written(tmp_path / "out", units_of(2)))) == ["config.json", "model.safetensors"]


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        out = written(tmp_path / "out", units_of(1))
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o640}


def test_the_bytes_do_not_depend_on_the_order_of_mappings_or_on_the_name_of_out(tmp_path: Path) -> None:
    units = units_of()
    turned = {unit: dict(reversed(tensors.items())) for unit, tensors in units.items()}
    assert contents(written(tmp_path / "a", units)) == contents(written(tmp_path / "b", turned))


def test_facts_and_tensors_of_a_unit_come_back(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "out", JOB, resume=False)
    facts = {"b": [1, 2.5, None], "a": {"error": 1e-9, "name": "ä"}}
    hidden = torch.ones(2, 3).bfloat16().T
    writer.put("u", {"x": torch.arange(3), "h": hidden}, facts)
    assert writer.facts("u") == facts
    assert same(writer.tensors("u")["x"], torch.arange(3))
    assert same(writer.tensors("u")["h"], hidden)


def test_a_large_unit_becomes_a_shard_without_being_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tersely.writer._WHOLE_BYTES", 4096)
    writer = Writer(tmp_path / "out", JOB, resume=False)
    units = {"a": 8, "large": 1024, "b": 8, "c": 8}
    for unit, count in units.items():
        writer.put(unit, {unit: torch.full((count,), float(count))}, {})
    inode = (writer.work / "units" / "large.safetensors").stat().st_ino
    out = writer.finish(list(units), {})
    index = json.loads((out / INDEX).read_text())["weight_map"]
    assert index["a"].startswith("model-00001-of-00003")
    assert index["large"].startswith("model-00002-of-00003")
    assert index["b"] == index["c"] == "model-00003-of-00003.safetensors"
    assert (out / index["large"]).stat().st_ino == inode
    for unit, count in units.items():
        assert same(load_file(out / index[unit])[unit], torch.full((count,), float(count)))


def test_wrong_calls_are_refused(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "out", JOB, resume=False)
    for name in ("", "../x", "A", "a/b"):
        with pytest.raises(ValueError, match="cannot name"):
            writer.put(name, {}, {})
    writer.put("a", {"x": torch.ones(1)}, {})
    writer.put("b", {"x": torch.ones(1)}, {})
    with pytest.raises(ValueError, match="in two units: a and b"):
        writer.finish(["a", "b"], {})
    with pytest.raises(ValueError, match="not done"):
        writer.finish(["a", "c"], {})
    for name in ("model.safetensors", INDEX, "../x", "a/../b", "a/b/c", "/b", "a/", ""):
        with pytest.raises(ValueError, match="plain name"):
            writer.finish(["a"], {name: b""})
    assert not (tmp_path / "out").exists()
    writer.close()


# What is there already


@pytest.mark.parametrize("kind", ["folder", "file", "broken link"])
@pytest.mark.parametrize("resume", [False, True])
def test_an_existing_out_is_never_touched(tmp_path: Path, kind: str, resume: bool) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.touch()
    else:
        out.symlink_to("none")
    with pytest.raises(OutputError, match="never overwrites"):
        Writer(out, JOB, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_out_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "out", JOB, resume=False)
    writer.put("a", {"x": torch.ones(1)}, {})
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="never overwrites"):
        writer.finish(["a"], {})
    assert contents(tmp_path / "out") == {}
    (tmp_path / "out").rmdir()
    assert writer.finish(["a"], {}).is_dir()


def test_unfinished_work_is_continued_only_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    writer = Writer(out, JOB, resume=False)
    writer.put("a", {}, {})
    writer.close()
    with pytest.raises(OutputError, match=r"--resume, or remove"):
        Writer(out, JOB, resume=False)
    writer = Writer(out, JOB, resume=True)
    assert writer.done("a")
    writer.close()


def test_resume_without_work_starts_afresh(tmp_path: Path) -> None:
    Writer(tmp_path / "a", JOB, resume=True).close()
    work = tmp_path / "b.partial"
    work.mkdir()
    (work / "job.json").write_text('{"seed"')
    Writer(tmp_path / "b", JOB, resume=True).close()
    (work / "units" / "u.safetensors").touch()
    (work / "job.json").unlink()
    with pytest.raises(OutputError, match=r"no readable job\.json"):
        Writer(tmp_path / "b", JOB, resume=True)


def test_another_job_is_named_difference_by_difference(tmp_path: Path) -> None:
    Writer(tmp_path / "out", JOB, resume=False).close()
    other = {"recipe": {"steps": [{"bits": 3, "group": 128}, "x" * 200]}, "seed": 0, "text": None}
    with pytest.raises(OutputError) as caught:
        Writer(tmp_path / "out", other, resume=True)
    message = str(caught.value)
    assert "recipe.steps.0.bits: 4 then, 3 now; recipe.steps.1: absent then, " in message
    assert "text: absent then, null now" in message
    assert "group" not in message
    assert "seed" not in message
    assert len(message) < 600
    Writer(tmp_path / "out", JOB, resume=True).close()


def test_two_jobs_never_hold_one_work_folder(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "out", JOB, resume=False)
    with pytest.raises(OutputError, match="another running job"):
        Writer(tmp_path / "out", JOB, resume=True)
    with pytest.raises(OutputError, match="another running job"):
        clear_work(tmp_path / "out")
    assert not writer.done("u")  # still held until here
    del writer
    gc.collect()
    Writer(tmp_path / "out", JOB, resume=True).close()


def test_nothing_of_a_killed_attempt_gets_into_the_folder(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "out", JOB, resume=False)
    writer.put("u", {"x": torch.ones(9)}, {})
    writer.close()
    half = tmp_path / "out.partial" / "units" / "v.safetensors.tmp"
    half.touch()
    (tmp_path / "out.partial" / "final").mkdir()
    (tmp_path / "out.partial" / "final" / "model-00001-of-00002.safetensors").touch()
    writer = Writer(tmp_path / "out", JOB, resume=True)
    assert not half.exists()
    assert list(contents(writer.finish(["u"], {}))) == ["model.safetensors"]


def test_a_damaged_unit_is_named(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "out", JOB, resume=False)
    writer.put("u", {"x": torch.ones(9)}, {})
    os.truncate(tmp_path / "out.partial" / "units" / "u.safetensors", 50)
    with pytest.raises(OutputError, match=r"damaged: .*u\.safetensors; remove"):
        writer.tensors("u")
    writer.close()


# Disks


def test_a_full_disk_is_told_and_the_work_goes_on_later(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    writer = Writer(tmp_path / "out", JOB, resume=False)
    writer.put("a", {"x": torch.ones(9)}, {})
    (tmp_path / "out.partial" / "units" / "b.safetensors.tmp").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"b\.safetensors: the disk is full.*kept in .*out\.partial.*--resume"):
        writer.put("b", {"y": torch.ones(9)}, {})
    writer.close()
    writer = Writer(tmp_path / "out", JOB, resume=True)
    assert (writer.done("a"), writer.done("b")) == (True, False)
    writer.put("b", {"y": torch.ones(9)}, {})
    assert set(open_checkpoint(writer.finish(["a", "b"], {"config.json": b"{}"}))) == {"x", "y"}


def test_a_file_that_cannot_grow_leaves_the_units_to_finish_later(tmp_path: Path) -> None:
    units = units_of(3, size=32)
    expected = contents(written(tmp_path / "reference", units, 100_000))
    writer = Writer(tmp_path / "out", JOB, resume=False, shard_bytes=100_000)
    for unit, tensors in units.items():
        writer.put(unit, tensors, {})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(OutputError, match="larger than"):
            writer.finish(list(units), {"config.json": b"{}"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "out").exists()
    assert contents(writer.finish(list(units), {"config.json": b"{}"})) == expected


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["mkdir", "fsync", "replace", "rename"])
def test_every_failing_call_is_an_output_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(OutputError, match=r"cannot write .*out"):
            written(tmp_path / "out", units_of(1))
    assert not (tmp_path / "out").exists()
    if (tmp_path / "out.partial").exists():
        Writer(tmp_path / "out", JOB, resume=True).close()


def test_a_parent_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        Writer(tmp_path / "file" / "out", JOB, resume=False)
    (tmp_path / "b.partial").touch()
    with pytest.raises(OutputError):
        Writer(tmp_path / "b", JOB, resume=True)


# Kills. One process forks a job for every step at which it can be killed: importing torch each time is slow.

KILLS = """
import io, json, os, shutil, signal, sys, traceback
from pathlib import Path
import torch
from tersely.writer import Writer, clear_work

torch.set_num_threads(1)
root = Path(sys.argv[1])
UNITS = ["embed", "block.0", "block.1"]
CALLS = [(os, "fsync"), (os, "rename"), (os, "replace"), (os, "mkdir"), (os, "unlink"), (os, "rmdir")]
CALLS += [(os, "open"), (io, "open")]
left = -1

def step_taken():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def counted(module, name):
    real = getattr(module, name)
    def call(*args, **named):
        step_taken()
        if name == "fsync":
            return None  # a kill, unlike a power cut, needs no disk to be in step
        return Unbuffered(*args) if args[1:2] == ("wb",) else real(*args, **named)
    setattr(module, name, call)

class Unbuffered(io.FileIO):  # a kill can come between any two pieces of a file
    def __init__(self, path, *_):
        super().__init__(path, "wb")
    def write(self, data):
        step_taken()
        return super().write(data)

def job(out):
    if out.exists():
        return clear_work(out)
    writer = Writer(out, {"seed": 1}, resume=True, shard_bytes=100)
    for before, unit in zip([None, *UNITS], UNITS):
        if not writer.done(unit):
            hidden = torch.zeros(9) if before is None else writer.tensors(before)[f"{before}.w"]
            hidden = hidden * 3 + len(unit)
            tensors = {f"{unit}.w": hidden, f"{unit}.b": hidden.bfloat16()}
            writer.put(unit, tensors, {"sum": float(hidden.sum())})
    facts = {unit: writer.facts(unit) for unit in UNITS}
    files = {"config.json": b"{}", "script.py": root / "script.py"}
    files["manifest.json"] = lambda hashes: json.dumps([facts, hashes]).encode()
    writer.finish(UNITS, files)

def killed_at(step, out):
    global left
    child = os.fork()
    if child == 0:
        try:
            left = step
            for module, name in CALLS:
                counted(module, name)
            job(out)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status != 0

def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}

reference = root / "reference"
assert not killed_at(-1, reference)
expected = contents(reference)
assert len(expected) == 7, sorted(expected)
step = 0
while True:
    step += 1
    out = root / f"out{step}"
    killed = killed_at(step, out)
    assert not out.exists() or contents(out) == expected, step
    again = step * 7919 % 40 + 1
    killed_at(again, out)
    assert not out.exists() or contents(out) == expected, (step, again)
    assert not killed_at(-1, out)
    assert contents(out) == expected, step
    assert not Path(f"{out}.partial").exists(), step
    shutil.rmtree(out)
    if not killed:
        break
print(step)
"""


def test_a_job_killed_at_any_step_ends_with_the_same_bytes(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(KILLS)
    environment = os.environ | {"PYTHONPATH": str(Path(tersely.writer.__file__).parents[1])}
    ran = subprocess.run(
        [sys.executable, script, tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert int(ran.stdout) > 60  # so many places to die at
