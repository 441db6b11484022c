"""A checkpoint folder written in steps: each survives a kill, and the folder appears only when it is whole.

The work lies in `<out>.partial`: job.json (what is being made), units/ (finished steps, each a safetensors file
and the facts about it), final/ (the folder being put together), lock. What ends up in `out` depends on the units,
their order and the files alone, never on time or on interruptions.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, final

import torch
from torch import Tensor

from tersely.checkpoint import (
    CHUNK,
    DTYPES,
    INDEX,
    MAX_HEADER,
    SINGLE,
    TensorSpec,
    is_plain_name,
    read_header,
    read_tensor,
    stream,
)
from tersely.errors import CheckpointError, OutputError

FileContent = bytes | Path | Callable[[Mapping[str, str]], bytes]
"""Bytes, a file to copy, or a function of the SHA-256 (hex) by name of all files written before it."""

_LARGE = 1 << 20
"""Bytes from which on a chunk is worth a thread."""
_FLUSH = 64 << 20
"""Bytes that are sent to the disk together."""
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNIT_NAME = re.compile(r"[a-z0-9._-]+")
_ABSENT = object()
_WHOLE_BYTES = 128_000_000
METADATA = {"format": "pt"}
"""Of every weight file, as transformers expects it."""
_CAUSES = {
    errno.ENOSPC: ("the disk is full", "make room"),
    errno.EDQUOT: ("the disk quota is used up", "make room"),
    errno.EFBIG: (
        "the file is larger than the file system or the limit of this process allows",
        "raise the limit",
    ),
    errno.EROFS: ("the file system is read-only", "make it writable or choose another place"),
    errno.EACCES: ("permission denied", "make it writable or choose another place"),
    errno.EPERM: ("operation not permitted", "make it writable or choose another place"),
    errno.ENOTEMPTY: ("it appeared in the meantime", "move it away"),
    errno.EEXIST: ("something with that name is in the way", "move it away"),
    errno.ENOTDIR: ("a file is in the place of a folder", "move it away"),
}


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in the safetensors file at `path`."""

    path: Path
    spec: TensorSpec


