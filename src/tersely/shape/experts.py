"""A model without experts becomes a mixture: the engine's side of the methods that split MLPs.

What is written is an ordinary checkpoint of a stock family. The calibration text runs through the source once, for
what the neurons of every block do on each text, and once through the mixture, whose blocks are made as it reaches them:
each sees what the ones before it give.

Shapes: T tokens, I inputs of an MLP, N its neurons, E experts, K neurons of an expert, S texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tersely.checkpoint import Checkpoint, TensorSpec
from tersely.errors import UsageError
from tersely.families import Axis, Row, mixtures, rows_of
from tersely.graph import Graph, Weight, read_graph
from tersely.methods.split import Block, Split
from tersely.rewriting import stored_in, units_of
from tersely.shape.setup import Setup, Written
from tersely.stream import Value, stream
from tersely.writer import Writer

_DENSE, _EXPERT, _ROUTER = "mlp", "expert", "router"
"""Spaces: of the neurons of a dense block, of those of an expert, of what a router gives."""
_DOMAINS = "domains"
_CHUNK = 4096


def planned(checkpoint: Checkpoint, graph: Graph, method: Split) -> Checkpoint:
    """The headers of the mixture that a model becomes: its experts and routers are stored nowhere yet.

    UsageError for a model that has experts, that no stock mixture holds, or of which no neuron would be left.
    """
    name = method.name
    if graph.has_experts:
        raise UsageError(f"{name}: a {graph.model_type} model has experts already; it splits models without")
    if graph.model_type not in (known := mixtures()):
        raise UsageError(
            f"{name}: no stock mixture has the blocks of a {graph.model_type} model; those of "
            f"{', '.join(sorted(known))} can be split"
        )
    mixture, dense = known[graph.model_type]
    for key, value in dense.requires.items():
        if (found := checkpoint.config.get(key, value)) != value:
            raise UsageError(f"{name}: {mixture} models have no {key} = {found}; only models with {value} can be split")
    width = method.width(graph.sizes[_DENSE])
    config = _config(checkpoint.config, mixture, dense.config, (method.experts, method.top_k, width))
    specs: dict[str, TensorSpec] = {}
    for stored in checkpoint:
        weight = None if stored in graph.extra else graph.weight(stored)
        if weight is None or _DENSE not in (*weight.reads.spaces, *weight.writes.spaces):
            specs[stored] = checkpoint.spec(stored)
            continue
        rows = _rows(mixture, weight)
        for expert in range(method.experts):
            path = rows[0].path.replace("{e}", str(expert))
            shape = (weight.rows, width) if _DENSE in weight.reads.spaces else (width, weight.columns)
            _add(specs, weight, path, shape)
        if _DENSE in weight.reads.spaces:
            _add(specs, weight, rows[1].path, (method.experts, graph.sizes["residual"]))
    return checkpoint.with_headers(config, specs)


def split(checkpoint: Checkpoint, graph: Graph, method: Split, writer: Writer, setup: Setup) -> Written:
    """Write the units of the mixture, block by block.

    Raises the errors of `planned` and of the writer, and UsageError for texts that are too few.
    """
    source = _Source(checkpoint, graph, setup)
    mixture = planned(checkpoint, graph, method)
    target = read_graph(mixture)
    files = units_of(target)
    for file, weights in files.items():
        if not weights[0].unit and not writer.done(file):
            writer.put(file, stored_in(checkpoint, {w.name: w.name for w in weights}), {})
    blocks = {weights[0].unit: file for file, weights in files.items() if weights[0].unit}
    if not all(map(writer.done, files)):
        if method.by_text and not writer.done(_DOMAINS):
            writer.put(_DOMAINS, _domains(source, method), {})
        for unit, tensors, shares in _made(source, mixture, target, method, writer, blocks):
            writer.put(blocks[unit], tensors, {"shares": shares})
    shares = [share for file in blocks.values() for share in writer.facts(file)["shares"]]
    told = f"each expert has {min(shares):.1%} to {max(shares):.1%} of its block's tokens"
    return Written(list(files), dict(mixture.config), {}, [told])


@dataclass(frozen=True)
class _Source:
    """The model that is split, and the text that runs through it."""

    checkpoint: Checkpoint
    graph: Graph
    setup: Setup

    def stage(self, unit: str) -> str:
        """Where a block's MLP begins."""
        return next(w.stage for w in self.graph.unit(unit) if _DENSE in w.writes.spaces)

    def value(self, weight: Weight) -> Tensor:
        """A linear weight, (outputs, inputs), float32."""
        stored = self.checkpoint[weight.name].to(self.setup.device).float()
        return stored.t() if weight.transposed else stored

    def down(self, unit: str) -> Tensor:
        """The last weight of a block's MLP."""
        return self.value(next(w for w in self.graph.unit(unit) if _DENSE in w.reads.spaces))

    def neurons(self, unit: str) -> Callable[[Tensor], Tensor]:
        """What the neurons of a block give for inputs of its MLP: the product of what writes their space."""
        from transformers.activations import ACT2FN

        act = ACT2FN[_complete(self.checkpoint.config)["hidden_act"]]
        own = [(self.value(w), w.writes.parts[0].act) for w in self.graph.unit(unit) if _DENSE in w.writes.spaces]

        def activations(x_TI: Tensor) -> Tensor:
            x = x_TI.float()
            given = [act(x @ weight_NI.t()) if through else x @ weight_NI.t() for weight_NI, through in own]
            return torch.stack(given).prod(0)

        return activations


