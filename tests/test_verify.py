"""verify finds what is not as it was written, and says what it checked."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tersely.compression import compress
from tersely.errors import VerificationError
from tersely.methods.encode.rtn import RTN
from tersely.plan.recipe import Recipe, Step
from tersely.verify import verify
from tests.tiny import tiny
from tests.tokens import write_tokenizer

RECIPE = Recipe((Step("linear", RTN(bits=4, group=16)),))
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "recipe.toml",
    "report.html",
    "report.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tiny("llama", tmp_path_factory.mktemp("source"), blocks=1))


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    compress(source, RECIPE, out)
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished folder, to be spoilt."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def edit(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest."""
    manifest = json.loads((out / "manifest.json").read_text("utf-8"))
    change(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest), "utf-8")


def rewrite(out: Path, name: str, content: bytes) -> None:
    """Change a file and its hash in the manifest: what no hash can find."""
    (out / name).write_bytes(content)
    edit(out, lambda manifest: manifest["files"].update({name: hashlib.sha256(content).hexdigest()}))


def test_a_finished_folder_is_whole_accounts_for_its_source_and_runs(finished: Path, source: Path) -> None:
    found = verify(finished, source=source)
    assert found.ran
    assert found.source_unchanged
    assert (found.files, found.source_tensors, found.encoded) == (len(FILES), 12, 7)
    assert found.stored_tensors == 12 - 7 + 3 * 7
    assert json.loads(found.to_json())["folder"] == str(finished)
    quick = verify(finished, run=False)
    assert not quick.ran
    assert quick.source_unchanged is None


def test_a_dense_output_counts_what_was_compressed_too(source: Path, tmp_path: Path) -> None:
    compress(source, RECIPE, tmp_path / "dense", format="dense")
    found = verify(tmp_path / "dense")
    assert (found.source_tensors, found.encoded, found.stored_tensors) == (12, 7, 12)


@pytest.mark.parametrize("where", [0, 0.5, 1], ids=["first", "middle", "last"])
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_any_file_is_found(name: str, where: float, out: Path) -> None:
    content = bytearray((out / name).read_bytes())
    content[round(where * (len(content) - 1))] ^= 1
    (out / name).write_bytes(content)
    with pytest.raises(VerificationError, match=rf"{name} has changed"):
        verify(out, run=False)


def test_the_list_of_files_above_is_that_of_the_folder(finished: Path) -> None:
    assert {p.name for p in finished.iterdir()} == {*FILES, "manifest.json"}


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_missing_file_is_found(name: str, out: Path) -> None:
    (out / name).unlink()
    with pytest.raises(VerificationError, match=name):
        verify(out, run=False)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b'{"files": 3}', b"\xff"])
def test_a_damaged_manifest_is_found(content: bytes, out: Path) -> None:
    (out / "manifest.json").write_bytes(content)
    with pytest.raises(VerificationError, match=r"manifest\.json is damaged"):
        verify(out, run=False)


@pytest.mark.parametrize("name", ["config.json", "report.json", "model.safetensors"])
def test_a_manifest_that_leaves_out_a_file_that_counts_is_found(name: str, out: Path) -> None:
    edit(out, lambda manifest: manifest["files"].pop(name))
    with pytest.raises(VerificationError, match=rf"no hash of {name}"):
        verify(out, run=False)


def test_a_tensor_that_comes_from_nowhere_is_found(out: Path) -> None:
    tensors = load_file(out / "model.safetensors")
    save_file({**tensors, "extra": torch.zeros(2)}, out / "extra", {"format": "pt"})
    rewrite(out, "model.safetensors", (out / "extra").read_bytes())
    with pytest.raises(VerificationError, match="extra comes from no tensor of the source"):
        verify(out, run=False)


def test_a_tensor_that_is_gone_is_found_with_the_one_that_it_held(out: Path) -> None:
    tensors = load_file(out / "model.safetensors")
    gone = "model.layers.0.mlp.up_proj.weight_scale"
    save_file({n: t for n, t in tensors.items() if n != gone}, out / "less", {"format": "pt"})
    rewrite(out, "model.safetensors", (out / "less").read_bytes())
    with pytest.raises(VerificationError, match=rf"{gone}, which holds model.layers.0.mlp.up_proj.weight of the"):
        verify(out, run=False)


def test_a_tensor_that_two_of_the_source_claim_is_found(out: Path) -> None:
    edit(out, lambda m: m["tensors"].update({"another": m["tensors"]["model.norm.weight"]}))
    with pytest.raises(VerificationError, match=r"both another and model\.norm\.weight"):
        verify(out, run=False)


def test_a_folder_that_is_whole_but_does_not_load_is_found(out: Path) -> None:
    config = json.loads((out / "config.json").read_text("utf-8"))
    rewrite(out, "config.json", json.dumps({**config, "intermediate_size": 64}).encode())
    with pytest.raises(VerificationError, match="files are whole, but"):
        verify(out)


def test_a_folder_that_gives_no_finite_logits_is_found(out: Path) -> None:
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    rewrite(out, "model.safetensors", (out / "model.safetensors").read_bytes())
    with pytest.raises(VerificationError, match="not finite"):
        verify(out)


def test_a_source_that_has_changed_is_found(finished: Path, source: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(source, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    save_file({n: t + 1 for n, t in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match=r"model\.safetensors is not the file that was compressed"):
        verify(finished, source=other, run=False)


def test_a_folder_that_tersely_did_not_write_is_refused(source: Path) -> None:
    with pytest.raises(VerificationError, match="verify takes a folder that `tersely compress` wrote"):
        verify(source)
