"""A Hugging Face checkpoint on disk, read lazily: headers when it is opened, a tensor when it is asked for.

A checkpoint from the internet is untrusted data. Nothing in it is executed, every name and number in it is
checked before use, and whatever is wrong is a CheckpointError.

Shapes: R rows of a 2-D tensor, C its columns, N rows asked for, U distinct rows among them.
"""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, TypeGuard, final

import torch
from torch import Tensor

from tersely.errors import CheckpointError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
CHUNK = 8 << 20  # bytes held while a file is streamed
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


@dataclass(frozen=True)
class TensorSpec:
    """Where a tensor lies: `nbytes` bytes from byte `offset` (absolute) of `file` (a name in the folder)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    file: str
    offset: int


class _UnknownTensorError(CheckpointError, KeyError):
    """An unknown name: a KeyError too, as Mapping (`get`) expects."""

    __str__ = Exception.__str__  # KeyError's would put the message in quotes


@final
class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint folder by name, in the order of the files; `open_checkpoint` makes one.

    `config` is config.json; `weight_files` hold the tensors; `companions` are the other files that belong to
    the model (tokenizer, chat template, licence ...); `left_behind` names everything else in the folder
    (hidden files, subfolders with a trailing "/", weights in other formats).
    """

    def __init__(
        self,
        *,
        path: Path,
        source: str,
        config: dict[str, Any],
        specs: Mapping[str, TensorSpec],
        weight_files: tuple[str, ...],
        companions: tuple[str, ...],
        left_behind: tuple[str, ...],
    ) -> None:
        self.path = path
        self.source = source
        self.config = config
        self.weight_files = weight_files
        self.companions = companions
        self.left_behind = left_behind
        self._specs = specs

    def __repr__(self) -> str:
        return f"Checkpoint({self.source!r}, {len(self)} tensors, {self.nbytes} bytes)"

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def __eq__(self, other: object) -> bool:
        return self is other  # Mapping's would read and compare every tensor

    def __hash__(self) -> int:
        return id(self)

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(prod(spec.shape) for spec in self._specs.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self._specs.values())

    def spec(self, name: str) -> TensorSpec:
        """What the header says of a tensor. CheckpointError (a KeyError too) for an unknown name."""
        try:
            return self._specs[name]
        except KeyError:
            near = difflib.get_close_matches(name, self._specs, n=3) or list(self._specs)[:3]
            raise _UnknownTensorError(
                f"{self.source} has no tensor {name!r}; the nearest of its {len(self)}: {', '.join(near)}"
            ) from None

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, in fresh CPU memory. CheckpointError when the file no longer holds it."""
        spec = self.spec(name)
        return read_tensor(self.path / spec.file, spec)

    def raw(self, name: str) -> Tensor:
        """The tensor's bytes as stored: uint8, shape (nbytes,)."""
        spec = self.spec(name)
        return _read(self.path / spec.file, spec.offset, spec.nbytes)

    def slab(self, name: str, start: int, end: int) -> Tensor:
        """Rows start to end - 1 of a tensor of one dimension or more, in fresh CPU memory."""
        spec = self.spec(name)
        width = prod(spec.shape[1:]) * spec.dtype.itemsize
        data = _read(self.path / spec.file, spec.offset + start * width, (end - start) * width)
        return data.view(spec.dtype).view(end - start, *spec.shape[1:])

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The elements of a tensor, flat, in pieces of at most 8 MB: for what need not be in memory at once."""
        spec = self.spec(name)
        for chunk in stream(self.path / spec.file, spec.offset, spec.nbytes):
            yield torch.frombuffer(bytearray(chunk), dtype=spec.dtype)

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Rows `index` (int64, (N,), any order, repeats allowed) of a 2-D tensor (R, C), as (N, C).

        Reads only these, each once. CheckpointError for a tensor that is not 2-D or a row outside 0..R-1.
        """
        spec = self.spec(name)
        if len(spec.shape) != 2:
            raise CheckpointError(f"{name} has shape {list(spec.shape)}; rows can be taken of a 2-D tensor only")
        if index.dtype != torch.int64 or index.dim() != 1:
            raise ValueError(f"index must be int64 with one dimension, not {index.dtype} {list(index.shape)}")
        count, columns = spec.shape
        wanted_U, place_N = torch.unique(index.cpu(), return_inverse=True)
        rows = wanted_U.tolist()
        if rows and not 0 <= rows[0] <= rows[-1] < count:
            raise CheckpointError(f"{name} has rows 0 to {count - 1}; rows {rows[0]} to {rows[-1]} were asked for")
        width = columns * spec.dtype.itemsize
        bytes_UB = torch.empty((len(rows), width), dtype=torch.uint8)
        view = bytes_UB.view(-1).numpy().data
        path = self.path / spec.file
        runs = [0, *(i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1), len(rows)] if rows else []
        with _reading(path) as descriptor:
            for first, last in pairwise(runs):
                start = spec.offset + rows[first] * width
                _fill(descriptor, view[first * width : last * width], start, path)
        if not torch.equal(place_N, torch.arange(len(rows))):
            bytes_UB = bytes_UB[place_N]
        return bytes_UB.view(-1).view(spec.dtype).view(len(index), columns)

    def sha256(self) -> dict[str, str]:
        """SHA-256 (hex) of config.json and of each weight file."""
        names = ("config.json", *self.weight_files)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashlib lets go of the GIL
            return dict(zip(names, pool.map(lambda name: _sha256(self.path / name), names), strict=True))


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
        _refuse_foreign_link(folder, folder / name)
    return Checkpoint(
        path=folder,
        source=source,
        config=config,
        specs=specs,
        weight_files=weight_files,
        companions=tuple(companions),
        left_behind=tuple(left_behind),
    )