def _domains(source: _Source, method: Split) -> dict[str, Tensor]:
    """The mean |activation| of the neurons on each domain, (E, N), by block."""
    graph, setup = source.graph, source.setup
    batches = setup.batches(graph)
    order = torch.tensor([index for batch in batches for index in batch.index])
    activity: dict[str, Tensor] = {}
    for stop in stream(
        source.checkpoint,
        graph,
        batches,
        measured={unit: {source.stage(unit): method.needs} for unit in graph.units},
        replaced=lambda _unit: {},
        dtype=setup.dtype,
        device=setup.device,
        suspend=False,
    ):
        if stop.stage is not None:
            setup.say(f"{stop.unit} texts", len(activity) / len(graph.units) / 2)
            (stats,) = stop.statistics.values()
            neurons = source.neurons(stop.unit)
            means = [
                torch.stack([neurons(x).abs().sum(0) for x in torch.split(x_TI, _CHUNK)]).sum(0) / len(x_TI)
                for x_TI in stats.inputs
            ]
            activity[stop.unit] = torch.empty_like(rows := torch.stack(means)).index_copy_(
                0, order.to(rows.device), rows
            )
    domain_S = method.group(list(activity.values()), setup.seed)
    tokens_S = torch.tensor([len(ids_L) for ids_L in setup.ids], device=domain_S.device)
    share_ES = torch.nn.functional.one_hot(domain_S, method.experts).t() * tokens_S.float()
    share_ES = share_ES / share_ES.sum(1, keepdim=True)
    return {unit: share_ES @ activity_SN for unit, activity_SN in activity.items()}


