"""What a model computes, watched: weights known by their address, what they multiply, and the head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear
from torch.overrides import TorchFunctionMode

from tersely.checkpoint import Checkpoint
from tersely.graph import Weight
from tersely.measure import Statistics
from tersely.stream.flow import CancelledError, Flow, SeenError
from tersely.stream.stops import Measured, Value


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
        self.lookups: dict[int, Weight] = {}
        """By the identity of the parameter in the model, which stays empty."""
        self.sites: dict[int, tuple[Weight, ...]] = {}
        """Address of a weight in memory -> the stored weights that lie there."""
        self.values: dict[str, Value] = {}
        """Stored name of a weight that has been replaced -> its value, if its inputs are rounded."""
        self.statistics: dict[str, Statistics] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is embedding and (weight := self.lookups.get(id(args[1]))) is not None:
            return self._lookup(args[0], weight)
        if func is linear:
            if (weight := self.lookups.get(id(args[1]))) is not None:
                return func(args[0], self._head(args[0], weight), *args[2:], **kwargs)
            x, rest = self._met(args[1], args[0])
            return rest(func(x, *args[1:], **kwargs))
        if func is torch.addmm:
            x, rest = self._met(args[2], args[1])
            return rest(func(args[0], x, *args[2:], **kwargs))
        return func(*args, **kwargs)

    def _head(self, x: Tensor, weight: Weight) -> Tensor:
        for stage, needs in self.measured.get("", {}).items():
            self._observe((weight,), x, needs)
            self._pause("", stage)
        if not self.with_head:
            raise CancelledError
        return self.checkpoint[weight.name].to(device=self.device, dtype=self.dtype)

    def _met(self, parameter: Tensor, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """What a weight multiplies, given what comes to it, and what is then done with the product; seen on the way."""
        weights = None if self.plain else self.sites.get(parameter.data_ptr())
        if weights is None:
            return x, _as_it_is
        if self.transformed is not None:
            x = self.transformed(weights[0], x)
        self._see(weights, x)
        # After the pause: the weight may have been replaced in it.
        values = [self.values.get(weight.name) for weight in weights]
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
        if keep is not None:
            if tokens.shape[0] != keep.numel():
                raise AssertionError(f"{weights[0].name} sees {tokens.shape[0]} of {keep.numel()} padded positions")
            tokens = tokens[keep.reshape(-1).to(tokens.device)]
        name = weights[0].statistics
        if name not in self.statistics:
            self.statistics[name] = Statistics(weights[0].columns, self.device, needs)
        self.statistics[name].add(tokens)

    def _lookup(self, ids: Tensor, weight: Weight) -> Tensor:
        unique, inverse = torch.unique(ids, return_inverse=True)
        rows = self.checkpoint.rows(weight.name, unique.cpu())
        return rows.to(device=self.device, dtype=self.dtype)[inverse]

    def _pause(self, unit: str, place: str) -> None:
        # Inside a mode's own function PyTorch has put the mode aside, for the whole thread; others must find it.
        with self:
            assert self.flow is not None
            self.flow.pause(unit, place)


def _as_it_is(y: Tensor) -> Tensor:
    return y
