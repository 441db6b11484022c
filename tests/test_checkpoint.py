import hashlib
import json
import os
import pickle
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from tersely.checkpoint import DTYPES, Checkpoint, open_checkpoint, read_header
from tersely.errors import CheckpointError

INDEX = "model.safetensors.index.json"
CONFIG = {"model_type": "llama", "hidden_size": 4}


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"all.{name}": torch.randint(0, 2, (3, 5), generator=generator).to(dtype) for name, dtype in DTYPES.items()
    }
    tensors["empty"] = torch.empty((0, 4), dtype=torch.float16)
    tensors["scalar"] = torch.tensor(2.5)
    tensors["matrix"] = torch.randn((17, 6), generator=generator)
    tensors["odd"] = torch.arange(7, dtype=torch.uint8)
    return tensors


def folder_of(path: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(some_tensors() if tensors is None else tensors, path / "model.safetensors", {"format": "pt"})
    return path


def sharded(path: Path, **index: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, path / "one.safetensors")
    save_file({"c": torch.arange(4)}, path / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map | index}))
    return path


def file_of(path: Path, header: Any, data: bytes = b"") -> Path:
    """A safetensors file with this header (an object, or the text itself)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def same(left: Tensor, right: Tensor) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
    )


def entry(*offsets: int, dtype: str = "F32", shape: tuple[Any, ...] = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# What a checkpoint gives


def test_every_dtype_the_library_writes_is_read_back_equal(tmp_path: Path) -> None:
    tensors = some_tensors()
    checkpoint = open_checkpoint(folder_of(tmp_path / "model"))
    assert set(checkpoint) == set(tensors)
    assert all(same(checkpoint[name], tensor) for name, tensor in tensors.items())
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert checkpoint.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert checkpoint.config == CONFIG
    assert checkpoint.source == str(tmp_path / "model")
    assert checkpoint.weight_files == ("model.safetensors",)


def test_a_spec_says_where_the_bytes_lie(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder_of(tmp_path))
    spec = checkpoint.spec("matrix")
    assert (spec.dtype, spec.shape, spec.nbytes) == (torch.float32, (17, 6), 17 * 6 * 4)
    stored = (tmp_path / spec.file).read_bytes()[spec.offset : spec.offset + spec.nbytes]
    assert bytes(checkpoint.raw("matrix").numpy()) == stored == some_tensors()["matrix"].numpy().tobytes()


def test_shards_are_one_mapping(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path))
    assert list(checkpoint) == ["a", "b", "c"]
    assert checkpoint.weight_files == ("one.safetensors", "two.safetensors")
    assert torch.equal(checkpoint["c"], torch.arange(4))


def test_a_tensor_is_fresh_memory(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder_of(tmp_path))
    checkpoint["matrix"].zero_()
    assert same(checkpoint["matrix"], some_tensors()["matrix"])


@settings(deadline=None, max_examples=60)
@given(index=st.lists(st.integers(0, 16), max_size=30), name=st.sampled_from(["matrix", "half", "eight"]))
def test_rows_equal_indexing(
    index: list[int], name: str, tmp_path_factory: pytest.TempPathFactory, shared: dict[str, Checkpoint]
) -> None:
    if not shared:
        matrix = some_tensors()["matrix"]
        tensors = {"matrix": matrix, "half": matrix.bfloat16(), "eight": matrix.to(torch.float8_e4m3fn)}
        shared["it"] = open_checkpoint(folder_of(tmp_path_factory.mktemp("rows"), tensors))
    rows = shared["it"].rows(name, torch.tensor(index, dtype=torch.int64))
    whole = shared["it"][name]
    expected = whole.view(torch.uint8)[index] if index else whole.view(torch.uint8)[:0]
    assert rows.dtype == whole.dtype
    assert rows.shape == (len(index), 6)
    assert torch.equal(rows.view(torch.uint8), expected)


@pytest.fixture(scope="module")
def shared() -> dict[str, Checkpoint]:
    return {}


def test_rows_refuses_what_it_cannot_gather(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder_of(tmp_path))
    for index in ([17], [-1], [3, 40]):
        with pytest.raises(CheckpointError, match="rows 0 to 16"):
            checkpoint.rows("matrix", torch.tensor(index))
    with pytest.raises(CheckpointError, match="2-D tensor only"):
        checkpoint.rows("odd", torch.tensor([0]))
    with pytest.raises(ValueError, match="int64"):
        checkpoint.rows("matrix", torch.tensor([0], dtype=torch.int32))


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder_of(tmp_path))
    with pytest.raises(CheckpointError, match=r"no tensor 'matrixx'.*matrix"):
        checkpoint["matrixx"]
    assert "matrixx" not in checkpoint
    assert checkpoint.get("matrixx") is None


def test_hashes_are_those_of_the_files(tmp_path: Path) -> None:
    hashes = open_checkpoint(sharded(tmp_path)).sha256()
    assert hashes == {
        name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        for name in ("config.json", "one.safetensors", "two.safetensors")
    }


def test_every_entry_of_the_folder_is_accounted_for(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    carried = [
        "LICENSE",
        "README.md",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "vocab.txt",
    ]
    left = [
        ".gitattributes",
        "consolidated.safetensors",
        "model.gguf",
        "pytorch_model.bin",
        "x.bin.index.json",
    ]
    for name in carried + left:
        (folder / name).write_text("{}")
    (folder / "original").mkdir()
    os.mkfifo(folder / "pipe")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.companions == tuple(carried)
    assert checkpoint.left_behind == tuple(sorted([*left, "original/", "pipe"]))


# Laziness


def resident(key: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_opening_reads_headers_only_and_a_tensor_costs_its_own_size(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    big, small = 10 << 30, 64 << 20
    header = {
        "big": entry(0, big, dtype="U8", shape=(big,)),
        "small": entry(big, big + small, dtype="U8", shape=(8192, small // 8192)),
    }
    path = file_of(folder / "model.safetensors", header)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + big + small)
    begin = time.perf_counter()
    checkpoint = open_checkpoint(folder)
    assert time.perf_counter() - begin < 1
    assert checkpoint.nbytes == big + small
    checkpoint.rows("small", torch.tensor([0]))  # whatever a first call costs once
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    tensor = checkpoint["small"]
    assert resident("VmHWM") - before < small + (8 << 20)
    assert tensor.shape == (8192, 8192)
    del tensor
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    checkpoint.rows("small", torch.tensor([8191, 4, 5]))
    assert resident("VmHWM") - before < 8 << 20


def test_a_file_that_shrinks_after_opening_is_an_error(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder_of(tmp_path, {"a": torch.ones(8, 8)}))
    os.truncate(tmp_path / "model.safetensors", 200)
    with pytest.raises(CheckpointError, match="bytes short"):
        checkpoint["a"]
    with pytest.raises(CheckpointError, match="bytes short"):
        checkpoint.rows("a", torch.tensor([7]))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint["a"]


# What is refused


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1, "a": 2}', "\xff", '{"\\ud800": 1}', "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (folder_of(tmp_path) / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json.*JSON"):
        open_checkpoint(tmp_path)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    (folder_of(tmp_path) / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(tmp_path)


def test_remote_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="never runs"):
        open_checkpoint(folder_of(tmp_path, auto_map={"AutoModel": "evil.Model"}))


def test_pickles_are_never_read(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "ran"),))

    (folder_of(tmp_path) / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"pickle.*save_pretrained"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00001-of-00001\.safetensors but neither"):
        open_checkpoint(folder)
    (folder / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_without_a_weight_map_is_refused(tmp_path: Path, text: str) -> None:
    (sharded(tmp_path) / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../model/one.safetensors",
        "/etc/x.safetensors",
        "..",
        "a/b.safetensors",
        "a\\b.safetensors",
        "",
        "x.bin",
        3,
        None,
    ],
)
def test_an_index_cannot_point_out_of_its_folder(tmp_path: Path, name: object) -> None:
    with pytest.raises(CheckpointError, match="plain name"):
        open_checkpoint(sharded(tmp_path / "model", a=name))


def test_an_index_and_its_shards_must_agree(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks 1 of 3 weight files.*three\.safetensors"):
        open_checkpoint(sharded(tmp_path, d="three.safetensors"))
    with pytest.raises(CheckpointError, match=r"two\.safetensors lacks 1 tensors.*: d"):
        open_checkpoint(sharded(tmp_path, d="two.safetensors"))
    weight_map = {"a": "one.safetensors", "c": "two.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"one\.safetensors holds 1 tensors.*: b"):
        open_checkpoint(tmp_path)


def test_the_single_file_wins_over_an_index_as_in_transformers(tmp_path: Path) -> None:
    folder = folder_of(sharded(tmp_path), {"only": torch.ones(1)})
    checkpoint = open_checkpoint(folder)
    assert list(checkpoint) == ["only"]
    assert checkpoint.left_behind == ("one.safetensors", "two.safetensors")


BAD_HEADERS: dict[str, tuple[Any, bytes]] = {
    "no JSON": (b"{nonsense", b""),
    "no object": (b"[]", b""),
    "leading space": (b' {"a": 1}', b""),
    "duplicate key": (b'{"__metadata__": {}, "__metadata__": {}}', b""),
    "metadata that is no text": ({"__metadata__": {"a": 1}}, b""),
    "metadata that is a list": ({"__metadata__": []}, b""),
    "an entry that is no object": ({"a": 3}, b""),
    "an unknown dtype": ({"a": entry(0, 8, dtype="F31")}, bytes(8)),
    "a dtype that is a list": ({"a": entry(0, 8) | {"dtype": []}}, bytes(8)),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "a negative size": ({"a": entry(0, 8, shape=(-1, -2))}, bytes(8)),
    "a size that is a bool": ({"a": entry(0, 4, shape=(True,))}, bytes(4)),
    "a size that is a float": ({"a": entry(0, 8, shape=(2.0,))}, bytes(8)),
    "huge sizes beside a zero": ({"a": entry(0, 0, shape=(0, 2**62, 2**62))}, b""),
    "a thousand dimensions": ({"a": entry(0, 4, shape=(1,) * 1000)}, bytes(4)),
    "one offset": ({"a": entry(0)}, bytes(8)),
    "negative offsets": ({"a": entry(-8, 0)}, bytes(8)),
    "reversed offsets": ({"a": entry(8, 0)}, bytes(8)),
    "a size that is not the shape's": ({"a": entry(0, 12)}, bytes(12)),
    "an overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "two tensors in one place": ({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)),
    "a hole": ({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),
    "a hole at the front": ({"a": entry(4, 12)}, bytes(12)),
    "missing data": ({"a": entry(0, 8)}, bytes(5)),
    "trailing bytes": ({"a": entry(0, 8)}, bytes(9)),
}


@pytest.mark.parametrize("fault", BAD_HEADERS)
def test_a_corrupt_header_is_refused(tmp_path: Path, fault: str) -> None:
    header, data = BAD_HEADERS[fault]
    with pytest.raises(CheckpointError):
        read_header(file_of(tmp_path / "x.safetensors", header, data))


def test_a_cut_off_file_says_how_much_is_missing(tmp_path: Path) -> None:
    path = file_of(tmp_path / "x.safetensors", {"a": entry(0, 8)}, bytes(8))
    size = path.stat().st_size
    os.truncate(path, size - 3)
    with pytest.raises(CheckpointError, match=f"3 of {size} bytes are missing; download it again"):
        read_header(path)
    os.truncate(path, 20)
    with pytest.raises(CheckpointError, match="cut off in its header"):
        read_header(path)
    for few in (7, 0):
        os.truncate(path, few)
        with pytest.raises(CheckpointError):
            read_header(path)


def test_a_header_of_absurd_length_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((100_000_001).to_bytes(8, "little") + b"{}")
    with path.open("r+b") as file:
        file.truncate(200_000_000)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_header(path)


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_header(path)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("fuzz"))


@settings(deadline=None, max_examples=400)
@given(data=st.data())
def test_random_damage_is_a_checkpoint_error_and_never_another(data: st.DataObject, fuzzed: Path) -> None:
    path = fuzzed / "model.safetensors"
    whole = path.read_bytes()
    area = 8 + int.from_bytes(whole[:8], "little") + 8
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, area - 1))
        damaged[place] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'0123456789"[]{},:-')))
    del damaged[data.draw(st.one_of(st.just(len(whole)), st.integers(0, area))) :]
    path.write_bytes(damaged)
    try:
        checkpoint = open_checkpoint(fuzzed)
        for name in checkpoint:
            assert checkpoint[name].nbytes == checkpoint.spec(name).nbytes
    except CheckpointError:
        pass
    finally:
        path.write_bytes(whole)


# Links


def test_weights_may_be_links_but_a_companion_cannot_bring_a_foreign_file(tmp_path: Path) -> None:
    store, folder = folder_of(tmp_path / "store"), folder_of(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(store / "model.safetensors")
    (folder / "NOTICE").write_text("here")
    (folder / "LICENSE").symlink_to("NOTICE")
    assert same(open_checkpoint(folder)["matrix"], some_tensors()["matrix"])
    (tmp_path / "secret").write_text("{}")
    (folder / "README.md").symlink_to("../secret")
    with pytest.raises(CheckpointError, match=r"README\.md is a link to .*secret"):
        open_checkpoint(folder)


def test_a_snapshot_of_the_hub_cache_may_link_to_its_blobs(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    snapshot = folder_of(repo / "snapshots" / "abc")
    (repo / "blobs").mkdir()
    (snapshot / "config.json").rename(repo / "blobs" / "123")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    assert open_checkpoint(snapshot).config == CONFIG


# Names


@pytest.mark.parametrize(
    "name",
    [
        "./none",
        "../none",
        "/none/at/all",
        "~/none",
        "a/b/c",
        "none.safetensors",
        "org/name/",
        "a b",
        "",
        "a\0b",
    ],
)
def test_a_path_that_is_not_there_never_asks_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match=r"no folder|no config\.json"):
        open_checkpoint(name)


def test_a_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="pass the folder"):
        open_checkpoint(folder_of(tmp_path) / "model.safetensors")


def test_a_hub_name_offline_says_what_to_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline mode is enabled")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match="hf download org/name --revision v1 --local-dir DIR"):
        open_checkpoint("org/name@v1")


def test_a_hub_name_is_first_looked_up_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = folder_of(tmp_path), []

    def snapshot(name: str, *, revision: str | None, local_files_only: bool, **_: object) -> str:
        asked.append((name, revision, local_files_only))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert open_checkpoint("org/name").source == "org/name"
    assert asked == [("org/name", None, True)]
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        open_checkpoint("gpt2@main")
    assert asked[1:] == [("gpt2", "main", True), ("gpt2", "main", False)]


def test_a_broken_copy_in_the_cache_is_named_when_the_hub_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path, auto_map={})

    def snapshot(*_: object, local_files_only: bool, **__: object) -> str:
        if local_files_only:
            return str(folder)
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(CheckpointError, match="never runs it"):
        open_checkpoint("org/name")