def _made(
    source: _Source,
    mixture: Checkpoint,
    target: Graph,
    method: Split,
    writer: Writer,
    files: Mapping[str, str],
) -> Iterator[tuple[str, dict[str, Tensor], list[float]]]:
    """The tensors of each block of the mixture that is not written yet, and the shares of tokens of its experts."""
    setup = source.setup
    activity = writer.tensors(_DOMAINS) if method.by_text else {}
    undone = [unit for unit in target.units if not writer.done(files[unit])]

    def replaced(unit: str) -> Mapping[str, Value]:
        """A finished block runs with what was written; of a new one, experts and router are still to come."""
        if unit not in undone:
            return {name: Value(tensor) for name, tensor in writer.tensors(files[unit]).items()}
        nothing = torch.zeros((), dtype=setup.dtype, device=setup.device)
        return {w.name: Value(nothing.expand(w.spec.shape)) for w in target.unit(unit) if _new(w)}

    for stop in stream(
        mixture,
        target,
        setup.batches(target),
        measured={unit: {source.stage(unit): method.needs} for unit in undone},
        replaced=replaced,
        dtype=setup.dtype,
        device=setup.device,
        suspend=False,
    ):
        if stop.stage is None:
            continue
        unit, own = stop.unit, {w.name: w for w in target.unit(stop.unit) if _new(w)}
        setup.say(f"{unit} experts", 0.5 + target.units.index(unit) / len(target.units) / 2)
        router = next(w for w in own.values() if w.role == _ROUTER)
        made = method(
            Block(
                x_TI=torch.cat(stop.statistics[router.statistics].inputs),
                neurons=source.neurons(unit),
                down_ON=source.down(unit),
                activity_EN=activity[unit].to(setup.device) if method.by_text else None,
                dtype=router.spec.dtype,
            )
        )
        tensors = {w.name: mixture[w.name] for w in target.unit(unit) if w.name not in own}
        for dense in source.graph.unit(unit):
            if _DENSE in dense.writes.spaces:
                rows_NI = source.value(dense)
                for expert, kept_K in enumerate(made.kept_EK):
                    tensors[_match(own, dense, expert).name] = rows_NI[kept_K]
            elif _DENSE in dense.reads.spaces:
                tensors |= {_match(own, dense, e).name: down_OK for e, down_OK in enumerate(made.down_EOK)}
        tensors[router.name] = made.router_EI
        for name, weight in own.items():
            tensors[name] = tensors[name].to(weight.spec.dtype).cpu().contiguous()
            stop.replace(weight, Value(tensors[name]))
        yield unit, tensors, made.share_E.tolist()


def _config(
    config: Mapping[str, Any], mixture: str, more: Mapping[str, Any], numbers: tuple[int, int, int]
) -> dict[str, Any]:
    """The config of the mixture. What the source leaves to transformers is said, where the mixture would have it
    otherwise."""
    full, theirs = _complete(config), _complete({"model_type": mixture})
    unsaid = {k: full[k] for k in theirs.keys() & full.keys() if k not in config and full[k] != theirs[k]}
    said = dict(zip(("{experts}", "{top_k}", "{width}"), numbers, strict=True))
    own = {key: said.get(value, value) if isinstance(value, str) else value for key, value in more.items()}
    return {**config, **dict(sorted(unsaid.items())), **own, "model_type": mixture}


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with what transformers takes for what it does not say."""
    from transformers import AutoConfig

    full: dict[str, Any] = AutoConfig.for_model(**deepcopy(dict(config))).to_dict()
    return full


def _rows(mixture: str, weight: Weight) -> tuple[Row, Row]:
    """The row of a mixture's table for what an expert has of a dense weight, and that of its router."""
    table = rows_of(mixture).all
    alike = next(row for row in table if "{e}" in row.path and (row.reads, row.writes) == _spread(weight))
    return alike, next(row for row in table if row.writes.spaces == (_ROUTER,))


def _spread(weight: Weight) -> tuple[Axis, Axis]:
    """What a dense weight reads and writes, of an expert."""

    def of_expert(axis: Axis) -> Axis:
        parts = (replace(part, space=_EXPERT if part.space == _DENSE else part.space) for part in axis.parts)
        return replace(axis, parts=tuple(parts))

    return of_expert(weight.reads), of_expert(weight.writes)


def _match(own: Mapping[str, Weight], dense: Weight, expert: int) -> Weight:
    """What an expert has of a dense weight."""
    return next(w for w in own.values() if w.expert == expert and (w.reads, w.writes) == _spread(dense))


def _new(weight: Weight) -> bool:
    return weight.expert is not None or weight.role == _ROUTER


def _add(specs: dict[str, TensorSpec], beside: Weight, path: str, shape: tuple[int, int]) -> None:
    """A tensor that comes in the place of another: of its dtype, stored nowhere yet."""
    old = f"{beside.path}.{beside.leaf}"
    name = re.sub(f"{re.escape(old)}$", f"{path}.{beside.leaf}", beside.name)
    dtype = beside.spec.dtype
    specs[name] = TensorSpec(name, dtype, shape, shape[0] * shape[1] * dtype.itemsize, "", 0)
