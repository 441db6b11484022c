"""Which model was measured: fingerprints that follow the content, parameters that follow the meaning."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Mapping
from datetime import datetime
from math import prod
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tersely import __version__
from tersely.checkpoint import read_header
from tersely.compression import compress
from tersely.errors import CheckpointError, UsageError
from tersely.evaluation.subject import setting, subject
from tersely.plan.reading import load_recipe

PAGE = 4096
BIG = (512, 1024)  # of float32, 2 MiB: more than the pages that are sampled


def checkpoint(folder: Path, tensors: Mapping[str, Tensor] | None = None, **config: object) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    default = {
        "a.weight": torch.randn(BIG, generator=generator),
        "b.weight": torch.randn((64, 64), generator=generator),
        "c.bias": torch.zeros(64),
    }
    save_file(dict(default if tensors is None else tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (folder / "generation_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def fingerprint(path: Path) -> str:
    return subject(path, dtype="float32").fingerprint


def flip(file: Path, place: int) -> None:
    """Change one byte, and nothing else: not the size, not the time."""
    stat = file.stat()
    with file.open("r+b") as opened:
        opened.seek(place)
        byte = opened.read(1)[0]
        opened.seek(place)
        opened.write(bytes([byte ^ 1]))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_copy_elsewhere_under_another_name_and_time_is_the_same_model(tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "first")
    before = fingerprint(first)
    assert len(bytes.fromhex(before)) == 32
    assert fingerprint(first) == before
    copy = shutil.copytree(first, tmp_path / "elsewhere")
    assert fingerprint(copy) == before
    for file in copy.iterdir():
        os.utime(file, (0, 0))
    assert fingerprint(copy) == before
    assert fingerprint(first.rename(tmp_path / "renamed")) == before


def test_a_link_to_a_model_is_that_model(tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "first")
    (tmp_path / "link").symlink_to(first)
    assert fingerprint(tmp_path / "link") == fingerprint(first)


def test_a_changed_weight_is_another_model(tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "first")
    file = first / "model.safetensors"
    before = fingerprint(first)
    room = file.stat().st_size - PAGE
    places = [read_header(file)[0][name].offset + 5 for name in ("a.weight", "b.weight", "c.bias")]
    places += [round(number * room / 63) + offset for number in (1, 31, 62, 63) for offset in (0, PAGE - 1)]
    for place in places:
        flip(file, place)
        assert fingerprint(first) != before, place
        flip(file, place)
    assert fingerprint(first) == before


def test_a_small_file_is_read_whole(tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "first", {"w": torch.zeros(60 * PAGE // 4)})
    before = fingerprint(first)
    for place in range(200, 60 * PAGE, 7001):
        flip(first / "model.safetensors", place)
        assert fingerprint(first) != before, place
        flip(first / "model.safetensors", place)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_changed_config_or_tokenizer_is_another_model(name: str, tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "first")
    before = fingerprint(first)
    (first / name).write_text((first / name).read_text()[:-1] + ', "x": 1}')
    assert fingerprint(first) != before


def test_files_that_do_not_make_the_model_do_not_count(tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "first")
    before = fingerprint(first)
    for name in ("README.md", "report.html", "report.json", "manifest.json", "recipe.toml", "training_args.bin"):
        (first / name).write_text("{}")
    assert fingerprint(first) == before


def test_bytes_are_those_of_the_weight_files(tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "first")
    found = subject(str(first), dtype="bfloat16")
    assert found.bytes == (first / "model.safetensors").stat().st_size
    assert found.name == str(first)
    assert found.dtype == "bfloat16"
    assert found.parameters == prod(BIG) + 64 * 64 + 64
    assert subject(first, dtype="bfloat16", parameters=7).parameters == 7


def test_what_is_no_file_has_no_fingerprint(tmp_path: Path) -> None:
    found = subject("org/name", dtype="bfloat16", parameters=12)
    assert (found.name, found.fingerprint, found.parameters, found.bytes) == ("org/name", "", 12, 0)
    assert fingerprint(tmp_path / "missing") == ""


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "first")
    file = first / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cut off"):
        subject(first, dtype="float32")


@pytest.mark.parametrize("recipe", ["w4a16", "w8a16", "w3a16"])
def test_packed_weights_count_as_the_weights_that_they_stand_for(recipe: str, tmp_path: Path, assets: Path) -> None:
    source = assets / "models" / "stories-3m"
    compress(source, load_recipe(recipe, ["group=64"] if recipe != "w8a16" else []), tmp_path / "small")
    small, whole = (subject(path, dtype="float32") for path in (tmp_path / "small", source))
    said = json.loads((tmp_path / "small" / "report.json").read_text())["parameters"]
    assert small.parameters == whole.parameters == said
    assert small.bytes < whole.bytes
    assert small.fingerprint != whole.fingerprint


@pytest.mark.parametrize(
    ("stored", "weights"),
    [
        ({"l.qweight": torch.zeros(8, 64, dtype=torch.int32), "l.qzeros": torch.zeros(1, 8, dtype=torch.int32)}, 4096),
        ({"l.weight": torch.zeros(2048, 1, dtype=torch.uint8), "l.weight.absmax": torch.zeros(64)}, 4096),
        ({"l_blocks": torch.zeros(64, 2, 16, dtype=torch.uint8), "l_scales": torch.zeros(64, 2)}, 4096),
        ({"l.weight_packed": torch.zeros(64, 32, dtype=torch.uint8), "l.weight_scale": torch.zeros(64, 4)}, 4096),
        ({"l.weight": torch.zeros(64, 64, dtype=torch.float8_e4m3fn), "l.weight_scale": torch.zeros(64)}, 4096),
    ],
    ids=["gptq", "bitsandbytes", "mxfp4", "nvfp4", "fp8"],
)
def test_codes_of_other_libraries_count_as_weights(stored: dict[str, Tensor], weights: int, tmp_path: Path) -> None:
    tensors = {**stored, "norm.weight": torch.ones(64)}
    first = checkpoint(tmp_path / "first", tensors, quantization_config={"bits": 4})
    assert subject(first, dtype="float32").parameters == weights + 64


def test_a_shape_that_its_codes_cannot_hold_is_refused(tmp_path: Path) -> None:
    stored = {"l.weight_packed": torch.zeros(4, 4, dtype=torch.int32), "l.weight_shape": torch.tensor([10**6, 10**6])}
    first = checkpoint(tmp_path / "first", stored, quantization_config={})
    assert subject(first, dtype="float32").parameters == 4 * 4 + 2  # nothing says that these are codes
    (first / "config.json").write_text('{"quantization_config": {"quant_method": "compressed-tensors"}}')
    with pytest.raises(CheckpointError, match="weight_packed has 64 bytes, and its shape"):
        subject(first, dtype="float32")


def gguf(file: Path, shapes: Mapping[str, tuple[int, ...]], *, words: int = 3) -> Path:
    """A GGUF file of float32 tensors, by the format's description."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    fields = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("llama.block_count") + struct.pack("<II", 4, 2),
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, words) + b"".join(map(text, "abc"[:words])),
        text("tokenizer.ggml.scores") + struct.pack("<IIQ", 9, 6, words) + struct.pack(f"<{words}f", *range(words)),
        text("flag") + struct.pack("<I?", 7, True),
    ]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(fields)) + b"".join(fields)
    offset = 0
    for name, shape in shapes.items():
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset)
        offset += 4 * prod(shape)
    file.write_bytes(head + bytes(-len(head) % 32) + bytes(offset))
    return file


