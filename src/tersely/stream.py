"""The paged forward: a whole model runs with the weights of one block in memory at a time.

The model is transformers' own, built on the meta device. Every micro-batch runs through its forward once, as a
*flow*: a greenlet, which runs when it is told to and pauses at the entrance of each block, inside it where a
statistic is complete, and at its exit. So all flows stand at the same place, the block's weights are read from
the checkpoint, statistics are gathered, weights are replaced by their compressed form, and the next block sees
what the compressed one gives. There is no copy of any model's forward here, no tracing, and no knowledge of a
family but what its table says.

What multiplies an activation is recognised by the address of its weight, so that linear layers, GPT-2's Conv1D and
single experts inside a stacked parameter are one case.

Two ways through a block, bit-equal in their results:
- suspended: flows wait inside the block with their intermediate activations; the block runs once;
- repeated: flows run from the block's entrance up to each statistic; only the block's input is held.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import greenlet
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import embedding, linear
from torch.overrides import TorchFunctionMode

from tersely.calibrate import MicroBatch
from tersely.checkpoint import Checkpoint
from tersely.errors import CheckpointError
from tersely.graph import Graph, Weight, filled
from tersely.measure import Statistics

_TRIM_BYTES = 32 << 20
SURVEY = "survey"
"""The stage before all others, where what was asked of a whole block is known and nothing in it has changed."""

TUNE = "tune"
"""The stage after all others, where a block has run as it is encoded and may yet be tuned."""

Measured = Mapping[str, frozenset[str]]
"""Stage -> what is gathered of its activations (MEASURES)."""


@dataclass(frozen=True)
class Stop:
    """A place where every flow stands: before a stage whose statistics are complete, or (stage None) behind a block."""

    unit: str
    stage: str | None
    statistics: Mapping[str, Statistics]
    """By the name of the activations (Weight.statistics)."""
    replace: Callable[[Weight, Value], None]
    """Put another tensor into the running model."""
    recorded: Recorded | None = None
    """At the stage TUNE."""


@dataclass(frozen=True)
class Recorded:
    """What a block got, what it gave before anything in it was encoded, and how to ask what it would give."""

    inputs: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]
    """Positional and named arguments of its forward, one micro-batch each."""
    targets: Sequence[Tensor]
    forward: Callable[[Mapping[str, Tensor], tuple[tuple[Any, ...], Mapping[str, Any]]], Tensor]
    """Its output with other weights: by stored name, (outputs, inputs), of any float dtype; gradients flow to them."""


@dataclass(frozen=True)
class Value:
    """A tensor as it runs; linear weights as (outputs, inputs)."""

    tensor: Tensor
    rounded: Callable[[Tensor], Tensor] | None = None
    """What its inputs, (..., I), are rounded to."""
    full: Tensor | None = None
    """A share of it that meets the inputs before they are rounded."""


class _CancelledError(BaseException):
    """Unwinds a flow that is no longer needed."""


class _SeenError(BaseException):
    """Unwinds a block's forward once the statistics of a stage are complete."""


class _Flow:
    """One micro-batch on its way through the model.

    A greenlet and not a thread: all flows share the one team of OpenMP threads and the one heap, where threads would
    each have their own, which made small jobs up to three times slower.
    """

    def __init__(self, batch: MicroBatch, run: Callable[[MicroBatch], Any]) -> None:
        self.batch = batch
        self.result: Any = None
        self.watched: _Watched | None = None
        self.arguments: tuple[tuple[Any, ...], Mapping[str, Any]] = ((), {})
        self.target: Tensor | None = None
        self._run = run
        self._greenlet = greenlet(self._main)

    def advance(self) -> tuple[str, str] | None:
        """Run to the next pause and return where that is; None when the forward has ended."""
        place: tuple[str, str] | None = self._greenlet.switch()
        return place

    def pause(self, unit: str, place: str) -> None:
        """Called inside the flow: wait until it is told to go on."""
        parent = self._greenlet.parent
        assert parent is not None
        parent.switch((unit, place))

    def cancel(self) -> None:
        if not self._greenlet.dead:
            self._greenlet.throw(_CancelledError)

    def _main(self) -> None:
        with suppress(_CancelledError):
            self.result = self._run(self.batch)


@dataclass
class _Watched:
    """What is gathered in a block: the inputs of the weights of these stages.

    With `awaited` the forward ends when all of these statistics have been seen; without, the flow pauses before the
    first weight of each stage, unless it is told not to.
    """

    unit: str
    stages: frozenset[str]
    awaited: frozenset[str] | None = None
    pauses: bool = True
    """Whether the flow waits at each stage."""
    seen: set[str] = field(default_factory=set)


