"""Tune all encoded weights of a model at once, towards the full-precision parent.

Shapes: O outputs, I inputs, B sequences, L tokens of the longest, T tokens, V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tersely.calibrate import MicroBatch
from tersely.codecs import Encoded
from tersely.errors import DataError, UsageError
from tersely.graph import Graph, Piece, Weight, filled, slot
from tersely.methods.protocol import Work
from tersely.methods.tune.descent import Descent, descend
from tersely.methods.tune.divergence import divergence, surprise
from tersely.methods.tune.protocol import Progress, TuneModel, View
from tersely.methods.tune.text import grouped, micro_tokens, predicted, scheduled, write_texts

_CACHE_BYTES = 1 << 29
"""Of keys and values while the parent writes."""


@dataclass(frozen=True)
class Tuned:
    """What is stored of a tuned model."""

    encoded: Mapping[str, Encoded]
    vectors: Mapping[str, Tensor]
    """Norms that were tuned, by stored name, in their stored dtype."""


def tune_model(
    network: nn.Module,
    graph: Graph,
    encoded: Mapping[str, Encoded],
    sequences: Sequence[Tensor],
    settings: TuneModel,
    *,
    vectors: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Descent[Tuned]:
    """Encoded weights, tuned so that the model predicts what its parent does; see `distill`, `pv` and `maskllm`.

    network: the parent as transformers loads it, in float32, which stays as it is; graph: of its checkpoint.
    encoded: by stored name. sequences: token ids of the calibration text, 1-D each; the last `held_out` of them (at
    most a quarter) only choose the best. vectors: norms that an earlier tuning left, by stored name. The scores are
    nats a token of the loss on the held-out text, of exactly what is in the result. All else that the model has is
    shared with the parent.

    Raises UsageError: not a causal language model; DataError: fewer than 2 sequences.
    """
    if graph.family.auto_class != "CausalLM":
        raise UsageError(f"{settings.name} tunes causal language models, this one is {graph.model_type}; use signround")
    if len(sequences) < 2:
        raise DataError(f"{settings.name} has {len(sequences)} calibration sequences; give 2 or more, better 128")
    student = _Student(network, graph, encoded, settings, vectors or {}, seed)
    held = min(settings.held_out, max(1, len(sequences) // 4))
    longest = max(len(ids_L) for ids_L in sequences)
    texts, last = list(sequences[:-held]), grouped(sequences[-held:], student.tokens, longest)
    if settings.own_texts:
        first = [int(ids_L[0]) for ids_L in sequences]
        together = _together(graph, longest)
        texts += write_texts(
            network, first, count=settings.own_texts, length=longest, together=together, seed=seed, progress=progress
        )
    batches = scheduled(texts, tokens=settings.tokens, batch=settings.batch, micro=student.tokens, seed=seed)

    def backward(step: int) -> float:
        tokens = sum(predicted(micro) for micro in batches[step])
        energy = settings.motion.energy * (1 - step / len(batches))
        total = 0.0
        for micro in batches[step]:
            values = student.moving()
            loss = student.loss(micro, values)
            if energy:
                squares = torch.stack([value_OI.square().sum() for value_OI in values.values()]).sum()
                loss = loss - energy * predicted(micro) * squares
            (loss / tokens).backward()  # type: ignore[no-untyped-call]
            total += loss.item() / tokens
        return total

    @torch.no_grad()
    def score() -> float:
        values = student.stored()
        return sum(student.loss(micro, values).item() for micro in last) / sum(predicted(micro) for micro in last)

    with torch.enable_grad():
        return descend(
            list(student.views.values()),
            settings.motion,
            steps=len(batches),
            checks=settings.checks,
            backward=backward,
            score=score,
            keep=student.keep,
            others=[(moved, settings.norm_rate) for moved in student.moved.values() if settings.norm_rate],
            progress=progress,
        )


def tuning_work(graph: Graph, tuned: Sequence[Weight], settings: TuneModel, *, context: int, texts: int) -> Work:
    """What `tune_model` costs: `texts` calibration sequences of `context` tokens.

    memory counts the parent in float32, the copies of what is tuned, and a micro-batch's activations with gradients.
    """
    vocabulary = graph.sizes["tokens"]
    parameters = sum(_size(w) for w in graph.weights if w.kind == "linear")
    parameters += vocabulary * graph.sizes["residual"] if graph.tied else 0
    own = sum(_size(w) for w in tuned)
    checked = settings.checks * min(settings.held_out, texts) * context
    passes = 2.0 * parameters
    parent = settings.loss == "parent"
    flops = passes * ((3 + parent) * settings.tokens + (1 + parent) * checked + settings.own_texts * context)
    micro = micro_tokens(vocabulary, settings.batch)
    widths = sum(w.rows + w.columns for w in graph.weights if w.kind == "linear")
    activations = 4 * micro * (3 * widths + 6 * vocabulary)
    everything = sum(_size(w) for w in graph.weights)
    memory = round(4 * (everything + settings.copies * own)) + activations + (_CACHE_BYTES if settings.own_texts else 0)
    return Work(flops=flops, loops=settings.tokens // settings.batch, memory=memory)


def _together(graph: Graph, length: int) -> int:
    """Sequences that the parent writes at once."""
    token = 4 * len(graph.units) * sum(graph.sizes.get(space, graph.sizes["residual"]) for space in "kv")
    return max(1, min(256, _CACHE_BYTES // (token * length)))


def _size(weight: Weight) -> int:
    size = 1
    for side in weight.spec.shape:
        size *= side
    return size


class _Student:
    """The parent's network with tuned weights in place of its own."""

    def __init__(
        self,
        network: nn.Module,
        graph: Graph,
        encoded: Mapping[str, Encoded],
        settings: TuneModel,
        vectors: Mapping[str, Tensor],
        seed: int,
    ) -> None:
        self._network, self._loss, self._autocast = network, settings.loss, settings.autocast
        self._shared = {name: p.detach() for name, p in network.named_parameters()}
        self._device = next(iter(self._shared.values())).device
        draw = torch.Generator(self._device).manual_seed(seed)
        self.tokens = micro_tokens(graph.sizes["tokens"], settings.batch)
        self._places: dict[str, tuple[Piece, ...]] = {}
        self._norms: dict[str, tuple[str, torch.dtype]] = {}
        self.moved: dict[str, Tensor] = {}
        for unit in ("", *graph.units):
            for name, pieces in graph.parameters(unit).items():
                full = f"{unit}.{name}" if unit else name
                if any(piece.weight.name in encoded for piece in pieces):
                    self._places[full] = pieces
                elif (norm := pieces[0].weight).name in vectors or (settings.norm_rate and norm.role == "norm"):
                    self._norms[full] = (norm.name, norm.spec.dtype)
                    before = self._shared[full]
                    now = vectors[norm.name].to(before) if norm.name in vectors else before
                    self.moved[full] = (now - before).requires_grad_(settings.norm_rate > 0)
        self.views: dict[str, View] = {}
        for full, pieces in self._places.items():
            for piece in pieces:
                if piece.weight.name in encoded:
                    own = _oriented(piece.weight, slot(self._shared[full], piece))
                    self.views[piece.weight.name] = settings.view(encoded[piece.weight.name], own, draw)

    def keep(self) -> Tuned:
        encoded = {name: view.stored() for name, view in self.views.items()}
        return Tuned(encoded, {self._norms[full][0]: self._norm(full) for full in self.moved})

    def moving(self) -> dict[str, Tensor]:
        """The tuned weights, (O, I) by stored name, as they run in a step."""
        return {name: view.moving() for name, view in self.views.items()}

    def stored(self) -> dict[str, Tensor]:
        """As they would be stored now."""
        return {name: view.stored().decode().float() for name, view in self.views.items()}

    def loss(self, batch: MicroBatch, values: Mapping[str, Tensor]) -> Tensor:
        """Sum over predicted tokens, of the student with these weights."""
        ids_BL = batch.ids_BL.to(self._device)
        keep_BL = None if batch.keep_BL is None else batch.keep_BL[:, 1:].to(self._device)

        def together(each_BL: Tensor) -> Tensor:
            return each_BL.flatten(0, 1) if keep_BL is None else each_BL[keep_BL]

        student = self._logits({**self._shared, **self._own(values)}, ids_BL[:, :-1])
        if self._loss == "text":
            return surprise(together(ids_BL[:, 1:]), together(student))
        with torch.no_grad():
            parent = self._logits(self._shared, ids_BL[:, :-1])
        return divergence(together(parent), together(student))

    def _logits(self, parameters: Mapping[str, Tensor], ids_BL: Tensor) -> Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            output: Any = functional_call(self._network, dict(parameters), (ids_BL,), {"use_cache": False})
        logits: Tensor = output.logits
        return logits

    def _own(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        whole = {full: filled(self._shared[full], pieces, values) for full, pieces in self._places.items()}
        for full, moved in self.moved.items():
            value = self._shared[full] + moved
            whole[full] = value + (self._norm(full).float() - value).detach()
        return whole

    @torch.no_grad()
    def _norm(self, full: str) -> Tensor:
        """As it would be stored."""
        return (self._shared[full] + self.moved[full]).to(self._norms[full][1])


def _oriented(weight: Weight, value: Tensor) -> Tensor:
    """(outputs, inputs) from the stored layout, and back."""
    return value.t() if weight.transposed else value