def test_a_gguf_file_is_a_model_whatever_its_name(tmp_path: Path) -> None:
    first = gguf(tmp_path / "a.gguf", {"x": (64, 32), "y": (64,)})
    found = subject(first, dtype="F32")
    assert found.parameters == 64 * 32 + 64
    assert found.bytes == first.stat().st_size
    (tmp_path / "b").mkdir()
    assert fingerprint(Path(shutil.copy(first, tmp_path / "b" / "other.gguf"))) == found.fingerprint
    flip(first, first.stat().st_size - 1)
    assert fingerprint(first) != found.fingerprint


def test_the_parts_of_a_split_gguf_count_together(tmp_path: Path) -> None:
    parts = [gguf(tmp_path / f"m-0000{n}-of-00002.gguf", {f"x{n}": (64, 8 * n)}) for n in (1, 2)]
    found = subject(parts[0], dtype="F32")
    assert found.parameters == 64 * 8 * 3
    assert found.bytes == sum(part.stat().st_size for part in parts)
    flip(parts[1], parts[1].stat().st_size - 1)
    assert fingerprint(parts[0]) != found.fingerprint
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00002\.gguf is not beside it"):
        subject(parts[0], dtype="F32")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GGML",
        b"GGUF" + struct.pack("<I", 9),
        b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**63),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"k", 77),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 8, 2**62),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"k", 9) + struct.pack("<IQ", 9, 2) * 20,
    ],
)
def test_a_file_that_is_no_gguf_is_refused(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"a\.gguf cannot be read as a GGUF file"):
        subject(file, dtype="F32")


def test_a_single_safetensors_file_is_a_model(tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "first") / "model.safetensors"
    found = subject(first, dtype="float32")
    assert found.parameters == sum(value.numel() for value in load_file(first).values())
    assert found.fingerprint != fingerprint(first.parent)


def test_the_setting_says_where_and_with_what() -> None:
    found = setting("cpu", packages=["rich", "no-such-package-here"])
    assert found.device == "cpu"
    assert found.hardware
    assert found.threads == torch.get_num_threads()
    assert found.memory == psutil.virtual_memory().total
    assert found.versions["tersely"] == __version__
    assert found.versions["torch"] == torch.__version__
    assert {"python", "transformers", "rich"} < found.versions.keys()
    assert "no-such-package-here" not in found.versions
    created = datetime.fromisoformat(found.created)
    assert created.tzinfo is not None
    assert created.microsecond == 0
    with pytest.raises(UsageError, match="expected cpu, cuda"):
        setting("tpu")
