"""Weights that stay packed in memory: a tensor that holds what is stored and decodes when it multiplies.

It stands where a dense parameter stood, so that linear layers, GPT-2's Conv1D and stacked experts are one case and no
module of a model is replaced. With inputs x that go through an entrance (Hadamard product, then rounding to x_hat):

    y = x_hat W^T + (x - x_hat) F^T

W being the sum of all parts, F of those that meet the inputs before they are rounded; a W that is two factors alone,
W = B A, is never formed: y = (x_hat A^T) B^T. This is what `compress` has in
memory, operation by operation, so the results are equal bit for bit. Nothing that is decoded is kept.

Shapes: O outputs, I inputs, E experts (slots of a stacked parameter), ... leading axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tersely.codecs.entrance import Entrance
from tersely.codecs.low_rank import look_up
from tersely.runtime.held import Cell, Held

_aten = torch.ops.aten
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Of inputs (..., I), a dense weight and a bias."""
Slots = tuple[tuple[Cell, ...], ...]
"""Of each slot of a parameter, its cells: one below the other, along the slot's first axis."""


@final
class Packed(Tensor):
    """A parameter, (O, I) or (I, O) or stacked (E, O, I), that holds stored tensors.

    Products (linear, addmm, matmul) and lookups are those of the compressed model; slots `w[i]`, slices that end where
    cells do and transposes are packed too; `copy_` exchanges what is held. For all else it is the dense tensor that it
    stands for, decoded for the moment. RuntimeError: another product (or a view of another kind, which may lead to one)
    of a weight whose inputs go through something, and changes in place that would be lost.
    """

    slots: Slots
    stacked: bool
    turned: bool
    """Its last two axes are swapped."""

    @staticmethod
    def __new__(cls, slots: Slots, dtype: torch.dtype, *, stacked: bool = False, turned: bool = False) -> Self:
        columns = slots[0][0].shape[1]
        rows = sum(cell.shape[0] for cell in slots[0])
        matrix, strides = ((columns, rows), (1, columns)) if turned else ((rows, columns), (columns, 1))
        # A part of a parameter is taken to be a view of it, which an inference tensor cannot be of one that is none.
        with torch.inference_mode(False):
            packed: Self = Tensor._make_wrapper_subclass(
                cls,
                (len(slots), *matrix) if stacked else matrix,
                strides=(rows * columns, *strides) if stacked else strides,
                dtype=dtype,
                device=slots[0][0].leaves()[0].device,
            )
        packed.slots, packed.stacked, packed.turned = slots, stacked, turned
        return packed

    def __init__(self, slots: Slots, dtype: torch.dtype, *, stacked: bool = False, turned: bool = False) -> None:
        """slots: all of one shape; dtype: of the dense parameter that it stands for."""

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        kinds = {form.kind for cell in self.cells for form in _forms(cell)}
        return f"Packed({list(self.shape)}, {self.dtype}, {self.device}, {' + '.join(sorted(kinds)) or 'dense'})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = {id(cell): Cell(_copied(cell.held), cell.shape) for cell in self.cells}
        new = self._like(slots=tuple(tuple(copied[id(cell)] for cell in slot) for slot in self.slots))
        new.requires_grad_(self.requires_grad)
        if hasattr(self, "_is_param"):
            new._is_param = True
        memo[id(self)] = new
        return new

    @property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(cell for slot in self.slots for cell in slot)

    @property
    def packed_bytes(self) -> int:
        """Of what is stored, as it lies in memory."""
        return sum(tensor.nbytes for cell in self.cells for tensor in cell.leaves())

    def dense(self) -> Tensor:
        """The dense tensor that it stands for, in fresh memory: in the source's basis, inputs taken as they come."""
        slots = [_joined([cell.value(self.dtype) for cell in slot]) for slot in self.slots]
        return self._viewed(torch.stack(slots) if self.stacked else slots[0])

    def times(self, x: Tensor, product: Product, inputs: int, bias: Tensor | None = None) -> Tensor:
        """y of x (..., I). inputs: the axis of the weight that meets them, -1 or -2."""
        cells = self.slots[0]
        if self.stacked or (inputs == -1) != (_inputs_last(cells) != self.turned):
            _require_plain(self)
            return product(x, self.dense(), bias)
        entrance, *others = [cell.entrance for cell in cells]
        rows = [cell.shape[0 if _inputs_last(cells) else 1] for cell in cells]
        if any(not _same(entrance, other) for other in others) or (others and any(cell.is_product for cell in cells)):
            # Cells of one slot lie along the outputs.
            each = [self._like(slots=((cell,),)) for cell in cells]
            own = [None] * len(each) if bias is None else torch.split(bias, rows, dim=-1)
            return torch.cat([p.times(x, product, inputs, b) for p, b in zip(each, own, strict=True)], dim=-1)
        x = entrance.transformed(x)
        if (factors := cells[0].factors(self.dtype)) is not None:
            a_RI, held = factors
            return product(torch.nn.functional.linear(entrance.rounded(x), a_RI), self._viewed(held), bias)
        weight = self._viewed(_joined([cell.multiplied(self.dtype) for cell in cells]))
        if not entrance.activations:
            return product(x, weight, bias)
        rounded = entrance.rounded(x)
        y = product(rounded, weight, bias)
        full = [cell.full() for cell in cells]
        if all(share is None for share in full):
            return y
        zeros = [x.new_zeros(count, x.shape[-1]) for count in rows]
        shares = [zero if share is None else share.to(x.dtype) for share, zero in zip(full, zeros, strict=True)]
        return y + (x - rounded) @ _joined(shares).t()

    def _viewed(self, held: Tensor) -> Tensor:
        return held.transpose(-1, -2) if self.turned else held

    def _like(self, *, slots: Slots | None = None, dtype: torch.dtype | None = None, **axes: bool) -> Self:
        own = {"stacked": self.stacked, "turned": self.turned, **axes}
        return type(self)(self.slots if slots is None else slots, dtype or self.dtype, **own)

    def _moved(self, device: torch.device | None, dtype: torch.dtype | None) -> Self:
        """With tensors of its own."""
        place = device or self.device
        moved = {id(cell): Cell(cell.held.to(place), cell.shape) for cell in self.cells}
        return self._like(slots=tuple(tuple(moved[id(cell)] for cell in slot) for slot in self.slots), dtype=dtype)

    def _rows(self, start: int, end: int) -> Self | None:
        """Rows of a matrix, where cells begin and end there."""
        place, chosen = 0, []
        for cell in self.slots[0]:
            if start <= place and place + cell.shape[0] <= end:
                chosen.append(cell)
            place += cell.shape[0]
        whole = sum(cell.shape[0] for cell in chosen) == end - start
        return self._like(slots=(tuple(chosen),)) if chosen and whole else None

    def _exchange(self, other: Tensor) -> None:
        """Hold what another one holds, or a copy of its numbers."""
        if isinstance(other, Packed) and [c.shape for c in self.cells] == [c.shape for c in other.cells]:
            for cell, source in zip(self.cells, other.cells, strict=True):
                cell.held = source.held
            return
        numbers = self._viewed(other.detach().to(device=self.device, dtype=self.dtype)).expand(self._viewed(self).shape)
        slots = numbers if self.stacked else numbers[None]
        for slot, values in zip(self.slots, slots, strict=True):
            for cell, value in zip(slot, values.split([cell.shape[0] for cell in slot]), strict=True):
                cell.held = value.clone()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if (own := _FUNCTIONS.get(func)) is not None:
            return own(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if isinstance(args[0] if args else None, Packed) and (own := _OPERATIONS.get(func)) is not None:
            found = own(*args, **(kwargs or {}))
            if found is not None:
                return found
        if func._schema.is_mutable and any(
            isinstance(value, Packed)
            for value, argument in zip(args, func._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ):
            raise RuntimeError(f"{func} would change packed weights in place; load the model with --format dense")
        if func.overloadpacket in _MISLEADING:
            tree_map_only(Packed, _require_plain, (tuple(args), dict(kwargs or {})))
        args, kwargs = tree_map_only(Packed, Packed.dense, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)


def _forms(cell: Cell) -> Sequence[Any]:
    return cell.held.entry.scheme.parts if isinstance(cell.held, Held) else ()


def _inputs_last(cells: Sequence[Cell]) -> bool:
    """Whether the inputs are the last axis of what they hold."""
    return not any(isinstance(cell.held, Held) and cell.held.entry.transposed for cell in cells)


def _copied(held: Held | Tensor) -> Held | Tensor:
    return held.copied() if isinstance(held, Held) else held.clone()


def _joined(rows: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(rows)) if len(rows) > 1 else rows[0]


def _same(one: Entrance, other: Entrance) -> bool:
    """Whether two entrances leave the same of any inputs."""
    if (one.hadamard, one.activations) != (other.hadamard, other.activations):
        return False
    if one.scale is None or other.scale is None:
        return one.scale is other.scale
    return torch.equal(one.scale, other.scale)


def _require_plain(packed: Packed) -> None:
    """RuntimeError where inputs go through something, which a dense tensor would forget."""
    if any(cell.entrance.hadamard or cell.entrance.activations for cell in packed.cells):
        raise RuntimeError(
            "a packed weight whose inputs are rotated or rounded first knows of this in linear, addmm and matmul only; "
            'run mixtures of experts with experts_implementation="eager", or use --format dense'
        )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, Packed):
        raise RuntimeError("a packed weight cannot be the inputs of a layer")
    return weight.times(x, torch.nn.functional.linear, -1, bias)


def _embedding(ids: Tensor, weight: Tensor, *how: Any, **named: Any) -> Tensor:
    if isinstance(weight, Packed) and len(weight.cells) == 1:
        _require_plain(weight)
        if (factors := weight.cells[0].factors(weight.dtype)) is not None:
            return look_up(ids, *factors)
    return torch.nn.functional.embedding(ids, _dense(weight), *how, **named)


def _addmm(bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if not isinstance(weight, Packed):
        raise RuntimeError("a packed weight cannot be the inputs or the bias of a layer")

    def product(x: Tensor, dense: Tensor, bias: Tensor | None) -> Tensor:
        assert bias is not None
        return torch.addmm(bias, x, dense, beta=beta, alpha=alpha)

    return weight.times(x, product, -2, bias)


def _matmul(x: Tensor, weight: Tensor) -> Tensor:
    if not isinstance(weight, Packed) or isinstance(x, Packed):
        if isinstance(x, Packed):
            _require_plain(x)
        return torch.matmul(_dense(x), _dense(weight))
    return weight.times(x, lambda x, dense, _bias: torch.matmul(x, dense), -2)


def _dense(tensor: Tensor) -> Tensor:
    return tensor.dense() if isinstance(tensor, Packed) else tensor


def _set_data(packed: Packed, other: Tensor) -> None:
    """`packed.data = other`, as modules do when they move."""
    if not isinstance(other, Packed):
        raise RuntimeError("a packed weight cannot take a dense tensor's place; replace the parameter")
    with torch._C.DisableTorchFunctionSubclass():
        Tensor.data.__set__(packed, other)  # type: ignore[attr-defined]
    packed.slots, packed.stacked, packed.turned = other.slots, other.stacked, other.turned


def _copy(packed: Packed, other: Tensor, non_blocking: bool = False) -> Packed:  # noqa: ARG001 (of copy_)
    packed._exchange(other)
    return packed


def _select(packed: Packed, dim: int, index: int) -> Packed | None:
    if not packed.stacked or dim != 0:
        return None
    return packed._like(slots=(packed.slots[index],), stacked=False)


def _slice(packed: Packed, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    length = packed.shape[dim]
    first, last, _ = slice(start, end).indices(length)
    if step != 1 or dim != 0:
        return None
    if (first, last) == (0, length):
        return packed._like()
    if packed.stacked:
        return packed._like(slots=packed.slots[first:last]) if first < last else None
    return None if packed.turned else packed._rows(first, last)


def _transpose(packed: Packed, first: int, second: int) -> Packed | None:
    axes = {first % packed.ndim, second % packed.ndim}
    return packed._like(turned=not packed.turned) if axes == {packed.ndim - 1, packed.ndim - 2} else None


def _permute(packed: Packed, dims: Sequence[int]) -> Packed | None:
    swapped = [*range(packed.ndim - 2), packed.ndim - 1, packed.ndim - 2]
    return packed._like(turned=not packed.turned) if [d % packed.ndim for d in dims] == swapped else None


def _to(packed: Packed, *, dtype: torch.dtype | None = None, device: Any = None, **how: Any) -> Packed:  # noqa: ARG001
    return packed._moved(None if device is None else torch.device(device), dtype)


_FUNCTIONS: Mapping[Any, Callable[..., Any]] = {
    torch.nn.functional.linear: _linear,
    torch.nn.functional.embedding: _embedding,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.addmm: _addmm,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.__rmatmul__: lambda weight, x: _matmul(x, weight),
    Tensor.data_ptr: lambda packed: packed.cells[0].leaves()[0].data_ptr(),
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
}
"""What PyTorch calls that concerns a packed weight as a whole."""

_OPERATIONS: Mapping[Any, Callable[..., Any]] = {
    _aten.detach.default: lambda packed: packed._like(),
    _aten.alias.default: lambda packed: packed._like(),
    _aten.clone.default: lambda packed, **_how: packed._moved(None, None),
    _aten._to_copy.default: _to,
    _aten.copy_.default: _copy,
    _aten.select.int: _select,
    _aten.slice.Tensor: _slice,
    _aten.t.default: lambda packed: packed._like(turned=not packed.turned),
    _aten.transpose.int: _transpose,
    _aten.permute.default: _permute,
}
"""What stays packed; None where it does not."""

_MISLEADING = frozenset(
    getattr(_aten, name)
    for name in (
        *("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "linear", "matmul", "_grouped_mm"),
        *("select", "slice", "index", "index_select", "gather", "cat", "stack", "unbind", "split", "split_with_sizes"),
        *("view", "_unsafe_view", "reshape", "expand", "unsqueeze", "squeeze", "permute", "transpose"),
    )
)
"""Products, and what leads to one of a dense tensor."""
