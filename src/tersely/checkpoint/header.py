"""The header of a safetensors file: where its tensors lie. Every number in it is checked before use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from tersely.checkpoint.files import fill, json_object, read_bytes, reading
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


@dataclass(frozen=True)
class TensorSpec:
    """Where a tensor lies: `nbytes` bytes from byte `offset` (absolute) of `file` (a name in the folder)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    file: str
    offset: int


def read_header(path: Path) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """The tensors of a safetensors file in the order of their data, and its `__metadata__`.

    CheckpointError unless the tensors fill the data area exactly: no hole, no overlap, nothing after them.
    """
    with reading(path) as descriptor:
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
        fill(descriptor, memoryview(text), 8, path)
    if text[:1] != b"{":
        raise CheckpointError(f"{path} is not a safetensors file: its header does not start with a brace")
    header = json_object(bytes(text), path)
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


def read_tensor(path: Path, spec: TensorSpec) -> Tensor:
    """The tensor that `spec` places in the file at `path`, in fresh CPU memory."""
    return read_bytes(path, spec.offset, spec.nbytes).view(spec.dtype).view(spec.shape)
