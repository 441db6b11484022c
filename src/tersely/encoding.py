"""From the stored weights of a block to what is written in their place, and a row of the report for each.

With statistics, weights that share them are stacked, since the outputs of a weight are independent. Without,
a weight is read, encoded and packed a few rows at a time, so that any size needs the same memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, final

import torch
from torch import Tensor

from tersely.checkpoint import Checkpoint
from tersely.codecs import Encoded, Scheme
from tersely.codecs.activations import ACTIVATIONS, layout
from tersely.codecs.bitmask import smallest, smallest_form
from tersely.codecs.dense import Dense, DenseForm
from tersely.codecs.entrance import Entrance
from tersely.errors import CheckpointError
from tersely.graph import Weight
from tersely.hadamard import hadamard
from tersely.measure import Statistics, output_energies
from tersely.plan.recipe import Step
from tersely.results import Row
from tersely.stored import leaf_name

Format = Literal["compressed-tensors", "tersely", "dense"]
_SLAB_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}


@final
class Source(Mapping[str, Tensor]):
    """The tensors of a checkpoint, with changes laid over some of them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.changed: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint)

    def __len__(self) -> int:
        return len(self.checkpoint)

    def __getitem__(self, name: str) -> Tensor:
        return self.changed[name] if name in self.changed else self.checkpoint[name]

    def slab(self, name: str, start: int, end: int) -> Tensor:
        """Rows start to end - 1."""
        return self.changed[name][start:end] if name in self.changed else self.checkpoint.slab(name, start, end)

    def value(self, weight: Weight, step: Step | None, device: torch.device) -> Tensor:
        """A linear weight (outputs, inputs) in the basis in which a step encodes it."""
        value_OI = _oriented(weight, require_finite(weight.name, self[weight.name])).to(device)
        return hadamard(value_OI, step.hadamard) if step is not None and step.hadamard else value_OI


@dataclass(frozen=True)
class Result:
    """A weight after its method."""

    stored: Mapping[str, Tensor]
    """What is written, on the CPU, by full name."""
    scheme: Scheme
    row: Row
    entrance: Entrance
    """What its inputs go through when the model runs."""


def encode(
    source: Source,
    weights: Sequence[Weight],
    steps: Mapping[str, Step],
    statistics: Mapping[str, Statistics],
    format: Format,
    device: torch.device,
    fishers: Mapping[str, Tensor],
) -> Iterator[tuple[Weight, Encoded, Result]]:
    """Encode weights of one block with the statistics of their activations, those that share them together.

    fishers: what was measured of the weights themselves, by stored name.
    """

    def together(weight: Weight) -> tuple[Any, ...]:
        # Without statistics there is nothing to share, and one weight at a time needs less memory.
        shares = steps[weight.name].row_wise and weight.statistics in statistics
        alone = "" if shares else weight.name
        return (weight.statistics, alone, repr(steps[weight.name]), str(weight.spec.dtype))

    for _, group in groupby(sorted(weights, key=together), key=together):
        stack = list(group)
        stats = statistics.get(stack[0].statistics) or Statistics(stack[0].columns, device)
        step = steps[stack[0].name]
        values = [source.value(w, step, device) for w in stack]
        if all(w.name in fishers for w in stack):
            stats = replace(stats, fisher_OI=torch.cat([fishers[w.name] for w in stack]))
        encoded = applied(step, torch.cat(values) if len(values) > 1 else values[0], stats)
        pieces = encoded.split([len(v) for v in values]) if len(values) > 1 else [encoded]
        for weight, value, part in zip(stack, values, pieces, strict=True):
            yield weight, part, result(weight, step, value, part, stats, format)


def applied(step: Step, weight_OI: Tensor, stats: Statistics) -> Encoded:
    """A weight after a step: first what sets it to zero, if any, then what stores the rest."""
    if not step.sparse:
        return step.method(weight_OI, stats)
    first = Encoded((Dense(weight_OI),)) if step.sparsity is None else step.sparsity(weight_OI, stats)
    sparse_OI = first.decode()
    second = step.method(sparse_OI, replace(stats, kept_OI=sparse_OI != 0))
    return Encoded(second.parts, "; ".join(filter(None, [first.note, second.note])))


def result(weight: Weight, step: Step, value_OI: Tensor, encoded: Encoded, stats: Statistics, format: Format) -> Result:
    """What is written of an encoded weight, and its row of the report."""
    entrance = _entrance(weight, step, stats)
    encoded = _laid_out(encoded, step, format)
    stored = _stored(weight, encoded, entrance, format)
    every = _step(weight)
    lost, total = output_energies(value_OI[::every], encoded.sample(0, every).decode(), stats.gram_II)
    row = _row(weight, step, stored, lost, total, stats.tokens, encoded.note, _zeros(encoded, step))
    return Result(stored, _scheme(encoded, step), row, entrance)