def _refuse_foreign_link(folder: Path, file: Path) -> None:
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
    config = _json_object(_read_text(path), path)
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
    weight_map = _json_object(_read_text(path), path).get("weight_map")
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


def read_header(path: Path) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """The tensors of a safetensors file in the order of their data, and its `__metadata__`.

    CheckpointError unless the tensors fill the data area exactly: no hole, no overlap, nothing after them.
    """
    with _reading(path) as descriptor:
        size = os.fstat(descriptor).st_size
        prefix = os.pread(descriptor, 8, 0)
        if prefix == b"version ":
            raise CheckpointError(f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull`")
        length = int.from_bytes(prefix, "little")
        if size >= 8 and not 2 <= length <= MAX_HEADER:
            raise CheckpointError(
                f"{path} is not a safetensors file: a header of {length} bytes, expected 2 to {MAX_HEADER}"
            )
        if size < 8 + length:
            raise CheckpointError(
                f"{path} is cut off in its header, {8 + length - size} bytes short; download it again"
            )
        text = bytearray(length)
        _fill(descriptor, memoryview(text), 8, path)
    if text[:1] != b"{":
        raise CheckpointError(f"{path} is not a safetensors file: its header does not start with a brace")
    header = _json_object(bytes(text), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path} has a __metadata__ that is not text -> text; download it again")
    specs = [_spec(path, name, entry, 8 + length) for name, entry in header.items()]
    specs.sort(key=lambda spec: (spec.offset, spec.nbytes))
    end = 8 + length
    for spec in specs:
        if spec.offset != end:
            fault = "overlaps the tensor before it" if spec.offset < end else "leaves a hole before it"
            raise CheckpointError(f"{path} is corrupt: {spec.name!r} {fault}; download it again")
        end += spec.nbytes
    if size < end:
        raise CheckpointError(f"{path} is cut off: {end - size} of {end} bytes are missing; download it again")
    if size > end:
        raise CheckpointError(f"{path} has {size - end} bytes after its last tensor; download it again")
    return {spec.name: spec for spec in specs}, metadata


def _spec(path: Path, name: str, entry: object, base: int) -> TensorSpec:
    fields = entry if isinstance(entry, dict) else {}
    kind, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise CheckpointError(f"{path}: {name!r} has dtype {kind!r}; tersely reads {', '.join(DTYPES)}")
    # 64 dimensions and 2^63 bytes are what torch and numpy can hold (a size of zero hides the others).
    if not _naturals(shape) or len(shape) > 64 or prod(size or 1 for size in shape) * dtype.itemsize >= 2**63:
        raise CheckpointError(f"{path}: {name!r} has shape {str(shape)[:80]}, expected non-negative sizes")
    if not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{path}: {name!r} has data_offsets {str(offsets)[:80]}, expected [begin, end]")
    nbytes = prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{path}: {name!r} has {offsets[1] - offsets[0]} bytes, expected {nbytes} for {kind} {shape}; "
            "download it again"
        )
    return TensorSpec(name, dtype, tuple(shape), nbytes, path.name, base + offsets[0])


def _naturals(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def is_plain_name(name: str) -> bool:
    """Whether `name` is the name of a file in a folder, not a path that could lead elsewhere."""
    return name not in {"", ".", ".."} and not re.search(r"[/\\\0]", name)


def read_tensor(path: Path, spec: TensorSpec) -> Tensor:
    """The tensor that `spec` places in the file at `path`, in fresh CPU memory."""
    return _read(path, spec.offset, spec.nbytes).view(spec.dtype).view(spec.shape)


def stream(path: Path, offset: int = 0, nbytes: int | None = None) -> Iterator[memoryview]:
    """`nbytes` bytes (all by default) of a file from `offset`, in chunks; each is valid until the next."""
    with _reading(path) as descriptor:
        end = os.fstat(descriptor).st_size if nbytes is None else offset + nbytes
        buffer = memoryview(bytearray(min(CHUNK, end - offset)))
        while offset < end:
            chunk = buffer[: end - offset]
            _fill(descriptor, chunk, offset, path)
            offset += len(chunk)
            yield chunk


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for chunk in stream(path):
        digest.update(chunk)
    return digest.hexdigest()


def _read(path: Path, offset: int, nbytes: int) -> Tensor:
    data = torch.empty(nbytes, dtype=torch.uint8)
    with _reading(path) as descriptor:
        _fill(descriptor, data.numpy().data, offset, path)
    return data


def _read_text(path: Path) -> bytes:
    return b"".join(bytes(chunk) for chunk in stream(path))


@contextmanager
def _reading(path: Path) -> Iterator[int]:
    """A descriptor to read from; an OSError inside is a CheckpointError."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}; check that it is there and readable"
        ) from error


def _fill(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise CheckpointError(
                f"{path} ends at byte {offset + done}, {len(view) - done} bytes short: it has changed since "
                "it was opened; restore it and start again"
            )
        done += count


def _json_object(text: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} does not hold valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object; download it again")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError for a key that occurs twice (readers differ on it) or is no text."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key occurs twice")
    "".join(value).encode()
    return value


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
