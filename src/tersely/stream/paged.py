"""The model with its blocks on the meta device, of which one at a time is filled from the checkpoint."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tersely.calibrate import MicroBatch
from tersely.checkpoint import Checkpoint
from tersely.errors import CheckpointError
from tersely.graph import Graph, Weight, filled
from tersely.measure import Statistics
from tersely.stream.flow import Flow, SeenError, Watched
from tersely.stream.model import build, put
from tersely.stream.stops import SURVEY, TUNE, Measured, Recorded, Value
from tersely.stream.watch import Watch

PARENT = "parent"
"""The place in a block where it has run as it lies in the checkpoint."""
_TRIM_BYTES = 32 << 20


class Paged:
    """The model with its blocks on the meta device, and what is known of the block that is paged in."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        graph: Graph,
        measured: Mapping[str, Measured],
        surveyed: Mapping[str, Measured],
        recorded: Collection[str],
        transformed: Callable[[Weight, Tensor], Tensor] | None,
        dtype: torch.dtype,
        device: torch.device,
        suspend: bool,
    ) -> None:
        self.checkpoint, self.graph, self.measured, self.surveyed = checkpoint, graph, measured, surveyed
        self.recorded = recorded
        last = max((graph.units.index(unit) for unit in recorded), default=-1)
        self.followed = frozenset(graph.units[: last + 1])
        """Blocks that also run as they lie in the checkpoint, for what the recorded ones should give."""
        self.dtype, self.device, self.suspend = dtype, device, suspend
        self.model = build(checkpoint, graph, dtype, device)
        self.watch = Watch(checkpoint, measured, surveyed, transformed, dtype, device)
        self.places: dict[str, tuple[Tensor, int | None, int]] = {}
        self.block_bytes = max(sum(w.spec.nbytes for w in graph.unit(unit)) for unit in graph.units)
        self._load_outside()
        self.own: dict[str, Callable[..., Any]] = {}
        """What blocks do by themselves."""
        for unit in graph.units:
            block = self.model.get_submodule(unit)
            self.own[unit] = block.forward
            block.forward = self._forward(unit, block)

    def run(self, batch: MicroBatch) -> Any:
        ids = batch.ids_BL.to(self.device)
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if self.graph.family.auto_class == "Seq2SeqLM":
            start = self.model.config.decoder_start_token_id
            inputs["decoder_input_ids"] = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)
        return self.model(**inputs)

    def advance(self, flow: Flow) -> tuple[str, str] | None:
        """Let one flow run to its next pause, watched; nothing outside it is."""
        self.watch.flow = flow
        try:
            with torch.no_grad(), self.watch:
                return flow.advance()
        finally:
            self.watch.flow = None

    def meet(self, flows: Sequence[Flow], unit: str, place: str) -> None:
        """Bring every flow to one place."""
        for flow in flows:
            reached = self.advance(flow)
            if reached != (unit, place):
                raise AssertionError(f"a flow stopped at {reached} on its way to {(unit, place)}")

    def record(self, unit: str, flows: Sequence[Flow]) -> Recorded:
        block, parameters = self.model.get_submodule(unit), self.graph.parameters(unit)

        def forward(values: Mapping[str, Tensor], arguments: tuple[tuple[Any, ...], Mapping[str, Any]]) -> Tensor:
            own = {
                name: filled(block.get_parameter(name), pieces, values)
                for name, pieces in parameters.items()
                if any(piece.weight.name in values for piece in pieces)
            }
            return _hidden(functional_call(block, own, arguments[0], dict(arguments[1])))

        targets = [flow.target for flow in flows if flow.target is not None]
        return Recorded([flow.arguments for flow in flows], targets, forward)

    def take(self) -> Mapping[str, Statistics]:
        taken, self.watch.statistics = self.watch.statistics, {}
        self._trim()
        return {name: statistics.finish() for name, statistics in taken.items()}

    def page_in(self, unit: str, replaced: Mapping[str, Value]) -> None:
        block = self.model.get_submodule(unit)
        pieces = self.graph.parameters(unit)
        parameters = dict(block.named_parameters())
        for name in dict(block.named_buffers()):
            if name in pieces:
                stored = self.checkpoint[pieces[name][0].weight.name]
                put(block, name, stored.to(device=self.device, dtype=self._dtype_of(name)))
        for name in pieces:
            if name not in parameters and name not in dict(block.named_buffers()):
                raise CheckpointError(
                    f"{self.checkpoint.path}: {pieces[name][0].weight.name} has no place in the model that "
                    f"transformers builds: it has no {unit}.{name}"
                )
        for name, meta in parameters.items():
            if name not in pieces:
                raise CheckpointError(
                    f"{self.checkpoint.path}: the model has a parameter {unit}.{name}, but the checkpoint "
                    "has no tensor for it"
                )
            value = torch.empty(meta.shape, dtype=self._dtype_of(name), device=self.device)
            put(block, name, nn.Parameter(value, requires_grad=False))
            for piece in pieces[name]:
                slot = value if piece.index is None else value[piece.index]
                target = slot if slot.ndim == 0 else slot[piece.start : piece.start + piece.rows]
                other = replaced.get(piece.weight.name)
                if other is None:
                    source = self.checkpoint[piece.weight.name]
                else:
                    source = other.tensor.t() if piece.weight.transposed else other.tensor
                    self._keep(piece.weight, other)
                if target.shape != source.shape:
                    raise CheckpointError(
                        f"{self.checkpoint.path}: {piece.weight.name} has shape {list(source.shape)}, but "
                        f"the model built from config.json expects {list(target.shape)}"
                    )
                target.copy_(source)
                self.places[piece.weight.name] = (block.get_parameter(name), piece.index, piece.start)
                if piece.weight.kind == "linear":
                    key = slot.data_ptr()
                    self.watch.sites[key] = (*self.watch.sites.get(key, ()), piece.weight)

    def _dtype_of(self, name: str) -> torch.dtype:
        """Transformers keeps some weights of some models in float32."""
        plan: Mapping[str, torch.dtype] = self.model._get_dtype_plan(self.dtype)
        return next((dtype for part, dtype in plan.items() if f".{part}." in f".{name}."), self.dtype)

    def page_out(self, unit: str) -> None:
        block = self.model.get_submodule(unit)
        self.watch.sites.clear()
        self.places.clear()
        self.watch.values.clear()
        for name, parameter in dict(block.named_parameters()).items():
            put(block, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
        self._trim()

    def replace(self, weight: Weight, value: Value) -> None:
        if weight.name not in self.places:
            return
        parameter, index, start = self.places[weight.name]
        stored = value.tensor.t() if weight.transposed else value.tensor
        slot = parameter.data if index is None else parameter.data[index]
        target = slot if slot.ndim == 0 else slot[start : start + stored.shape[0]]
        target.copy_(stored)
        self._keep(weight, value)

    def _keep(self, weight: Weight, value: Value) -> None:
        if value.rounded is not None or value.factors is not None:
            self.watch.values[weight.name] = value

    def _trim(self) -> None:
        """Give freed pages back: glibc keeps them between blocks otherwise.

        They have to be faulted in again, which small models, that do not need it, would feel.
        """
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None and self.block_bytes >= _TRIM_BYTES:
            trim(0)

    def _load_outside(self) -> None:
        pieces = self.graph.parameters("")
        blocks = tuple(f"{unit}." for unit in self.graph.units)
        outside = [(n, p) for n, p in self.model.named_parameters(remove_duplicate=False) if not n.startswith(blocks)]
        loaded: dict[int, nn.Parameter] = {}
        for name, parameter in outside:
            if name not in pieces:
                continue
            weight = pieces[name][0].weight
            if weight.kind == "lookup" or weight == self.graph.head:
                self.watch.lookups[id(parameter)] = weight
            else:
                value = self.checkpoint[weight.name].to(device=self.device, dtype=self.dtype)
                if value.shape != parameter.shape:
                    raise CheckpointError(
                        f"{self.checkpoint.path}: {weight.name} has shape {list(value.shape)}, but the model "
                        f"built from config.json expects {list(parameter.shape)}"
                    )
                loaded[id(parameter)] = nn.Parameter(value, requires_grad=False)
                put(self.model, name, loaded[id(parameter)])
        for name, parameter in outside:
            if name not in pieces and id(parameter) not in self.watch.lookups and parameter.is_meta:
                if id(parameter) in loaded:
                    put(self.model, name, loaded[id(parameter)])
                else:
                    raise CheckpointError(
                        f"{self.checkpoint.path}: the model has a parameter {name}, but the checkpoint has no "
                        "tensor for it"
                    )

    def _forward(self, unit: str, block: nn.Module) -> Callable[..., Any]:
        own = block.forward
        stages = tuple(self.measured.get(unit, ()))

        def forward(*args: Any, **kwargs: Any) -> Any:
            flow = self.watch.flow
            if flow is None:  # the block is asked, not the model
                return own(*args, **kwargs)
            flow.pause(unit, "enter")
            if unit in flow.skipped:
                flow.pause(unit, "exit")
                return _given(args, kwargs)
            if unit in self.followed:
                flow.target = self._of_parent(flow, own, args, kwargs)
                flow.pause(unit, PARENT)
            if unit in self.surveyed:
                flow.watched = Watched(unit, frozenset(self.surveyed[unit]), pauses=False)
                own(*args, **kwargs)
                flow.watched = None
                flow.pause(unit, SURVEY)
            if self.suspend:
                flow.watched = Watched(unit, frozenset(stages))
                output = own(*args, **kwargs)
                flow.watched = None
            else:
                for stage in stages:
                    flow.watched = Watched(unit, frozenset({stage}), self._awaited(unit, stage))
                    with suppress(SeenError):
                        own(*args, **kwargs)
                    flow.watched = None
                    flow.pause(unit, stage)
                output = own(*args, **kwargs)
            if unit in self.recorded:
                flow.arguments = (args, kwargs)
                flow.pause(unit, TUNE)
                output = own(*args, **kwargs)
                flow.arguments = ((), {})
            if unit in self.followed:
                flow.here, flow.parent, flow.target = _hidden(output), flow.target, None
            flow.passed = _given(args, kwargs), _hidden(output)
            flow.pause(unit, "exit")
            return output

        return forward

    def _of_parent(
        self, flow: Flow, own: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Tensor:
        """What the block gives in the model as it lies in the checkpoint. What comes to a stack's first is the same."""
        known = {id(flow.here): flow.parent}
        self.watch.plain = True
        try:
            output = own(*(known.get(id(a), a) for a in args), **{n: known.get(id(a), a) for n, a in kwargs.items()})
        finally:
            self.watch.plain = False
        return _hidden(output)

    def _awaited(self, unit: str, stage: str) -> frozenset[str]:
        return frozenset(w.statistics for w in self.graph.unit(unit) if w.kind == "linear" and w.stage == stage)


def _given(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states that come to a block."""
    hidden = args[0] if args else kwargs["hidden_states"]
    assert isinstance(hidden, Tensor)
    return hidden


def _hidden(output: Any) -> Tensor:
    """The hidden states of what a block gives."""
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden
