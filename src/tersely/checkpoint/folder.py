"""Open a checkpoint: a folder, or a name on the Hugging Face hub. Which of its files hold the weights."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from tersely.checkpoint.files import is_plain_name, json_object, read_text
from tersely.checkpoint.header import TensorSpec, read_header
from tersely.checkpoint.tensors import Checkpoint
from tersely.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_OTHER_WEIGHTS = _PICKLES | {".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"}
_HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(@(?P<revision>\w[\w./-]*))?", re.ASCII)
_HUB_FILES = (
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "*.md",
    "LICENSE*",
    "NOTICE*",
)
_HUB_SKIPPED = ("*/*", "consolidated*")  # subfolders, and Mistral's second copy of the weights


def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Opens a checkpoint: a local folder, or else a hub name: `name`, `org/name`, or either `@revision`.

    A hub name is looked up in the local hub cache first and downloaded when it is not whole there. Of a
    folder with both model.safetensors and an index, the single file is read, as transformers does.

    Raises CheckpointError for anything missing, corrupt, unsafe or unknown.
    """
    given = os.fspath(source)
    folder = Path(given).expanduser() if given.startswith("~") else Path(given)
    if folder.is_dir():
        return _open_folder(folder, given)
    if folder.is_file():
        raise CheckpointError(f"{given} is a file; pass the folder that holds config.json and *.safetensors")
    hub = None if given.endswith((".safetensors", "/")) else _HUB_NAME.fullmatch(given)
    if hub is None:
        raise CheckpointError(f"no folder {given}; pass the folder of a checkpoint, or a hub name such as org/name")
    return _open_hub(hub["name"], hub["revision"], given)


def _open_hub(name: str, revision: str | None, source: str) -> Checkpoint:
    from huggingface_hub import snapshot_download  # slow to import, and not needed for a folder

    def snapshot(local_files_only: bool) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                local_files_only=local_files_only,
                allow_patterns=list(_HUB_FILES),
                ignore_patterns=list(_HUB_SKIPPED),
            )
        )

    in_cache = ""
    try:
        return _open_folder(snapshot(local_files_only=True), source)
    except CheckpointError as error:  # perhaps only a part of it is there
        in_cache = f" (the copy in the hub cache cannot serve: {error})"
    except (OSError, ValueError):
        pass
    try:
        folder = snapshot(local_files_only=False)
    except Exception as error:  # the hub's and its transport's errors share no class
        reason = (str(error).strip().splitlines() or [""])[0]
        at = f" --revision {revision}" if revision else ""
        raise CheckpointError(
            f"no folder {source}, and the hub does not give it: {type(error).__name__}: {reason}{in_cache}. "
            f"Where there is a network, run `hf download {name}{at} --local-dir DIR`, then pass DIR"
        ) from error
    return _open_folder(folder, source)


def _open_folder(folder: Path, source: str) -> Checkpoint:
    config = _config(folder)
    weight_files, specs = _weights(folder)
    companions, left_behind = [], []
    for entry in sorted(folder.iterdir()):
        if entry.name in {"config.json", INDEX, *weight_files}:
            continue
        other = entry.suffix in _OTHER_WEIGHTS or entry.name.endswith(".index.json")
        if entry.name.startswith(".") or other or not entry.is_file():
            left_behind.append(entry.name + "/" * entry.is_dir())
        else:
            companions.append(entry.name)
    for name in ("config.json", *companions):
        refuse_foreign_link(folder, folder / name)
    return Checkpoint(
        path=folder,
        source=source,
        config=config,
        specs=specs,
        weight_files=weight_files,
        companions=tuple(companions),
        left_behind=tuple(left_behind),
    )


def refuse_foreign_link(folder: Path, file: Path) -> None:
    """Companions are copied to the output: a link in a cloned repository must not bring a private file there.

    Weight files may be links to anywhere (a layout people use): what is not safetensors fails to open.
    """
    home, target = folder.resolve(), file.resolve()
    roots = [home]
    if home.parent.name == "snapshots":  # the hub's cache: the files of a snapshot are links to blobs
        roots += [home.parents[1] / "blobs", home.parents[2] / "blobs"]
    if not any(target.is_relative_to(root) for root in roots):
        raise CheckpointError(f"{file} is a link to {target}, outside its folder; replace the link by a copy of it")


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json; pass the folder of a Hugging Face checkpoint")
    config = json_object(read_text(path), path)
    if "auto_map" in config:
        raise CheckpointError(
            f"{path} has auto_map: the model asks to run remote code, and tersely never runs it; if "
            f"transformers itself knows model_type {config.get('model_type')!r}, delete auto_map from it"
        )
    return config


def _weights(folder: Path) -> tuple[tuple[str, ...], dict[str, TensorSpec]]:
    """The weight files and the place of every tensor."""
    if (folder / SINGLE).is_file():
        return (SINGLE,), read_header(folder / SINGLE)[0]
    if not (folder / INDEX).is_file():
        raise CheckpointError(_no_weights(folder))
    weight_map = _weight_map(folder / INDEX)
    files = tuple(sorted(set(weight_map.values())))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(files)} weight files named in {INDEX}: {_some(missing)}; "
            "download them"
        )
    specs: dict[str, TensorSpec] = {}
    for file in files:
        held = read_header(folder / file)[0]
        absent = [name for name, where in weight_map.items() if where == file and name not in held]
        if absent:
            raise CheckpointError(
                f"{file} lacks {len(absent)} tensors that {INDEX} places there: {_some(absent)}; download both again"
            )
        extra = [name for name in held if weight_map.get(name) != file]
        if extra:
            raise CheckpointError(
                f"{file} holds {len(extra)} tensors that {INDEX} does not place there: {_some(extra)}; "
                "download both again"
            )
        specs |= held
    return files, specs


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = json_object(read_text(path), path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map (tensor name -> file name); download it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not is_plain_name(file) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} places tensor {name!r} in {file!r}; expected the plain name of a *.safetensors file "
                "in the same folder. Do not trust this checkpoint"
            )
    return weight_map


def _no_weights(folder: Path) -> str:
    found = sorted(entry.name for entry in folder.iterdir() if entry.suffix in _OTHER_WEIGHTS)
    if any(Path(name).suffix == ".safetensors" for name in found):
        return f"{folder} has {_some(found)} but neither {SINGLE} nor {INDEX}; download the missing one"
    if any(Path(name).suffix in _PICKLES for name in found):
        return (
            f"{folder} has only pickled weights ({_some(found)}), and reading a pickle can run code; convert "
            'them where you trust them: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('NEW')\", then pass NEW"
        )
    return f"{folder} has no weights that tersely reads; expected {SINGLE}, or shards and {INDEX}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
