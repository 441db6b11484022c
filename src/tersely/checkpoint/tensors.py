"""The tensors of a checkpoint by name.

Shapes: R rows of a 2-D tensor, C its columns, N rows asked for, U distinct rows among them.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from tersely.checkpoint.files import fill, read_bytes, reading, sha256, stream
from tersely.checkpoint.header import TensorSpec, read_tensor
from tersely.errors import CheckpointError


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

    def with_headers(self, config: dict[str, Any], specs: Mapping[str, TensorSpec]) -> Checkpoint:
        """Another config and other headers over the same files: of a checkpoint that is yet to be written, say, of
        which nothing but these may be asked."""
        return Checkpoint(
            path=self.path,
            source=self.source,
            config=config,
            specs=specs,
            weight_files=self.weight_files,
            companions=self.companions,
            left_behind=self.left_behind,
        )

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
        return read_bytes(self.path / spec.file, spec.offset, spec.nbytes)

    def slab(self, name: str, start: int, end: int) -> Tensor:
        """Rows start to end - 1 of a tensor of one dimension or more, in fresh CPU memory."""
        spec = self.spec(name)
        width = prod(spec.shape[1:]) * spec.dtype.itemsize
        data = read_bytes(self.path / spec.file, spec.offset + start * width, (end - start) * width)
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
        with reading(path) as descriptor:
            for first, last in pairwise(runs):
                start = spec.offset + rows[first] * width
                fill(descriptor, view[first * width : last * width], start, path)
        if not torch.equal(place_N, torch.arange(len(rows))):
            bytes_UB = bytes_UB[place_N]
        return bytes_UB.view(-1).view(spec.dtype).view(len(index), columns)

    def sha256(self) -> dict[str, str]:
        """SHA-256 (hex) of config.json and of each weight file."""
        names = ("config.json", *self.weight_files)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashlib lets go of the GIL
            return dict(zip(names, pool.map(lambda name: sha256(self.path / name), names), strict=True))
