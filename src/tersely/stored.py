"""A folder that `compress` wrote, read as the model that it stands for.

How each weight is stored is said in groups of weights that are stored alike, in config.json where `quant_method` is
"tersely", else in manifest.json:

    {"parts": [{"kind": "integers", ...}], "activations": "", "hadamard": 0, "dtype": "bfloat16",
     "transposed": false, "weights": {"model.layers.0.mlp.up_proj.weight": [outputs, inputs], ...}}

Every number in them is data from outside and checked before use.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from tersely.checkpoint import Checkpoint, TensorSpec, open_checkpoint
from tersely.codecs import Encoded, Scheme, read_encoded
from tersely.codecs.activations import ACTIVATIONS
from tersely.codecs.entrance import Entrance
from tersely.errors import CheckpointError

QUANT_METHOD = "tersely"


@dataclass(frozen=True)
class Entry:
    """How one weight is stored."""

    scheme: Scheme
    rows: int
    """Outputs."""
    columns: int
    """Inputs."""
    dtype: torch.dtype
    """Of the weight that it stands for."""
    transposed: bool
    """The model holds it as (inputs, outputs)."""

    @property
    def shape(self) -> tuple[int, int]:
        """As the model holds it."""
        return (self.columns, self.rows) if self.transposed else (self.rows, self.columns)

    def read(self, leaves: Mapping[str, Tensor], name: str) -> Encoded:
        """From the stored tensors, by leaf. CheckpointError where they are not those of the scheme."""
        try:
            return read_encoded(self.scheme.parts, leaves, self.rows, self.columns, self.dtype)
        except (KeyError, RuntimeError, ValueError, IndexError) as error:
            raise CheckpointError(f"{name} cannot be decoded ({error}); fetch or write the checkpoint again") from error

    def entrance(self, leaves: Mapping[str, Tensor]) -> Entrance:
        """What its inputs go through."""
        name = self.scheme.activations
        leaf = ACTIVATIONS[name].leaf if name else ""
        return Entrance(self.scheme.hadamard, name, leaves[leaf] if leaf else None)


def leaf_name(name: str, leaf: str) -> str:
    """Name of a stored tensor of an encoded weight: model.layers.0.mlp.up_proj.weight_packed."""
    return f"{name.removesuffix('weight')}{leaf}" if name.endswith(".weight") else f"{name}.{leaf}"


def groups_to_plain(entries: Mapping[str, Entry]) -> list[dict[str, Any]]:
    """What a config says of all encoded weights: those that are stored alike in one group."""
    groups: dict[str, dict[str, Any]] = {}
    for name, entry in entries.items():
        alike = {
            **entry.scheme.to_dict(),
            "dtype": str(entry.dtype).removeprefix("torch."),
            "transposed": entry.transposed,
        }
        group = groups.setdefault(json.dumps(alike, sort_keys=True), {**alike, "weights": {}})
        group["weights"][name] = [entry.rows, entry.columns]
    return list(groups.values())


def groups_from_plain(groups: Any, where: str) -> dict[str, Entry]:
    """The inverse. CheckpointError: not what `groups_to_plain` gives."""
    if not isinstance(groups, list):
        raise CheckpointError(f"{where} does not say how weights are stored; fetch or write the checkpoint again")
    entries: dict[str, Entry] = {}
    for group in groups:
        try:
            scheme = Scheme.from_dict(group)
            dtype = getattr(torch, str(group["dtype"]))
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
                raise TypeError(f"dtype {group['dtype']}")
            for name, (rows, columns) in group["weights"].items():
                if not all(isinstance(n, int) and 0 < n < 1 << 31 for n in (rows, columns)):
                    raise TypeError(f"shape of {name}")
                entries[str(name)] = Entry(scheme, rows, columns, dtype, bool(group["transposed"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{where} is damaged where it says how weights are stored: {error}") from error
    return entries


@final
class Stored(Mapping[str, Tensor]):
    """The tensors of the source by name, decoded when they are asked for; `open_stored` makes one."""

    def __init__(self, written: Checkpoint, entries: Mapping[str, Entry]) -> None:
        self.written = written
        """The folder as it lies."""
        self.entries = entries
        """How each encoded weight is stored."""
        self.path = written.path
        self.config = {k: v for k, v in written.config.items() if k != "quantization_config"}
        self._leaves: dict[str, dict[str, str]] = {name: {} for name in entries}
        by_prefix = {leaf_name(name, ""): name for name in entries}
        for tensor in written:
            prefix, _, leaf = tensor.rpartition(".")
            # A bias has the prefix of its weight.
            if leaf != "bias" and (name := by_prefix.get(f"{prefix}.")) is not None:
                self._leaves[name][leaf] = tensor
        taken = {tensor for leaves in self._leaves.values() for tensor in leaves.values()}
        self._order = (*(name for name in written if name not in taken), *entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def spec(self, name: str) -> TensorSpec:
        """Of the tensor that the model holds; an encoded one lies in no file."""
        if name not in self.entries:
            return self.written.spec(name)
        entry = self.entries[name]
        nbytes = entry.rows * entry.columns * entry.dtype.itemsize
        return TensorSpec(name, entry.dtype, entry.shape, nbytes, "", 0)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor as the model holds it, in fresh memory."""
        if name not in self.entries:
            return self.written[name]
        decoded = self.encoded(name).decode()
        return decoded.t().contiguous() if self.entries[name].transposed else decoded

    def encoded(self, name: str) -> Encoded:
        """An encoded weight, (outputs, inputs), as it lies."""
        return self.entries[name].read(self.leaves(name), name)

    def leaves(self, name: str) -> dict[str, Tensor]:
        """The stored tensors of an encoded weight, by leaf."""
        return {leaf: self.written[tensor] for leaf, tensor in self._leaves[name].items()}

    def stored_names(self, name: str) -> tuple[str, ...]:
        """Under which a tensor of the source is stored."""
        return tuple(self._leaves[name].values()) if name in self.entries else (name,)


def open_stored(folder: str | Path) -> Stored:
    """Open a folder that `compress` wrote, or an ordinary checkpoint (nothing in it is encoded).

    CheckpointError: a quantized checkpoint that others wrote, or one whose account of itself is damaged.
    """
    written = open_checkpoint(folder)
    quantized = written.config.get("quantization_config")
    if quantized is None:
        return Stored(written, {})
    if not isinstance(quantized, dict):
        raise CheckpointError(f"{written.path / 'config.json'}: quantization_config is not an object")
    manifest = _manifest(written.path)
    if quantized.get("quant_method") == QUANT_METHOD:
        entries = groups_from_plain(quantized.get("groups"), f"{written.path / 'config.json'}")
    elif "groups" in manifest:
        entries = groups_from_plain(manifest["groups"], f"{written.path / 'manifest.json'}")
    else:
        raise CheckpointError(
            f"{written.path} is quantized ({quantized.get('quant_method')}), but not by tersely, which can read only "
            "what it wrote; start from the original checkpoint"
        )
    return Stored(written, entries)


def _manifest(path: Path) -> dict[str, Any]:
    try:
        plain = json.loads((path / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return plain if isinstance(plain, dict) else {}
