"""What a model computes, watched: weights known by their address, what they multiply, and the head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear
from torch.overrides import TorchFunctionMode

from tersely.checkpoint import Checkpoint
from tersely.codecs.low_rank import look_up
from tersely.graph import Weight
from tersely.measure import Statistics
from tersely.stream.flow import CancelledError, Flow, SeenError
from tersely.stream.stops import Measured, Value

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Of inputs (..., I), a weight and a bias."""


class Watch(TorchFunctionMode):
    """Serves lookups from the checkpoint, gathers what weights of a block multiply, and stops a flow at the head."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        measured: Mapping[str, Measured],
        surveyed: Mapping[str, Measured],
        transformed: Callable[[Weight, Tensor], Tensor] | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.checkpoint, self.measured, self.surveyed = checkpoint, measured, surveyed
        self.transformed, self.dtype, self.device = transformed, dtype, device
        self.flow: Flow | None = None
        """The one that runs."""
        self.with_head = False
        self.plain = False
        """Whether the block runs as it lies in the checkpoint: nothing is transformed, rounded or gathered."""
        self.tables: Mapping[str, Value] = {}
        """Stored name of a table that is looked up in two factors -> its value."""
        self.lookups: dict[int, Weight] = {}
        """By the identity of the parameter in the model, which stays empty."""
        self.sites: dict[int, tuple[Weight, ...]] = {}
        """Address of a weight in memory -> the stored weights that lie there."""
        self.values: dict[str, Value] = {}
        """Stored name of a weight that has been replaced -> its value, if that is more than a tensor."""
        self.statistics: dict[str, Statistics] = {}
        self.routed: Statistics | None = None
        """Of the expert whose output comes next."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is embedding and (weight := self.lookups.get(id(args[1]))) is not None:
            return self._lookup(args[0], weight)
        if func is linear:
            if (weight := self.lookups.get(id(args[1]))) is not None:
                head_VI = self._head(args[0], weight)
                if (factors := self._table(weight)) is not None:
                    return func(linear(args[0], factors[0]), factors[1], *args[2:], **kwargs)
                return func(args[0], head_VI, *args[2:], **kwargs)
            return self._product(*args, product=func, **kwargs)
        if func is Tensor.index_add_ and self.routed is not None:
            # What an expert adds to the tokens that were routed to it, its router's weight included.
            self.routed.routed += float(args[3].float().norm(dim=-1).sum())
            self.routed = None
        if func is torch.addmm:
            bias, x, parameter, *more = args

            def added(x: Tensor, weight: Tensor, bias: Any) -> Tensor:
                return torch.addmm(bias, x, weight, *more, **kwargs)

            return self._product(x, parameter, bias, product=added)
        return func(*args, **kwargs)

    def _head(self, x: Tensor, weight: Weight) -> Tensor:
        for stage, needs in self.measured.get("", {}).items():
            self._observe((weight,), x, needs)
            self._pause("", stage)
        if not self.with_head:
            raise CancelledError
        return self.checkpoint[weight.name].to(device=self.device, dtype=self.dtype)

    def _product(self, x: Tensor, parameter: Tensor, bias: Tensor | None = None, *, product: Product) -> Tensor:
        """What a weight gives for its inputs, which are seen on the way."""
        weights = None if self.plain else self.sites.get(parameter.data_ptr())
        if weights is None:
            return product(x, parameter, bias)
        if self.transformed is not None:
            x = self.transformed(weights[0], x)
        self._see(weights, x)
        # After the pause: the weight may have been replaced in it.
        values = [self.values.get(weight.name) for weight in weights]
        if len(weights) > 1 and any(value is not None and value.factors is not None for value in values):
            rows = [weight.rows for weight in weights]
            own = [None] * len(rows) if bias is None else torch.split(bias, rows, dim=-1)
            pieces = zip(weights, values, torch.split(parameter, rows), own, strict=True)
            return torch.cat([_given(x, p, b, product, (w,), (v,)) for w, v, p, b in pieces], dim=-1)
        return _given(x, parameter, bias, product, weights, values)

    def _see(self, weights: Sequence[Weight], x: Tensor) -> None:
        flow = self.flow
        watched = flow.watched if flow is not None else None
        if watched is None or weights[0].stage not in watched.stages or weights[0].statistics in watched.seen:
            return
        watched.seen.add(weights[0].statistics)
        measured = self.measured if watched.pauses else self.surveyed
        self._observe(weights, x, measured[watched.unit][weights[0].stage])
        if watched.awaited is None and watched.pauses:
            self._pause(watched.unit, weights[0].stage)
        elif watched.awaited is not None and watched.awaited <= watched.seen:
            raise SeenError

    def _observe(self, weights: Sequence[Weight], x: Tensor, needs: frozenset[str]) -> None:
        """Add the input of a weight to the statistics of its activations; padded positions are left out."""
        assert self.flow is not None
        keep = self.flow.batch.keep_BL
        tokens = x.reshape(-1, x.shape[-1])
        lengths = [len(tokens)] if weights[0].expert is not None or x.dim() != 3 else [x.shape[1]] * x.shape[0]
        if keep is not None:
            if tokens.shape[0] != keep.numel():
                raise AssertionError(f"{weights[0].name} sees {tokens.shape[0]} of {keep.numel()} padded positions")
            tokens = tokens[keep.reshape(-1).to(tokens.device)]
            lengths = keep.sum(1).tolist()
        name = weights[0].statistics
        if name not in self.statistics:
            self.statistics[name] = Statistics(weights[0].columns, self.device, needs)
        self.statistics[name].add(tokens, lengths)
        if "routed" in needs and "residual" in weights[0].writes.spaces:
            self.routed = self.statistics[name]

    def _table(self, weight: Weight) -> tuple[Tensor, Tensor] | None:
        value = self.tables.get(weight.name)
        if value is None or value.factors is None:
            return None
        a_RI, b_OR = (factor.to(device=self.device, dtype=self.dtype) for factor in value.factors)
        return a_RI, b_OR

    def _lookup(self, ids: Tensor, weight: Weight) -> Tensor:
        if (factors := self._table(weight)) is not None:
            return look_up(ids, *factors)
        unique, inverse = torch.unique(ids, return_inverse=True)
        rows = self.checkpoint.rows(weight.name, unique.cpu())
        return rows.to(device=self.device, dtype=self.dtype)[inverse]

    def _pause(self, unit: str, place: str) -> None:
        # Inside a mode's own function PyTorch has put the mode aside, for the whole thread; others must find it.
        with self:
            assert self.flow is not None
            self.flow.pause(unit, place)


def _given(
    x: Tensor,
    parameter: Tensor,
    bias: Tensor | None,
    product: Product,
    weights: Sequence[Weight],
    values: Sequence[Value | None],
) -> Tensor:
    """What weights that lie in one parameter give for inputs that have been transformed."""
    if (first := values[0]) is None:
        return product(x, parameter, bias)
    rounded = x if first.rounded is None else first.rounded(x)
    if first.factors is not None:
        a_RI, b_OR = (factor.to(parameter.dtype) for factor in first.factors)
        return product(linear(rounded, a_RI), b_OR.t() if weights[0].transposed else b_OR, bias)
    y = product(rounded, parameter, bias)
    if first.rounded is None or all(value is None or value.full is None for value in values):
        return y
    full_OI = torch.cat(
        [
            x.new_zeros(weight.rows, weight.columns) if value is None or value.full is None else value.full.to(x.dtype)
            for weight, value in zip(weights, values, strict=True)
        ]
    )
    return y + (x - rounded) @ full_OI.t()
