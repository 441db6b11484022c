"""The way of sequences through a model to their loss and back, with the weights of one block in memory at a time.

Sequences run through the model as flows do. At a block the record of what autograd does breaks off: the block runs
without one, and what it gives is a leaf, as if it were an input of the model. Between blocks autograd records as ever.
On the way back the loss gives the leaves of the last block their gradients; the block is paged in and runs again with a
record, from its inputs, which were kept; its weights get their gradients, and so does what came to it, which goes on
through what lies between, to the leaves of the blocks before. So a block may read what any other gave: the memory of
an encoder gathers its gradients from every block of the decoder.

Shapes: O outputs, I inputs of a weight, L tokens of a sequence, C positions of which the logits are computed together,
V tokens of the vocabulary, U different ones that are looked up, D coordinates of the hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, linear
from torch.overrides import TorchFunctionMode

from tersely.calibrate import MicroBatch
from tersely.checkpoint import Checkpoint
from tersely.errors import CheckpointError
from tersely.graph import Graph, Piece, Weight, slot
from tersely.stream.flow import CancelledError, Flow
from tersely.stream.paged import Paged
from tersely.stream.sums import Gradient, Sums


@dataclass(frozen=True, eq=False)
class _Crossing:
    """What came to a block and what it gave, as leaves."""

    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    output: Any


@dataclass(frozen=True, eq=False)
class _Looked:
    """Rows of a table that were looked up."""

    weight: Weight
    ids_U: Tensor
    rows_UD: Tensor
    """A leaf."""
    inverse: Tensor


@dataclass(eq=False)
class Course:
    """One sequence on its way to the loss, and what its way back needs."""

    number: int
    batch: MicroBatch
    flow: Flow
    crossings: dict[str, _Crossing] = field(default_factory=dict)
    looked: list[_Looked] = field(default_factory=list)
    again: Iterator[_Looked] | None = None
    """What was looked up, where the model runs once more from the last block on."""
    outside: dict[str, Tensor] = field(default_factory=dict)
    """Gradients of what lies outside the blocks, as far as they have come; all but those of tables."""
    rows_UD: dict[str, Tensor] = field(default_factory=dict)
    """Of tables that are the head too, its gradients in the rows that the sequence looks up."""

    def ids(self, table: str) -> Tensor:
        """What the sequence looks up in a table: each id once, in order."""
        ids_U: Tensor = torch.unique(torch.cat([own.ids_U for own in self.looked if own.weight.name == table]))
        return ids_U


class _Outside(TorchFunctionMode):
    """Asks for the tables of lookups and the head, whose parameters in the model are empty."""

    def __init__(
        self,
        lookups: Mapping[int, Weight],
        rows: Callable[[Tensor, Weight], Tensor],
        head: Callable[[Tensor, Weight], tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__()
        self._lookups, self._rows, self._head = lookups, rows, head

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        weight = self._lookups.get(id(args[1])) if func is embedding or func is linear else None
        if weight is None:
            return func(*args, **(kwargs or {}))
        if func is embedding:
            return self._rows(args[0], weight)
        return func(*self._head(args[0], weight), *args[2:], **(kwargs or {}))


class Run:
    """The model, its blocks on the meta device, and the sequence that is in it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        graph: Graph,
        wanted: frozenset[str],
        sums: Sums,
        device: torch.device,
        dtype: torch.dtype,
        logits_bytes: int,
    ) -> None:
        self._checkpoint, self._graph, self._wanted, self._sums = checkpoint, graph, wanted, sums
        self._device, self._dtype = device, dtype
        self._paged = Paged(checkpoint, graph, {}, {}, (), None, dtype, device, False)
        lookups = self._paged.watch.lookups
        self._mode = _Outside(lookups, self._rows, self._head)
        self._step = max(1, logits_bytes // (4 * max(weight.spec.shape[0] for weight in lookups.values())))
        self._units = frozenset(graph.weight(name).unit for name in wanted)
        self._heads: dict[str, Tensor] = {}
        """By stored name, while losses are computed."""
        self._positions = slice(0)
        """Whose logits are computed."""
        self._course: Course | None = None
        self._tables: dict[str, Weight] = {}
        """By the stored names of all copies of a table, the one that is read."""
        pieces = graph.parameters("")
        for name, parameter in self._paged.model.named_parameters(remove_duplicate=False):
            if name in pieces and id(parameter) in lookups:
                self._tables[pieces[name][0].weight.name] = lookups[id(parameter)]
        self._wanted_tables = frozenset(table.name for name, table in self._tables.items() if name in wanted)
        for unit in graph.units:
            self._paged.model.get_submodule(unit).forward = self._forward(unit)
        self._want("", self._paged.model)

    def course(self, number: int, ids_L: Tensor) -> Course:
        batch = MicroBatch((number,), ids_L[None], None)
        return Course(number, batch, Flow(batch, self._paged.run, frozenset()))

    def through(self, courses: Sequence[Course]) -> Iterator[tuple[str, Sequence[str]]]:
        """Forth and back; the wanted weights of a unit as soon as all of these sequences have added to them."""
        try:
            self._forth(courses)
        finally:
            with self._mode:
                for course in courses:
                    course.flow.cancel()
        for course in courses:
            self._lose(course)
        done = self._heads.keys() - {looked.weight.name for course in courses for looked in course.looked}
        self._heads.clear()
        outside = self._names("")
        early = [name for name in outside if name in self._tables and self._tables[name].name in done]
        yield "", early
        for unit in reversed(self._graph.units):
            if any(_leaves(course.crossings[unit].output) for course in courses):
                self._paged.page_in(unit, {})
                self._want(unit, self._paged.model.get_submodule(unit))
                for course in courses:
                    self._back(course, unit)
                self._paged.page_out(unit)
            yield unit, self._names(unit)
        for course in courses:
            self._finish(course)
        yield "", [name for name in outside if name not in early]

    def take(self, names: Sequence[str]) -> dict[str, Gradient]:
        """The sums of wanted weights, which are then forgotten."""
        held = {name: self._tables.get(name, self._graph.weight(name)) for name in names}
        taken = {weight.name: self._sums.take(weight, self._device) for weight in held.values()}
        return {name: taken[weight.name] for name, weight in held.items()}

    def _names(self, unit: str) -> list[str]:
        return [weight.name for weight in self._graph.unit(unit) if weight.name in self._wanted]

    def _want(self, unit: str, module: nn.Module) -> None:
        """Let wanted weights take gradients, which are added to the sums, or outside the blocks to the course."""
        parameters = dict(module.named_parameters())
        for name, pieces in self._graph.parameters(unit).items():
            own = [piece for piece in pieces if piece.weight.name in self._wanted]
            parameter = parameters.get(name)
            if own and parameter is not None and not parameter.is_meta:
                parameter.requires_grad_()
                add = partial(self._add, own) if unit else partial(self._keep, own[0].weight.name)
                parameter.register_post_accumulate_grad_hook(add)  # type: ignore[no-untyped-call]

    def _add(self, pieces: Sequence[Piece], parameter: Tensor) -> None:
        assert parameter.grad is not None
        for piece in pieces:
            self._sums.add(piece.weight, slot(parameter.grad, piece))
        parameter.grad = None

    def _keep(self, name: str, parameter: Tensor) -> None:
        assert self._course is not None
        assert parameter.grad is not None
        known = self._course.outside.get(name)
        self._course.outside[name] = parameter.grad if known is None else known + parameter.grad
        parameter.grad = None

    def _forward(self, unit: str) -> Callable[..., Any]:
        """What takes the place of a block's forward where the model runs."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            course = self._course
            assert course is not None
            if course.again is not None:
                return course.crossings[unit].output
            course.flow.pause(unit, "enter")
            with torch.no_grad():
                output = self._paged.own[unit](*args, **kwargs)
            takes = unit in self._units or bool(_leaves((args, kwargs)))
            output = _mapped(output, lambda t: t.detach().requires_grad_(takes and t.is_floating_point()))
            course.crossings[unit] = _Crossing((args, kwargs), output)
            return output

        return forward

    def _forth(self, courses: Sequence[Course]) -> None:
        """Run all sequences through all blocks."""
        for unit, following in zip(("", *self._graph.units), (*self._graph.units, None), strict=True):
            if unit:
                self._paged.page_in(unit, {})
            place = None if following is None else (following, "enter")
            for course in courses:
                self._course = course
                with torch.enable_grad(), self._mode:
                    reached = course.flow.advance()
                if reached != place:
                    raise AssertionError(f"a flow stopped at {reached} on its way to {place}")
            if unit:
                self._paged.page_out(unit)

    def _lose(self, course: Course) -> None:
        """The loss, by some positions at a time, for each of which the model runs again from the last block on."""
        self._course = course
        ids_L = course.batch.ids_BL[0].to(self._device)
        targets = ids_L if self._graph.family.auto_class == "Seq2SeqLM" else ids_L[1:]
        loss = 0.0
        for start in range(0, len(targets), self._step):
            self._positions = slice(start, min(start + self._step, len(targets)))
            course.again = iter(course.looked)
            with torch.enable_grad():
                with self._mode:
                    logits_CV = self._paged.run(course.batch).logits[0]
                part = cross_entropy(logits_CV.float(), targets[self._positions], reduction="sum") / len(targets)
                loss += float(part.detach())
                if not math.isfinite(loss):
                    raise CheckpointError(
                        f"the loss of calibration sequence {course.number} is {loss}; the source is damaged"
                    )
                if part.requires_grad:
                    _backward([(part, torch.ones_like(part))])
        for name, head_VD in self._heads.items():
            if head_VD.grad is not None:
                if any(looked.weight.name == name for looked in course.looked):
                    ids_U = course.ids(name)
                    course.rows_UD[name] = head_VD.grad[ids_U]
                    head_VD.grad[ids_U] = 0
                self._sums.add(self._graph.weight(name), head_VD.grad)
                head_VD.grad = None

    def _back(self, course: Course, unit: str) -> None:
        """Gradients from what a block gave to its weights and to what came to it, and on from there."""
        self._course = course
        crossing = course.crossings.pop(unit)
        leaves: list[Tensor] = []

        def leaf(given: Tensor) -> Tensor:
            if not given.requires_grad:
                return given
            leaves.append(given.detach().requires_grad_())
            return leaves[-1]

        args, kwargs = _mapped(crossing.inputs, leaf)
        with torch.enable_grad():
            output = self._paged.own[unit](*args, **kwargs)
        ends = zip(_tensors(output), _tensors(crossing.output), strict=True)
        _backward([(end, before.grad) for end, before in ends if end.requires_grad])
        before = zip(_leaves(crossing.inputs), leaves, strict=True)
        # What lies between blocks may lead from several of them to the same place.
        _backward([(given, leaf.grad) for given, leaf in before], again=True)

    def _finish(self, course: Course) -> None:
        """Add what lies outside the blocks, whose gradients are complete when a sequence is through all of them."""
        for name, gradient in course.outside.items():
            self._sums.add(self._graph.weight(name), gradient)
        for name in {looked.weight.name for looked in course.looked} & self._wanted_tables:
            table, ids_U = self._graph.weight(name), course.ids(name)
            total_UD = course.rows_UD.get(name)
            if total_UD is None:
                total_UD = torch.zeros(len(ids_U), table.columns, dtype=self._dtype, device=self._device)
            for looked in course.looked:
                if looked.weight.name == name and looked.rows_UD.grad is not None:
                    total_UD[torch.searchsorted(ids_U, looked.ids_U)] += looked.rows_UD.grad
            self._sums.add(table, total_UD, ids_U)

    def _rows(self, ids: Tensor, weight: Weight) -> Tensor:
        """Rows of a table for ids."""
        course = self._course
        assert course is not None
        if course.again is not None:
            looked = next(course.again)
        else:
            ids_U, inverse = torch.unique(ids, return_inverse=True)
            rows_UD = self._checkpoint.rows(weight.name, ids_U.cpu()).to(device=self._device, dtype=self._dtype)
            rows_UD.requires_grad_(weight.name in self._wanted_tables)
            looked = _Looked(weight, ids_U, rows_UD, inverse)
            course.looked.append(looked)
        return looked.rows_UD[looked.inverse]

    def _head(self, hidden_BLD: Tensor, weight: Weight) -> tuple[Tensor, Tensor]:
        """What the head multiplies, and the head."""
        assert self._course is not None
        if self._course.again is None:
            raise CancelledError
        if weight.name not in self._heads:
            # Piece by piece: it may be larger than a block, and would be there twice.
            head_VD = torch.empty(weight.spec.shape, dtype=self._dtype, device=self._device)
            start = 0
            for piece in self._checkpoint.pieces(weight.name):
                head_VD.view(-1)[start : start + len(piece)] = piece
                start += len(piece)
            self._heads[weight.name] = head_VD.requires_grad_(weight.name in self._wanted_tables)
        return hidden_BLD[:, self._positions], self._heads[weight.name]


def _backward(ends: Sequence[tuple[Tensor, Tensor | None]], again: bool = False) -> None:
    """From these ends with these gradients, as far as there are any; again: the same may be asked once more."""
    known = [(end, gradient) for end, gradient in ends if gradient is not None]
    if known:
        tensors, gradients = zip(*known, strict=True)
        torch.autograd.backward(tensors, gradients, retain_graph=again)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Arguments or results with other tensors in them."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(v, change) for v in value)
    if isinstance(value, dict):
        return {k: _mapped(v, change) for k, v in value.items()}
    return value


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _mapped(value, lambda t: found.append(t) or t)  # type: ignore[func-returns-value]
    return found


def _leaves(value: Any) -> list[Tensor]:
    """The tensors in it that take gradients."""
    return [t for t in _tensors(value) if t.requires_grad]