def encode_free(source: Source, weight: Weight, step: Step, format: Format, device: torch.device) -> Result:
    """Encode a weight with a method that measures nothing, a slab of rows at a time."""
    slab = weight.rows
    if step.row_wise and not weight.transposed:
        # A multiple of 32 rows: packed zero points of two slabs then meet at a word's boundary.
        row_bytes = weight.columns * weight.spec.dtype.itemsize
        slab = max(32, _SLAB_BYTES[device.type] // row_bytes // 32 * 32)
    nothing = Statistics(weight.columns, device)
    entrance = _entrance(weight, step, nothing)
    every = _step(weight)
    pieces: list[Tensor] = []
    slabs: list[Mapping[str, Tensor]] = []
    schemes: list[Scheme] = []
    lost = total = 0.0
    zeros: int | None = None
    note = ""
    for a in range(0, weight.rows, slab):
        read = source[weight.name] if slab >= weight.rows else source.slab(weight.name, a, min(a + slab, weight.rows))
        value = _oriented(weight, require_finite(weight.name, read)).to(device)
        value = hadamard(value, step.hadamard) if step.hadamard else value
        encoded = applied(step, value, nothing)
        if (own := _zeros(encoded, step)) is not None:
            zeros = own + (zeros or 0)
        if _scheme(encoded, step).unquantized:
            pieces.append(encoded.decode().cpu())
        else:
            encoded = _laid_out(encoded, step, format)
            slabs.append(_stored(weight, encoded, entrance, format))
            schemes.append(_scheme(encoded, step))
        start = -a % every
        energies = output_energies(value[start::every], encoded.sample(start, every).decode(), None)
        lost, total, note = lost + energies[0], total + energies[1], encoded.note
    if pieces:
        # How it is stored depends on how many zeros all of it has.
        whole = _laid_out(Encoded((Dense(torch.cat(pieces)),)), step, format)
        slabs, schemes = [_stored(weight, whole, entrance, format)], [_scheme(whole, step)]
    assert len(set(schemes)) == 1, "a row-wise method leaves one form"
    stored = {name: _joined(name, [s[name] for s in slabs]) for name in slabs[0]}
    return Result(stored, schemes[0], _row(weight, step, stored, lost, total, 0, note, zeros), entrance)


def _laid_out(encoded: Encoded, step: Step, format: Format) -> Encoded:
    """As the format stores its parts."""
    if _scheme(encoded, step).unquantized:
        value_OI = encoded.decode()
        return Encoded((smallest(value_OI) if format == "tersely" else Dense(value_OI),), encoded.note)
    if format != "compressed-tensors":
        return encoded
    forms = layout(_scheme(encoded, step)).parts
    parts = (replace(part, form=form) for part, form in zip(encoded.parts, forms, strict=True))  # type: ignore[type-var]
    return Encoded(tuple(parts), encoded.note)


def stored_bytes(weight: Weight, scheme: Scheme, format: Format) -> int:
    """What a weight takes in a format, the most where that depends on its values."""
    if format == "dense" or (format == "compressed-tensors" and scheme.unquantized):
        return weight.spec.nbytes
    shape = (weight.rows, weight.columns, weight.spec.dtype)
    if scheme.unquantized:
        forms = (form for form in scheme.parts if isinstance(form, DenseForm))
        return sum(smallest_form(form, *shape).nbytes(*shape) for form in forms)
    return (layout(scheme) if format == "compressed-tensors" else scheme).nbytes(*shape)


def _scheme(encoded: Encoded, step: Step) -> Scheme:
    return Scheme(encoded.forms, step.activations, step.hadamard)


def _entrance(weight: Weight, step: Step, stats: Statistics) -> Entrance:
    """What the inputs of a weight go through; a static scale is taken from what was measured."""
    scale = None
    if step.activations and (quantizer := ACTIVATIONS[step.activations]).needs:
        largest = stats.absmax_I if stats.absmax_I is not None else torch.zeros(weight.columns, device=stats.device)
        scale = quantizer.scale(largest, weight.spec.dtype)
    return Entrance(step.hadamard, step.activations, scale)


def require_finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor itself; CheckpointError where it holds NaN or Inf."""
    # A sum is much faster than a mask, and finite unless something in it is not (or it overflows).
    if (
        tensor.is_floating_point()
        and not tensor.sum(dtype=torch.float32).isfinite()
        and not tensor.float().isfinite().all()
    ):
        raise CheckpointError(f"{name} contains NaN or Inf; the source is damaged, download or train it again")
    return tensor


def _zeros(encoded: Encoded, step: Step) -> int | None:
    """How many weights are zero, where zeros are what a step is for."""
    return int((encoded.decode() == 0).sum()) if step.sparse or _scheme(encoded, step).unquantized else None


def _step(weight: Weight) -> int:
    """Every so many outputs, the error is measured: 256 of them, or all of a smaller weight."""
    return -(-weight.rows // 256)


def _stored(weight: Weight, encoded: Encoded, entrance: Entrance, format: Format) -> dict[str, Tensor]:
    if format == "dense" or (format == "compressed-tensors" and Scheme(encoded.forms).unquantized):
        # A new dense weight in the source's layout and dtype.
        stored = {weight.name: _oriented(weight, encoded.decode().cpu()).to(weight.spec.dtype).contiguous()}
    else:
        stored = {leaf_name(weight.name, leaf): t.cpu() for leaf, t in encoded.tensors().items()}
        if entrance.scale is not None:
            stored[leaf_name(weight.name, ACTIVATIONS[entrance.activations].leaf)] = entrance.scale.cpu()
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
    step: Step,
    stored: Mapping[str, Tensor],
    lost: float,
    total: float,
    tokens: int,
    note: str,
    zeros: int | None,
) -> Row:
    error = (max(lost, 0.0) / total) ** 0.5 if total > 0 else 0.0
    return Row(
        name=weight.name,
        block=weight.block,
        role=weight.role,
        method=step.name,
        parameters=weight.rows * weight.columns,
        bytes_before=weight.spec.nbytes,
        bytes_after=sum(t.numel() * t.element_size() for t in stored.values()),
        error=float(f"{error:.6g}"),
        tokens=tokens,
        note=note,
        zeros=zeros,
    )


def _oriented(weight: Weight, stored: Tensor) -> Tensor:
    """(outputs, inputs) from the stored layout, and back."""
    return stored.t() if weight.transposed else stored
