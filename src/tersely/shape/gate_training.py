"""Training of gates, and of adapters with them.

Shapes: G structures of a place, S places, R rank, O outputs, I inputs, B sequences, L tokens, P tokens of the prompt, V
entries of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from tersely.calibrate import MicroBatch
from tersely.errors import DataError, UsageError
from tersely.graph import Graph, Piece, Weight, filled, slot
from tersely.methods.cut import Gating
from tersely.methods.protocol import Work
from tersely.methods.tune.protocol import Progress
from tersely.methods.tune.text import micro_tokens, scheduled
from tersely.shape.gates import check_gates, gated, touches
from tersely.shape.structures import Place

_LEAST = 1e-6
"""Distance of uniform numbers from 0 and 1."""


@dataclass(frozen=True)
class TrainedGates:
    """What training found."""

    scores: Mapping[Place, Tensor]
    """log alpha, (G,), larger for what matters more."""
    values: Mapping[Place, Tensor]
    """Gates, (G,): zero for what is to be cut."""
    weights: Mapping[str, Tensor]
    """Weights that adapters changed, by stored name, float32, in the stored layout, without gates."""
    closed: Mapping[Place, float]
    """Share of the structures that the gates expected to cut, before exactly as many were chosen as shall be."""
    losses: tuple[float, ...]
    """Of every step, in nats a token."""


def train_gates(
    network: nn.Module,
    graph: Graph,
    keep: Mapping[Place, int],
    sequences: Sequence[Tensor],
    settings: Gating,
    *,
    prompt: Sequence[int] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> TrainedGates:
    """Learn which structures to keep, `keep` of each place, and adapters of the weights; see `Gating`.

    network: as transformers loads it, in float32, which stays as it is; graph: of its checkpoint. keep: at least 1 of
    each place, at most its count. sequences: token ids of the calibration text, 1-D each. prompt: token ids of
    `settings.prompt`, which stand before each sequence; that becomes no longer than the longest was, and a token with
    which both begin stands there once.

    Raises UsageError: not a causal language model, what `check_gates` says, or a prompt that leaves no room; DataError:
    no sequences.
    """
    if graph.family.auto_class != "CausalLM":
        raise UsageError(
            f"{settings.name} trains causal language models, this one is {graph.model_type}; use weight_norm"
        )
    if not sequences:
        raise DataError(f"{settings.name} has no calibration sequences; give 1 or more, better 1000")
    check_gates(graph, keep)
    texts = _with_prompt(sequences, prompt)
    model = _Model(network, graph, [place for place, kept in keep.items() if kept < place.count], settings, seed)
    micro = micro_tokens(graph.sizes["tokens"], settings.batch)

    def batches(tokens: int, seed: int) -> list[list[MicroBatch]]:
        return scheduled(texts, tokens=tokens, batch=settings.batch, micro=micro, seed=seed) if tokens else []

    with torch.enable_grad():
        learned = batches(settings.tokens, seed)
        after = batches(settings.recovery_tokens, seed + 1)
        losses = _learn(model, learned, keep, settings, len(prompt), len(learned) + len(after), progress)
        scores = {place: value.detach().cpu() for place, value in model.log_alpha.items()}
        values = {place: settings.settled(score, keep[place]) for place, score in scores.items()}
        losses += _recover(model, after, values, settings, len(prompt), len(learned), progress)
    closed = {place: 1 - settings.open_chance(score).mean().item() for place, score in scores.items()}
    whole = {place: torch.ones(place.count) for place in keep if place not in scores}
    return TrainedGates({**whole, **scores}, {**whole, **values}, model.merged(), closed, tuple(losses))


def gates_work(graph: Graph, places: Collection[Place], settings: Gating, *, context: int) -> Work:
    """What `train_gates` costs on sequences of `context` tokens.

    memory counts the model in float32, the gated weights with their gradients, adapters, and a micro-batch's
    activations with gradients.
    """
    vocabulary = graph.sizes["tokens"]
    linear = [w for w in graph.weights if w.kind == "linear"]
    numel = {w.name: math.prod(w.spec.shape) for w in graph.weights}
    parameters = sum(numel[w.name] for w in linear) + (vocabulary * graph.sizes["residual"] if graph.tied else 0)
    own = touches(graph, places)
    moved = sum(numel[name] for name, parts in own.items() if any(touch.gated for touch in parts))
    moved += sum(numel[w.name] for w in _adapted(graph, settings))
    tokens = settings.tokens + settings.recovery_tokens
    # Products with all weights twice, and gradients of those that gates or adapters act on.
    flops = tokens * (4.0 * parameters + 2.0 * moved)
    micro = max(context, micro_tokens(vocabulary, settings.batch))
    widths = sum(w.rows + w.columns for w in linear)
    memory = 4 * (sum(numel.values()) + 3 * moved) + 4 * micro * (3 * widths + 4 * vocabulary)
    return Work(flops=flops, loops=tokens // settings.batch, memory=memory)


def _with_prompt(sequences: Sequence[Tensor], prompt: Sequence[int]) -> list[Tensor]:
    if not prompt:
        return list(sequences)
    longest = max(len(ids_L) for ids_L in sequences)
    if len(prompt) >= longest:
        raise UsageError(f"prompt: {len(prompt)} tokens leave no room in sequences of {longest}; shorten it")
    before_P = torch.tensor(prompt)
    return [torch.cat([before_P, ids_L[int(ids_L[0]) == prompt[0] :]])[:longest] for ids_L in sequences]


def _learn(
    model: _Model,
    batches: Sequence[Sequence[MicroBatch]],
    keep: Mapping[Place, int],
    settings: Gating,
    prompt: int,
    steps: int,
    progress: Progress | None,
) -> list[float]:
    """Move gates and adapters, and the lambdas against them; the losses."""
    device = model.device
    goals_S = torch.tensor([1 - keep[place] / place.count for place in model.log_alpha], device=device)
    lambdas_2S = torch.zeros(2, len(goals_S), device=device, requires_grad=True)
    optimizer = torch.optim.AdamW(
        [
            {"params": list(model.log_alpha.values()), "lr": settings.gate_rate},
            {"params": model.adapters, "lr": settings.rate},
            {"params": [lambdas_2S], "lr": settings.penalty_rate, "maximize": True},
        ],
        weight_decay=0,
    )
    losses: list[float] = []
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        losses.append(_backward(model, batch, None, prompt))
        ramp = min(1.0, (step + 1) / (settings.warm_up * len(batches))) if settings.warm_up else 1.0
        closed = [1 - settings.open_chance(own).mean() for own in model.log_alpha.values()]
        if closed:
            too_many_S = torch.stack(closed) - ramp * goals_S
            penalty: Tensor = (lambdas_2S * torch.stack([too_many_S, too_many_S.square()])).sum()
            penalty.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            for own in model.log_alpha.values():
                own.clamp_(-settings.limit, settings.limit)
        if progress is not None:
            progress(f"step {step + 1} of {steps}, loss {losses[-1]:.4g}", (step + 1) / steps)
    return losses


def _recover(
    model: _Model,
    batches: Sequence[Sequence[MicroBatch]],
    values: Mapping[Place, Tensor],
    settings: Gating,
    prompt: int,
    done: int,
    progress: Progress | None,
) -> list[float]:
    """Move the adapters alone; the losses."""
    if not batches:
        return []
    optimizer = torch.optim.AdamW(model.adapters, weight_decay=0)
    losses: list[float] = []
    steps = done + len(batches)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = settings.recovery_rate * (1 + math.cos(math.pi * step / len(batches))) / 2
        optimizer.zero_grad()
        losses.append(_backward(model, batch, values, prompt))
        optimizer.step()
        if progress is not None:
            now = done + step + 1
            progress(f"step {now} of {steps}, loss {losses[-1]:.4g}", now / steps)
    return losses


def _backward(model: _Model, batch: Sequence[MicroBatch], values: Mapping[Place, Tensor] | None, prompt: int) -> float:
    """Add the gradients of a step's loss, and return it; gates are drawn for each micro-batch where none are given."""
    scored = [_scored(micro, prompt) for micro in batch]
    tokens = max(1, sum(int(own.sum()) for own in scored))
    total = 0.0
    for micro, own in zip(batch, scored, strict=True):
        loss = model.loss(micro, own, model.draw() if values is None else values) / tokens
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total


