"""From the stored weights of a block to what is written in their place, and a row of the report for each.

With statistics, weights that share them are stacked, since the outputs of a weight are independent. Without,
a weight is read, encoded and packed a few rows at a time, so that any size needs the same memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from tersely.checkpoint import Checkpoint
from tersely.codecs import Encoded, Integers
from tersely.errors import CheckpointError
from tersely.graph import Weight
from tersely.measure import Statistics, output_energies
from tersely.methods import Encode
from tersely.results import Row

Format = Literal["compressed-tensors", "dense"]
_SLAB_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}


@dataclass(frozen=True)
class Result:
    """A weight after its method."""

    stored: Mapping[str, Tensor]
    """What is written, on the CPU, by full name."""
    row: Row


def encode(
    checkpoint: Checkpoint,
    weights: Sequence[Weight],
    methods: Mapping[str, Encode],
    statistics: Mapping[str, Statistics],
    format: Format,
    device: torch.device,
) -> Iterator[tuple[Weight, Encoded, Result]]:
    """Encode weights of one block with the statistics of their activations, those that share them together."""

    def together(weight: Weight) -> tuple[Any, ...]:
        # Without statistics there is nothing to share, and one weight at a time needs less memory.
        alone = "" if weight.statistics in statistics else weight.name
        return (weight.statistics, alone, repr(methods[weight.name]), str(weight.spec.dtype))

    for _, group in groupby(sorted(weights, key=together), key=together):
        stack = list(group)
        stats = statistics.get(stack[0].statistics) or Statistics(stack[0].columns, device)
        values = [_oriented(w, checkpoint[w.name]).to(device) for w in stack]
        method = methods[stack[0].name]
        encoded = method(torch.cat(values) if len(values) > 1 else values[0], stats).split([len(v) for v in values])
        for weight, value, part in zip(stack, values, encoded, strict=True):
            stored = _stored(weight, part, format)
            step = _step(weight)
            lost, total = output_energies(value[::step], part.sample(0, step).decode(), stats.gram_II)
            yield (
                weight,
                part,
                Result(stored, _row(weight, method, stored, lost, total, stats.tokens, part.note)),
            )


def encode_free(
    checkpoint: Checkpoint,
    weight: Weight,
    method: Encode,
    format: Format,
    device: torch.device,
) -> Result:
    """Encode a weight with a method that measures nothing, a slab of rows at a time."""
    slab = weight.rows
    if not weight.transposed:
        # A multiple of 32 rows: packed zero points of two slabs then meet at a word's boundary.
        row_bytes = weight.columns * weight.spec.dtype.itemsize
        slab = max(32, _SLAB_BYTES[device.type] // row_bytes // 32 * 32)
    nothing = Statistics(weight.columns, device)
    step = _step(weight)
    slabs: list[Mapping[str, Tensor]] = []
    lost = total = 0.0
    note = ""
    for a in range(0, weight.rows, slab):
        read = (
            checkpoint[weight.name]
            if weight.transposed
            else checkpoint.slab(weight.name, a, min(a + slab, weight.rows))
        )
        value = _oriented(weight, read).to(device)
        encoded = method(value, nothing)
        slabs.append(_stored(weight, encoded, format))
        start = -a % step
        energies = output_energies(value[start::step], encoded.sample(start, step).decode(), None)
        lost, total, note = lost + energies[0], total + energies[1], encoded.note
    stored = {name: _joined(name, [s[name] for s in slabs]) for name in slabs[0]}
    return Result(stored, _row(weight, method, stored, lost, total, 0, note))


def decode(weight: Weight, tensors: Mapping[str, Tensor], method: Encode, format: Format) -> Tensor:
    """The weight, (outputs, inputs), that `encode` left in the tensors of a unit, as it ran then."""
    if format == "dense":
        return _oriented(weight, tensors[weight.name])
    prefix = weight.name.removesuffix("weight")
    own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix + "weight_")}
    return Integers.from_tensors(own, method.bits).decode()


def stored_bytes(weight: Weight, method: Encode) -> int:
    """Bytes of an encoded weight, known before it is encoded."""
    groups = weight.rows * (weight.columns // method.group if method.group else 1)
    zeros = 0 if method.symmetric else 4 * -(-weight.rows * method.bits // 32) * (groups // weight.rows)
    return 4 * weight.rows * -(-weight.columns * method.bits // 32) + groups * weight.spec.dtype.itemsize + zeros + 16


def require_finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor itself; CheckpointError where it holds NaN or Inf."""
    # A sum is much faster than a mask, and finite unless something in it is not (or it overflows).
    if tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite() and not tensor.isfinite().all():
        raise CheckpointError(f"{name} contains NaN or Inf; the source is damaged, download or train it again")
    return tensor


def _step(weight: Weight) -> int:
    """Every so many outputs, the error is measured: 256 of them, or all of a smaller weight."""
    return -(-weight.rows // 256)


def _stored(weight: Weight, encoded: Encoded, format: Format) -> dict[str, Tensor]:
    if format == "dense":
        # A new dense weight in the source's layout and dtype.
        stored = {weight.name: _oriented(weight, encoded.decode().cpu()).to(weight.spec.dtype).contiguous()}
    else:
        prefix = weight.name.removesuffix("weight")
        stored = {f"{prefix}{leaf}": t.cpu() for leaf, t in encoded.tensors().items()}
    for tensor in stored.values():
        require_finite(weight.name, tensor)
    return stored


def _joined(name: str, slabs: Sequence[Tensor]) -> Tensor:
    if len(slabs) == 1:
        return slabs[0]
    if name.endswith("weight_shape"):
        return torch.stack([sum((s[0] for s in slabs), torch.zeros_like(slabs[0][0])), slabs[0][1]])
    return torch.cat(list(slabs))


def _row(
    weight: Weight,
    method: Encode,
    stored: Mapping[str, Tensor],
    lost: float,
    total: float,
    tokens: int,
    note: str,
) -> Row:
    error = (max(lost, 0.0) / total) ** 0.5 if total > 0 else 0.0
    return Row(
        name=weight.name,
        block=weight.block,
        role=weight.role,
        method=method.name,
        parameters=weight.rows * weight.columns,
        bytes_before=weight.spec.nbytes,
        bytes_after=sum(t.numel() * t.element_size() for t in stored.values()),
        error=float(f"{error:.6g}"),
        tokens=tokens,
        note=note,
    )


def _oriented(weight: Weight, stored: Tensor) -> Tensor:
    """(outputs, inputs) from the stored layout, and back."""
    return stored.t() if weight.transposed else stored