def stream(
    checkpoint: Checkpoint,
    graph: Graph,
    batches: Sequence[MicroBatch],
    *,
    measured: Mapping[str, Measured],
    replaced: Callable[[str], Mapping[str, Value]],
    dtype: torch.dtype,
    device: torch.device,
    suspend: bool,
    surveyed: Mapping[str, Measured] | None = None,
    transformed: Callable[[Weight, Tensor], Tensor] | None = None,
    recorded: Collection[str] = (),
    logits: list[Tensor] | None = None,
) -> Iterator[Stop]:
    """Run all micro-batches through the model, block by block.

    `measured`: unit -> stages before which to stop with complete statistics, and what they are ("" -> "head_in" for
    the head). `surveyed`: the same of blocks that run once beforehand, with nothing in them changed; then there is one
    stop at the stage SURVEY. `recorded`: of these, which may be tuned when all their weights are replaced: a stop at
    the stage TUNE, with what went in and came out. `transformed`: what the inputs of a weight always go through;
    statistics are of what has gone through it. `replaced`: called when a block is paged in: stored name -> what to use
    instead of the stored tensor. `suspend`: wait inside the blocks (not with experts, whose statistics are complete
    only at the end of a block), or repeat them. `logits`: a list that receives the logits of each micro-batch; without
    it the run ends behind the last block (or the head's statistics).

    Yields a Stop before each measured stage and behind each block. CheckpointError where the model has a
    parameter that the checkpoint does not give.
    """
    paged = _Paged(checkpoint, graph, measured, surveyed or {}, recorded, transformed, dtype, device, suspend)
    flows = [_Flow(batch, paged.run) for batch in batches]
    try:
        for unit in graph.units:
            paged.meet(flows, unit, "enter")
            paged.page_in(unit, replaced(unit))
            if unit in paged.surveyed:
                paged.meet(flows, unit, SURVEY)
                yield Stop(unit, SURVEY, paged.take(), paged.replace)
            for stage in measured.get(unit, ()):
                paged.meet(flows, unit, stage)
                yield Stop(unit, stage, paged.take(), paged.replace)
            if unit in recorded:
                paged.meet(flows, unit, TUNE)
                yield Stop(unit, TUNE, {}, paged.replace, paged.record(unit, flows))
            paged.meet(flows, unit, "exit")
            yield Stop(unit, None, {}, paged.replace)
            paged.page_out(unit)
        for stage in measured.get("", ()):
            paged.meet(flows, "", stage)
            yield Stop("", stage, paged.take(), paged.replace)
        if logits is not None:
            paged.with_head = True
            for flow in flows:
                paged.advance(flow)
                logits.append(flow.result.logits)
                flow.result = None
    finally:
        with paged.watch:
            for flow in flows:
                flow.cancel()