def _scored(batch: MicroBatch, prompt: int) -> Tensor:
    """Which of the predicted tokens, (B, L - 1), count."""
    ids_BL = batch.ids_BL
    scored = torch.ones_like(ids_BL[:, 1:], dtype=torch.bool) if batch.keep_BL is None else batch.keep_BL[:, 1:].clone()
    scored[:, : max(0, prompt - 1)] = False
    return scored


def _adapted(graph: Graph, settings: Gating) -> list[Weight]:
    """The weights that have adapters."""
    if not settings.rank:
        return []
    linear = graph.select("linear")
    return [w for w in linear if settings.all_linear or {"q", "v"} & set(w.writes.spaces)]


class _Model:
    """The network with gates and adapters on its weights."""

    def __init__(self, network: nn.Module, graph: Graph, places: Sequence[Place], settings: Gating, seed: int) -> None:
        self._network, self._settings = network, settings
        self._shared = {name: p.detach() for name, p in network.named_parameters()}
        self.device = next(iter(self._shared.values())).device
        self._chance = torch.Generator().manual_seed(seed)
        self._touches = touches(graph, places)
        self.log_alpha = {
            place: torch.full((place.count,), settings.start, device=self.device, requires_grad=True)
            for place in places
        }
        self._adapters = {w.name: self._adapter(w, settings.rank) for w in _adapted(graph, settings)}
        self._places: dict[str, tuple[Piece, ...]] = {}
        for unit in ("", *graph.units):
            for name, pieces in graph.parameters(unit).items():
                if any(self._changes(piece.weight.name) for piece in pieces):
                    self._places[f"{unit}.{name}" if unit else name] = pieces

    @property
    def adapters(self) -> list[Tensor]:
        return [factor for pair in self._adapters.values() for factor in pair]

    def draw(self) -> dict[Place, Tensor]:
        """Gates by chance."""
        found = {}
        for place, own in self.log_alpha.items():
            uniform_G = torch.rand(len(own), generator=self._chance).clamp(_LEAST, 1 - _LEAST)
            found[place] = self._settings.drawn(own, uniform_G.to(self.device))
        return found

    def loss(self, batch: MicroBatch, scored: Tensor, gates: Mapping[Place, Tensor]) -> Tensor:
        """Sum over the scored tokens of -log p(token)."""
        ids_BL = batch.ids_BL.to(self.device)
        parameters = {**self._shared, **self._own(gates)}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._settings.autocast):
            output: Any = functional_call(self._network, parameters, (ids_BL[:, :-1],), {"use_cache": False})
        keep = scored.to(self.device)
        return cross_entropy(output.logits[keep].float(), ids_BL[:, 1:][keep], reduction="sum")

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        """The weights that have adapters, with them."""
        return {
            piece.weight.name: self._adapted(self._shared[full], piece).contiguous().cpu()
            for full, pieces in self._places.items()
            for piece in pieces
            if piece.weight.name in self._adapters
        }

    def _changes(self, name: str) -> bool:
        return name in self._adapters or any(touch.gated for touch in self._touches.get(name, ()))

    def _adapter(self, weight: Weight, rank: int) -> tuple[Tensor, Tensor]:
        """Factors (O, R) of zeros and (R, I), as PEFT starts them."""
        down_RI = (2 * torch.rand(rank, weight.columns, generator=self._chance) - 1) * weight.columns**-0.5
        up_OR = torch.zeros(weight.rows, rank)
        return up_OR.to(self.device).requires_grad_(), down_RI.to(self.device).requires_grad_()

    def _adapted(self, parameter: Tensor, piece: Piece) -> Tensor:
        """A stored tensor with its adapter, in float32."""
        value = slot(parameter, piece).float()
        if piece.weight.name not in self._adapters:
            return value
        up_OR, down_RI = self._adapters[piece.weight.name]
        change_OI = self._settings.scale * (up_OR @ down_RI)
        return value + (change_OI.t() if piece.weight.transposed else change_OI)

    def _own(self, gates: Mapping[Place, Tensor]) -> dict[str, Tensor]:
        """Parameters as transformers has them, with gates and adapters."""
        whole = {}
        for full, pieces in self._places.items():
            values = {}
            for piece in pieces:
                w = piece.weight
                if self._changes(w.name):
                    own = self._adapted(self._shared[full], piece)
                    own = gated(w, own, self._touches.get(w.name, ()), gates)
                    values[w.name] = own.t() if w.transposed else own
            whole[full] = filled(self._shared[full], pieces, values)
        return whole