def write_safetensors(file: BinaryIO, tensors: Mapping[str, Tensor | Stored], metadata: Mapping[str, str]) -> str:
    """Streams a safetensors file and returns its SHA-256 (hex).

    The order is that of the safetensors library, whatever the order of the mapping: larger elements first (so
    that every tensor is aligned), then by name. Holds at most one tensor's copy (only of a non-contiguous or
    non-CPU one). ValueError for a dtype or a name that the format has not.
    """
    forms = {name: value.spec if isinstance(value, Stored) else value for name, value in tensors.items()}
    unknown = [name for name, form in forms.items() if form.dtype not in _DTYPE_NAMES or name == "__metadata__"]
    if unknown:
        raise ValueError(f"cannot store {unknown[0]!r} of {forms[unknown[0]].dtype}; dtypes: {', '.join(DTYPES)}")
    order = sorted(forms, key=lambda name: (-forms[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name in order:
        dtype, shape = forms[name].dtype, list(forms[name].shape)
        end = begin + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(f"the header would take {len(text)} bytes, more than the {MAX_HEADER} of the format")
    data = chain.from_iterable(_chunks(tensors[name]) for name in order)
    return _pour(file, chain([len(text).to_bytes(8, "little"), text], data))


def _chunks(value: Tensor | Stored) -> Iterator[memoryview]:
    if isinstance(value, Stored):
        yield from stream(value.path, value.spec.offset, value.spec.nbytes)
    else:
        whole = value.detach().cpu().contiguous()
        # not view(-1): a single element may have any stride, and then has no view as bytes
        flat = whole.as_strided((whole.numel(),), (1,)).view(torch.uint8).numpy()
        yield from (flat[begin : begin + CHUNK].data for begin in range(0, len(flat), CHUNK))


def _pour(file: BinaryIO, chunks: Iterable[bytes | memoryview]) -> str:
    """Write, and return the SHA-256 (hex): a large chunk is hashed and written while the next is read, and what is
    written goes to the disk meanwhile."""
    digest, waiting = hashlib.sha256(), list[Future[Any]]()
    written = 0
    with ThreadPoolExecutor(2) as beside, ThreadPoolExecutor(1) as behind:
        for chunk in chunks:
            for done in waiting:
                done.result()
            waiting.clear()
            if len(chunk) < _LARGE:
                digest.update(chunk)
                file.write(chunk)
                continue
            waiting = [beside.submit(digest.update, chunk), beside.submit(file.write, chunk)]
            written += len(chunk)
            if written >= _FLUSH:
                behind.submit(os.fdatasync, file.fileno())
                written = 0
        for done in waiting:
            done.result()
    return digest.hexdigest()


@final
class Writer:
    """Writes one checkpoint folder `out`; `job` is the JSON-able description of what is being made.

    Raises OutputError when `out` exists, when its work folder is in use, or is there without `resume`, or
    (with `resume`) belongs to another job. With `resume` and no work folder it starts afresh. Any OSError
    while writing is an OutputError too, and the work so far is kept. One Writer at a time holds the work
    folder: until `finish`, `close`, or the end of its process.
    """

    def __init__(self, out: Path, job: Mapping[str, Any], *, resume: bool, shard_bytes: int = 5_000_000_000) -> None:
        self.out = out.absolute()
        self.work = _work_folder(self.out)
        self._shard_bytes = shard_bytes
        self._kept = False
        refuse_existing(self.out)
        with self._writing(self.work):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            if resume:
                self.work.mkdir(exist_ok=True)
            elif os.path.lexists(self.work):
                raise OutputError(
                    f"{self.work} holds an unfinished job; continue it with --resume, or remove that folder"
                )
            else:
                self.work.mkdir()
            self._unlock = weakref.finalize(self, os.close, _lock(self.work))
            try:
                self._begin(json.loads(json.dumps(job)))
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Lets another Writer have the work folder. Nothing is lost: a new Writer with `resume` continues."""
        self._unlock()

    def done(self, unit: str) -> bool:
        """Whether `unit` is on disk, whole."""
        return self._path(unit).exists()

    def put(self, unit: str, tensors: Mapping[str, Tensor | Stored], facts: Mapping[str, Any]) -> None:
        """Stores a unit's tensors and its JSON-able facts in one durable step, in place of an earlier one."""
        with self._writing(path := self._path(unit)), replacing(path) as temporary:
            digest = _write(temporary, partial(write_safetensors, tensors=tensors, metadata=METADATA))
            record = json.dumps({"facts": facts, "sha256": digest}).encode()
            # The facts come first: the unit is done when its tensors have their name.
            _replace(path.with_suffix(".json"), partial(_pour, chunks=[record]))

    def facts(self, unit: str) -> dict[str, Any]:
        """The facts of a unit that is done, as they come back from JSON."""
        facts: dict[str, Any] = self._record(unit)["facts"]
        return facts

    def tensors(self, unit: str) -> dict[str, Tensor]:
        """The tensors of a unit that is done, as stored."""
        path = self._path(unit)
        return {name: read_tensor(path, spec) for name, spec in _header(path)[0].items()}

    def finish(self, units: Sequence[str], files: Mapping[str, FileContent]) -> Path:
        """Puts the folder together and moves it to `out`; returns `out`.

        Consecutive units share a shard as long as it stays within `shard_bytes`; a unit of 128 MB or more is a
        shard as it lies, and is not written again.
        Written in the order: shards, `files` that are bytes or paths, index, `files` that are functions (they
        see the hashes of all before them). A kill leaves either the units, to finish again with the same
        bytes, or `out` whole; what then remains of the work folder is for `clear_work`.

        ValueError for a unit that is not done, a tensor in two units, a file name that is none or that is a
        weight file's; OutputError when `out` has appeared meanwhile, or cannot be written.
        """
        shards = self._shards(units)
        merged = {name: self._merged(shard) for name, shard in shards.items()}
        index = {INDEX: _index(merged)} if len(shards) > 1 else {}
        for name in files:
            *folder, last_name = name.split("/", 1)
            weights = not folder and (name.endswith(".safetensors") or name == INDEX)
            if weights or not all(map(is_plain_name, (*folder, last_name))):
                raise ValueError(f"{name!r} is not the plain name of a file beside the weights, or in a folder there")
        contents = {name: content for name, content in files.items() if not callable(content)}
        last = {name: content for name, content in files.items() if callable(content)}
        final = self.work / "final"
        with self._writing(final):
            if final.exists():
                shutil.rmtree(final)
            final.mkdir()
            hashes: dict[str, str] = {}
            for name, shard in shards.items():
                if len(shard) == 1:
                    os.link(self._path(shard[0]), final / name)
                    hashes[name] = self._record(shard[0])["sha256"]
                else:
                    fill = partial(write_safetensors, tensors=merged[name], metadata=METADATA)
                    hashes[name] = _write(final / name, fill)
            for name, content in (contents | index | last).items():
                (final / name).parent.mkdir(exist_ok=True)
                data = content(dict(hashes)) if callable(content) else content
                chunks = stream(data) if isinstance(data, Path) else [data]
                hashes[name] = _write(final / name, partial(_pour, chunks=chunks))
            _sync(final)
            refuse_existing(self.out)  # rename would replace an empty folder without a word
        with self._writing(self.out):
            final.rename(self.out)
            _sync(self.out.parent)
        self.close()
        clear_work(self.out)
        return self.out

    def _begin(self, job: dict[str, Any]) -> None:
        """Takes up the work folder, or lays it out: job.json last, so that where it is, all else is."""
        units, record = self.work / "units", self.work / "job.json"
        before = _read_job(record)
        if before is None:
            if any(units.glob("*.safetensors")):
                raise OutputError(f"{self.work} holds finished units, but no readable job.json; remove that folder")
            shutil.rmtree(units, ignore_errors=True)
            units.mkdir()
            _replace(record, partial(_pour, chunks=[json.dumps(job, indent=2).encode() + b"\n"]))
            _sync(self.out.parent)
        elif other := list(differences(before, job)):
            raise OutputError(
                f"{self.work} holds another job: {'; '.join(other)}. Ask for the same job again, or "
                "remove that folder to start anew"
            )
        for stale in units.glob("*.tmp"):
            stale.unlink()
        self._kept = True

    def _path(self, unit: str) -> Path:
        if not _UNIT_NAME.fullmatch(unit):
            raise ValueError(f"{unit!r} cannot name a unit; use a-z, 0-9, '.', '_' and '-'")
        return self.work / "units" / f"{unit}.safetensors"

    def _record(self, unit: str) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self._path(unit).with_suffix(".json").read_bytes())
        return record

    def _merged(self, units: Sequence[str]) -> dict[str, Stored]:
        return {
            name: Stored(self._path(unit), spec)
            for unit in units
            for name, spec in _header(self._path(unit))[0].items()
        }

    def _shards(self, units: Sequence[str]) -> dict[str, list[str]]:
        """Shard file name -> its units."""
        shards: list[list[str]] = []
        home: dict[str, str] = {}
        room = 0
        for unit in units:
            if not self.done(unit):
                raise ValueError(f"unit {unit} is not done; put it before finish")
            specs = _header(self._path(unit))[0]
            for name in specs:
                if name in home:
                    raise ValueError(f"tensor {name} is in two units: {home[name]} and {unit}")
                home[name] = unit
            nbytes = sum(spec.nbytes for spec in specs.values())
            whole = nbytes >= _WHOLE_BYTES
            if whole or nbytes > room or not shards:
                shards.append([])
                room = self._shard_bytes
            room = 0 if whole else room - nbytes
            shards[-1].append(unit)
        if len(shards) == 1:
            return {SINGLE: shards[0]}
        return {
            f"model-{number:05}-of-{len(shards):05}.safetensors": shard for number, shard in enumerate(shards, start=1)
        }

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason, remedy = _CAUSES.get(error.errno or 0, (str(error), "mend that"))
            kept = f". The work so far is kept in {self.work}: continue with --resume" if self._kept else ""
            raise OutputError(f"cannot write {path}: {reason}; {remedy}{kept}") from error


def refuse_existing(out: Path) -> None:
    """OutputError where something has the name of the folder that is to be written."""
    if os.path.lexists(out):
        raise OutputError(f"{out} exists; tersely never overwrites: choose another name, or move it away")


def clear_work(out: Path) -> None:
    """Removes the work folder beside a finished `out`, which a kill in the last moment of `finish` can leave.

    Only for an `out` that is known to be whole. OutputError when a running job holds the folder, or it stays.
    """
    work = _work_folder(out.absolute())
    try:
        if work.exists():
            os.close(_lock(work))
            (work / "job.json").unlink(missing_ok=True)  # first: what is half removed is no job to continue
            shutil.rmtree(work)
    except OSError as error:
        raise OutputError(f"{out} is complete, but {work} cannot be removed ({error}); remove it by hand") from error


def _work_folder(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _lock(work: Path) -> int:
    """A descriptor that holds the work folder until it is closed, or its process ends in whatever way."""
    descriptor = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OutputError(f"another running job writes {work}; wait for it, or choose another output") from None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _read_job(path: Path) -> dict[str, Any] | None:
    try:
        job = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return job if isinstance(job, dict) else None


def _header(path: Path) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    try:
        return read_header(path)
    except CheckpointError as error:
        raise OutputError(f"unfinished work is damaged: {path}; remove this file and continue with --resume") from error


def _index(shards: Mapping[str, Mapping[str, Stored]]) -> bytes:
    """model.safetensors.index.json, as transformers writes it."""
    size = sum(value.spec.nbytes for shard in shards.values() for value in shard.values())
    weight_map = {name: file for file, shard in shards.items() for name in shard}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def differences(before: Any, now: Any, where: str = "") -> Iterator[str]:
    """Every key path whose JSON values differ, with both: "recipe.steps.0.bits: 4 then, 3 now"."""
    if isinstance(before, dict) and isinstance(now, dict):
        pairs = [(key, before.get(key, _ABSENT), now.get(key, _ABSENT)) for key in sorted({*before, *now})]
    elif isinstance(before, list) and isinstance(now, list):
        both = zip_longest(before, now, fillvalue=_ABSENT)
        pairs = [(str(number), then, new) for number, (then, new) in enumerate(both)]
    else:
        then, new = ("absent" if value is _ABSENT else json.dumps(value) for value in (before, now))
        if then != new:
            yield f"{where}: {_short(then)} then, {_short(new)} now"
        return
    for key, then, new in pairs:
        yield from differences(then, new, f"{where}.{key}" if where else key)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}"


def _write(path: Path, fill: Callable[[BinaryIO], str]) -> str:
    """Creates a durable file; returns what `fill` does (its SHA-256)."""
    with path.open("wb") as file:
        digest = fill(file)
        file.flush()
        os.fsync(file.fileno())
    return digest


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; then it takes the place of `path` in one step: never a part is there."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync(path.parent)


def _replace(path: Path, fill: Callable[[BinaryIO], str]) -> None:
    with replacing(path) as temporary:
        _write(temporary, fill)


def replace_file(path: Path, content: bytes) -> None:
    """Write a small file whole: a reader sees the old one or the new one. Raises OutputError: it cannot be written."""
    try:
        with replacing(path) as temporary:
            _write(temporary, partial(_pour, chunks=[content]))
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); choose another place") from error


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
