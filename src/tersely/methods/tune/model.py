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
from tersely.methods.tune.divergence import divergence
from tersely.methods.tune.protocol import Progress, TuneModel
from tersely.methods.tune.text import grouped, write_texts
from tersely.methods.tune.trainable import Trainable, trainable, weight
from tersely.methods.tune.trainable import encoded as stored

_CACHE_BYTES = 1 << 29
"""Of keys and values while the parent writes."""
_LOGITS = 1 << 25
"""Of a micro-batch, at most (a sequence that has more runs alone)."""
_COPIES = 10
"""Float32 copies of a tuned weight in memory: its latents, their gradients and both averages of Adam, where they
began, its codes, and what waits for the backward pass."""


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
    """Encoded weights, tuned so that the model predicts what its parent does; see `distill` and `pv`.

    network: the parent as transformers loads it, in float32, which stays as it is; graph: of its checkpoint.
    encoded: by stored name. sequences: token ids of the calibration text, 1-D each; the last `held_out` of them (at
    most a quarter) only choose the best. vectors: norms that an earlier tuning left, by stored name. The scores are
    nats a token of KL(parent || model) on the held-out text, of exactly what is in the result. All else that the model
    has is shared with the parent.

    Raises UsageError: not a causal language model; DataError: fewer than 2 sequences.
    """
    if graph.family.auto_class != "CausalLM":
        raise UsageError(f"{settings.name} tunes causal language models, this one is {graph.model_type}; use signround")
    if len(sequences) < 2:
        raise DataError(f"{settings.name} has {len(sequences)} calibration sequences; give 2 or more, better 128")
    student = _Student(network, graph, encoded, settings, vectors or {})
    held = min(settings.held_out, max(1, len(sequences) // 4))
    longest = max(len(ids_L) for ids_L in sequences)
    texts, last = list(sequences[:-held]), grouped(sequences[-held:], student.tokens, longest)
    if settings.own_texts:
        first = [int(ids_L[0]) for ids_L in sequences]
        together = _together(graph, longest)
        texts += write_texts(
            network, first, count=settings.own_texts, length=longest, together=together, seed=seed, progress=progress
        )
    batches = _steps(texts, settings, student.tokens, seed)

    def backward(step: int) -> float:
        tokens = sum(_predicted(micro) for micro in batches[step])
        total = 0.0
        for micro in batches[step]:
            loss = student.divergence(micro) / tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total

    @torch.no_grad()
    def score() -> float:
        return sum(student.divergence(micro).item() for micro in last) / sum(_predicted(micro) for micro in last)

    with torch.enable_grad():
        return descend(
            [view for views in student.views.values() for view in views],
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
    flops = passes * (4 * settings.tokens + 2 * checked + settings.own_texts * context)
    micro = _micro_tokens(vocabulary, settings.batch)
    widths = sum(w.rows + w.columns for w in graph.weights if w.kind == "linear")
    activations = 4 * micro * (3 * widths + 6 * vocabulary)
    everything = sum(_size(w) for w in graph.weights)
    memory = 4 * (everything + _COPIES * own) + activations + (_CACHE_BYTES if settings.own_texts else 0)
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


def _micro_tokens(vocabulary: int, batch: int) -> int:
    return max(1, min(batch, _LOGITS // vocabulary))


def _steps(texts: Sequence[Tensor], settings: TuneModel, micro: int, seed: int) -> list[list[MicroBatch]]:
    """Micro-batches of every step: the text in steps of about equal tokens, in a new order whenever it is through."""
    order = torch.Generator().manual_seed(seed)
    longest = max(len(ids_L) for ids_L in texts)
    steps = [batch.index for batch in grouped(texts, settings.batch, longest)]
    chosen: list[list[MicroBatch]] = []
    seen = 0
    while seen < settings.tokens:
        for number in torch.randperm(len(steps), generator=order).tolist():
            own = grouped([texts[i] for i in steps[number]], micro, longest)
            chosen.append(list(own))
            seen += sum(_predicted(each) for each in own)
            if seen >= settings.tokens:
                break
    return chosen


def _predicted(batch: MicroBatch) -> int:
    """Tokens that have one before them."""
    rows, length = batch.ids_BL.shape
    return rows * (length - 1) if batch.keep_BL is None else int(batch.keep_BL[:, 1:].sum())


class _Student:
    """The parent's network with tuned weights in place of its own."""

    def __init__(
        self,
        network: nn.Module,
        graph: Graph,
        encoded: Mapping[str, Encoded],
        settings: TuneModel,
        vectors: Mapping[str, Tensor],
    ) -> None:
        self._network, self._autocast = network, settings.autocast
        self._shared = {name: p.detach() for name, p in network.named_parameters()}
        self._device = next(iter(self._shared.values())).device
        self._notes = {name: own.note for name, own in encoded.items()}
        self.tokens = _micro_tokens(graph.sizes["tokens"], settings.batch)
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
        self.views: dict[str, tuple[Trainable, ...]] = {}
        for full, pieces in self._places.items():
            for piece in pieces:
                if piece.weight.name in encoded:
                    own = _oriented(piece.weight, slot(self._shared[full], piece))
                    self.views[piece.weight.name] = trainable(encoded[piece.weight.name], own, settings.motion.reach)

    def keep(self) -> Tuned:
        encoded = {name: stored(views, self._notes[name]) for name, views in self.views.items()}
        return Tuned(encoded, {self._norms[full][0]: self._norm(full) for full in self.moved})

    def divergence(self, batch: MicroBatch) -> Tensor:
        """Sum over predicted tokens of KL(parent || student)."""
        ids_BL = batch.ids_BL[:, :-1].to(self._device)
        with torch.no_grad():
            parent = self._logits(self._shared, ids_BL)
        student = self._logits({**self._shared, **self._own()}, ids_BL)
        if batch.keep_BL is None:
            return divergence(parent.flatten(0, 1), student.flatten(0, 1))
        keep = batch.keep_BL[:, 1:].to(self._device)
        return divergence(parent[keep], student[keep])

    def _logits(self, parameters: Mapping[str, Tensor], ids_BL: Tensor) -> Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            output: Any = functional_call(self._network, dict(parameters), (ids_BL,), {"use_cache": False})
        logits: Tensor = output.logits
        return logits

    def _own(self) -> dict[str, Tensor]:
        values = {name: weight(views) for name, views in self.views.items()}
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