class _Paged:
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
        self.recorded, self.transformed = recorded, transformed
        self.values: dict[str, Value] = {}
        """Stored name of a weight that has been replaced -> its value, if its inputs are rounded."""
        self.dtype, self.device, self.suspend = dtype, device, suspend
        self.model = build(checkpoint, graph, dtype, device)
        self.flow: _Flow | None = None
        self.watch = _Watch(self)
        self.with_head = False
        self.sites: dict[int, tuple[Weight, ...]] = {}
        """Address of a weight in memory -> the stored weights that lie there."""
        self.places: dict[str, tuple[Tensor, int | None, int]] = {}
        self.statistics: dict[str, Statistics] = {}
        self.block_bytes = max(sum(w.spec.nbytes for w in graph.unit(unit)) for unit in graph.units)
        self.lookups: dict[int, Weight] = {}
        self._load_outside()
        for unit in graph.units:
            block = self.model.get_submodule(unit)
            block.forward = self._forward(unit, block)

    def run(self, batch: MicroBatch) -> Any:
        ids = batch.ids_BL.to(self.device)
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if self.graph.family.auto_class == "Seq2SeqLM":
            start = self.model.config.decoder_start_token_id
            inputs["decoder_input_ids"] = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)
        return self.model(**inputs)

    def advance(self, flow: _Flow) -> tuple[str, str] | None:
        """Let one flow run to its next pause, watched; nothing outside it is."""
        self.flow = flow
        try:
            with torch.no_grad(), self.watch:
                return flow.advance()
        finally:
            self.flow = None

    def meet(self, flows: Sequence[_Flow], unit: str, place: str) -> None:
        """Bring every flow to one place."""
        for flow in flows:
            reached = self.advance(flow)
            if reached != (unit, place):
                raise AssertionError(f"a flow stopped at {reached} on its way to {(unit, place)}")

    def record(self, unit: str, flows: Sequence[_Flow]) -> Recorded:
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
        taken, self.statistics = self.statistics, {}
        self._trim()
        return {name: statistics.finish() for name, statistics in taken.items()}

    def page_in(self, unit: str, replaced: Mapping[str, Value]) -> None:
        block = self.model.get_submodule(unit)
        pieces = self.graph.parameters(unit)
        parameters = dict(block.named_parameters())
        for name in dict(block.named_buffers()):
            if name in pieces:
                stored = self.checkpoint[pieces[name][0].weight.name]
                _set(block, name, stored.to(device=self.device, dtype=self._dtype_of(name)))
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
            _set(block, name, nn.Parameter(value, requires_grad=False))
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
                    self.sites[key] = (*self.sites.get(key, ()), piece.weight)

    def _dtype_of(self, name: str) -> torch.dtype:
        """Transformers keeps some weights of some models in float32."""
        plan: Mapping[str, torch.dtype] = self.model._get_dtype_plan(self.dtype)
        return next((dtype for part, dtype in plan.items() if f".{part}." in f".{name}."), self.dtype)

    def page_out(self, unit: str) -> None:
        block = self.model.get_submodule(unit)
        self.sites.clear()
        self.places.clear()
        self.values.clear()
        for name, parameter in dict(block.named_parameters()).items():
            _set(block, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
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
        if value.rounded is not None:
            self.values[weight.name] = value

    def observe(self, weights: Sequence[Weight], x: Tensor, needs: frozenset[str]) -> None:
        """Add the input of a weight to the statistics of its activations; padded positions are left out."""
        assert self.flow is not None
        keep = self.flow.batch.keep_BL
        tokens = x.reshape(-1, x.shape[-1])
        if keep is not None:
            if tokens.shape[0] != keep.numel():
                raise AssertionError(f"{weights[0].name} sees {tokens.shape[0]} of {keep.numel()} padded positions")
            tokens = tokens[keep.reshape(-1).to(tokens.device)]
        name = weights[0].statistics
        if name not in self.statistics:
            self.statistics[name] = Statistics(weights[0].columns, self.device, needs)
        self.statistics[name].add(tokens)

    def lookup(self, ids: Tensor, weight: Weight) -> Tensor:
        unique, inverse = torch.unique(ids, return_inverse=True)
        rows = self.checkpoint.rows(weight.name, unique.cpu())
        return rows.to(device=self.device, dtype=self.dtype)[inverse]

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
                self.lookups[id(parameter)] = weight
            else:
                value = self.checkpoint[weight.name].to(device=self.device, dtype=self.dtype)
                if value.shape != parameter.shape:
                    raise CheckpointError(
                        f"{self.checkpoint.path}: {weight.name} has shape {list(value.shape)}, but the model "
                        f"built from config.json expects {list(parameter.shape)}"
                    )
                loaded[id(parameter)] = nn.Parameter(value, requires_grad=False)
                _set(self.model, name, loaded[id(parameter)])
        for name, parameter in outside:
            if name not in pieces and id(parameter) not in self.lookups and parameter.is_meta:
                if id(parameter) in loaded:
                    _set(self.model, name, loaded[id(parameter)])
                else:
                    raise CheckpointError(
                        f"{self.checkpoint.path}: the model has a parameter {name}, but the checkpoint has no "
                        "tensor for it"
                    )

    def _forward(self, unit: str, block: nn.Module) -> Callable[..., Any]:
        own = block.forward
        stages = tuple(self.measured.get(unit, ()))

        def forward(*args: Any, **kwargs: Any) -> Any:
            flow = self.flow
            if flow is None:  # the block is asked, not the model
                return own(*args, **kwargs)
            flow.pause(unit, "enter")
            if unit in self.surveyed:
                flow.watched = _Watched(unit, frozenset(self.surveyed[unit]), pauses=False)
                before = own(*args, **kwargs)
                flow.watched = None
                if unit in self.recorded:
                    flow.arguments, flow.target = (args, kwargs), _hidden(before)
                flow.pause(unit, SURVEY)
            if self.suspend:
                flow.watched = _Watched(unit, frozenset(stages))
                output = own(*args, **kwargs)
                flow.watched = None
            else:
                for stage in stages:
                    flow.watched = _Watched(unit, frozenset({stage}), self._awaited(unit, stage))
                    with suppress(_SeenError):
                        own(*args, **kwargs)
                    flow.watched = None
                    flow.pause(unit, stage)
                output = own(*args, **kwargs)
            if unit in self.recorded:
                flow.pause(unit, TUNE)
                output = own(*args, **kwargs)
                flow.arguments, flow.target = ((), {}), None
            flow.pause(unit, "exit")
            return output

        return forward

    def _awaited(self, unit: str, stage: str) -> frozenset[str]:
        return frozenset(w.statistics for w in self.graph.unit(unit) if w.kind == "linear" and w.stage == stage)


class _Watch(TorchFunctionMode):
    """Serves lookups from the checkpoint, gathers what weights of a block multiply, and stops a flow at the head."""

    def __init__(self, paged: _Paged) -> None:
        super().__init__()
        self.paged = paged

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is embedding and (weight := self.paged.lookups.get(id(args[1]))) is not None:
            return self.paged.lookup(args[0], weight)
        if func is linear:
            if (weight := self.paged.lookups.get(id(args[1]))) is not None:
                return func(args[0], self._head(args[0], weight), *args[2:], **kwargs)
            x, rest = self._met(args[1], args[0])
            return rest(func(x, *args[1:], **kwargs))
        if func is torch.addmm:
            x, rest = self._met(args[2], args[1])
            return rest(func(args[0], x, *args[2:], **kwargs))
        return func(*args, **kwargs)

    def _head(self, x: Tensor, weight: Weight) -> Tensor:
        for stage, needs in self.paged.measured.get("", {}).items():
            self.paged.observe((weight,), x, needs)
            self._pause("", stage)
        if not self.paged.with_head:
            raise _CancelledError
        return self.paged.checkpoint[weight.name].to(device=self.paged.device, dtype=self.paged.dtype)

    def _met(self, parameter: Tensor, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """What a weight multiplies, given what comes to it, and what is then done with the product; seen on the way."""
        weights = self.paged.sites.get(parameter.data_ptr())
        if weights is None:
            return x, _as_it_is
        if self.paged.transformed is not None:
            x = self.paged.transformed(weights[0], x)
        self._see(weights, x)
        # After the pause: the weight may have been replaced in it.
        values = [self.paged.values.get(weight.name) for weight in weights]
        if (first := values[0]) is None or first.rounded is None:
            return x, _as_it_is
        rounded = first.rounded(x)
        if all(value is None or value.full is None for value in values):
            return rounded, _as_it_is
        full_OI = torch.cat(
            [
                x.new_zeros(weight.rows, weight.columns)
                if value is None or value.full is None
                else value.full.to(x.dtype)
                for weight, value in zip(weights, values, strict=True)
            ]
        )
        return rounded, lambda y: y + (x - rounded) @ full_OI.t()

    def _see(self, weights: Sequence[Weight], x: Tensor) -> None:
        flow = self.paged.flow
        watched = flow.watched if flow is not None else None
        if watched is None or weights[0].stage not in watched.stages or weights[0].statistics in watched.seen:
            return
        watched.seen.add(weights[0].statistics)
        measured = self.paged.measured if watched.pauses else self.paged.surveyed
        self.paged.observe(weights, x, measured[watched.unit][weights[0].stage])
        if watched.awaited is None and watched.pauses:
            self._pause(watched.unit, weights[0].stage)
        elif watched.awaited is not None and watched.awaited <= watched.seen:
            raise _SeenError

    def _pause(self, unit: str, place: str) -> None:
        # Inside a mode's own function PyTorch has put the mode aside, for the whole thread; others must find it.
        with self:
            assert self.paged.flow is not None
            self.paged.flow.pause(unit, place)


def _hidden(output: Any) -> Tensor:
    """The hidden states of what a block gives."""
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden


def _as_it_is(y: Tensor) -> Tensor:
    return y


def build(checkpoint: Checkpoint, graph: Graph, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' own model of the checkpoint: parameters on the meta device, buffers real."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    auto = getattr(transformers, f"AutoModelFor{graph.family.auto_class}")
    with torch.device("meta"):
        # Experts one by one: the stacked forms hide which tokens each of them sees.
        experts = {"experts_implementation": "eager"} if graph.has_experts else {}
        model = auto.from_config(config, dtype=dtype, **experts)
    model.eval()
    model.tie_weights()
    for name, module in model.named_modules():
        own = {n: b for n, b in module._buffers.items() if b is not None and b.is_meta}
        for n, b in own.items():
            fill = torch.nan if b.is_floating_point() else torch.iinfo(b.dtype).min if b.dtype != torch.bool else False
            module._buffers[n] = torch.full(b.shape, fill, dtype=b.dtype, device=device)
        if own:
            with torch.no_grad():
                model._init_weights(module)
        for n in own:
            value = module._buffers[n]
            if value is not None and value.is_floating_point() and value.isnan().any():
                raise CheckpointError(f"{checkpoint.path}: transformers does not say how to fill the buffer {name}.{n}")
    return model


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if isinstance(value, nn.Parameter):
        owner._parameters[leaf] = value
    else:
        owner._buffers[leaf] = value
