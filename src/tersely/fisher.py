"""The diagonal of the empirical Fisher information: how steeply the loss depends on each weight.

    F = mean over sequences of (d loss / d w)^2,   loss = mean over a sequence's predicted tokens of -log p(token)

Each sequence's gradient is squared by itself: the square of the mean gradient would be far too small. Gradients are
float32, since squares of bfloat16 ones underflow. (As SqueezeLLM takes it: Kim et al., ICML 2024, arXiv 2306.07629.)

Shapes: O outputs, I inputs of a weight, L tokens of a sequence, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint as recomputed

from tersely.checkpoint import Checkpoint
from tersely.errors import CheckpointError, UsageError
from tersely.graph import Graph, Piece
from tersely.runtime import load_model

_EXPERTS_A_TOKEN = 8
"""At most, in what is estimated."""


def fishers(
    checkpoint: Checkpoint, graph: Graph, sequences: Sequence[Tensor], weights: Collection[str], device: torch.device
) -> dict[str, Tensor]:
    """The Fisher information of stored weights, (outputs, inputs) each, float32, on the device.

    sequences: token ids, (L,) int64, at least two each. weights: names as stored. The whole model is loaded in
    float32, with room for what `fisher_bytes` says. Raises UsageError and CheckpointError as `squared_gradients` and
    `load_model`.
    """
    _require_loss(graph)
    network = load_model(checkpoint.path, device=str(device), dtype=torch.float32)
    return squared_gradients(network, graph, sequences, weights)


def squared_gradients(
    network: nn.Module, graph: Graph, sequences: Sequence[Tensor], weights: Collection[str]
) -> dict[str, Tensor]:
    """`fishers` of a model that is loaded, in float32 and eval mode, which is left with no parameter taking gradients.

    UsageError: no sequences, or a model without a next-token loss; CheckpointError: a loss that is not finite.
    """
    _require_loss(graph)
    if not sequences:
        raise UsageError("the gradients of the loss need calibration text; give at least one sequence")
    network.requires_grad_(False)
    fisher: dict[str, Tensor] = {}
    hooks = []
    for unit in ("", *graph.units):
        for name, pieces in graph.parameters(unit).items():
            wanted = [piece for piece in pieces if piece.weight.name in weights]
            if wanted:
                parameter = network.get_parameter(f"{unit}.{name}" if unit else name).requires_grad_()
                for piece in wanted:
                    shape = (piece.weight.rows, piece.weight.columns)
                    fisher[piece.weight.name] = torch.zeros(shape, device=parameter.device)
                add = _adding(fisher, wanted, len(sequences))
                hooks.append(parameter.register_post_accumulate_grad_hook(add))  # type: ignore[no-untyped-call]
    try:
        with _recomputing(network, graph.units):
            for i, ids_L in enumerate(sequences):
                loss = _loss(network, graph, ids_L)
                if not (value := loss.detach()).isfinite():
                    raise CheckpointError(f"the loss of calibration sequence {i} is {value}; the source is damaged")
                loss.backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
        network.requires_grad_(False)
    return fisher


def fisher_bytes(graph: Graph, weights: Collection[str], tokens: int) -> int:
    """Memory that `fishers` needs at most, about: the model and the results in float32, the gradient of one parameter,
    and for a sequence of `tokens` the inputs of all blocks, what one block leaves behind, and the logits."""
    units = {unit: graph.parameters(unit) for unit in ("", *graph.units)}
    parameters = [pieces for named in units.values() for pieces in named.values()]
    wanted = [pieces for pieces in parameters if any(piece.weight.name in weights for piece in pieces)]
    results = sum(_numel(piece) for pieces in wanted for piece in pieces if piece.weight.name in weights)
    model = sum(_numel(piece) for pieces in parameters for piece in pieces)
    gradient = max((sum(_numel(piece) for piece in pieces) for pieces in wanted), default=0)
    left = len(graph.units) * graph.sizes["residual"] + 6 * (graph.size("tokens") or 0)
    left += max(_left_behind(graph, unit) for unit in graph.units)
    return 4 * (model + results + 2 * gradient + tokens * left)


def _left_behind(graph: Graph, unit: str) -> int:
    """Numbers that a block keeps of a token until its gradients are there."""
    linear = [w for w in graph.unit(unit) if w.kind == "linear"]
    share = min(1.0, _EXPERTS_A_TOKEN / max(1, len({w.expert for w in linear} - {None})))
    # Inputs and outputs of the weights, and what norms, rotations, activation functions and gradients add.
    return sum(round(6 * (w.rows + w.columns) * (1 if w.expert is None else share)) for w in linear)


def _require_loss(graph: Graph) -> None:
    if graph.family.auto_class not in ("CausalLM", "Seq2SeqLM"):
        raise UsageError(
            f"a {graph.model_type} model predicts masked tokens, and gradients are taken of the loss of next tokens; "
            "choose a method that needs no Fisher information"
        )


def _loss(network: Any, graph: Graph, ids_L: Tensor) -> Tensor:
    """Mean -log p of the tokens of a sequence: of each after the first, or where there is an encoder, which reads the
    whole sequence, of each as the decoder gives it back."""
    ids_BL = ids_L[None].to(network.device)
    if graph.family.auto_class == "Seq2SeqLM":
        first = torch.full_like(ids_BL[:, :1], network.config.decoder_start_token_id)
        shifted = torch.cat([first, ids_BL[:, :-1]], dim=1)
        logits_LV = network(input_ids=ids_BL, decoder_input_ids=shifted, use_cache=False).logits[0]
        return cross_entropy(logits_LV.float(), ids_BL[0])
    logits_LV = network(input_ids=ids_BL, use_cache=False).logits[0, :-1]
    return cross_entropy(logits_LV.float(), ids_BL[0, 1:])


@contextmanager
def _recomputing(network: nn.Module, units: Sequence[str]) -> Iterator[None]:
    """Blocks keep only their inputs, and run again for their gradients: memory of one block instead of all."""
    own = {unit: network.get_submodule(unit).forward for unit in units}
    for unit, forward in own.items():
        again = partial(recomputed, forward, use_reentrant=False, preserve_rng_state=False)
        setattr(network.get_submodule(unit), "forward", again)  # noqa: B010 (mypy forbids to assign to a method)
    try:
        yield
    finally:
        for unit, forward in own.items():
            setattr(network.get_submodule(unit), "forward", forward)  # noqa: B010


def _adding(fisher: dict[str, Tensor], pieces: Sequence[Piece], sequences: int) -> Callable[[Tensor], None]:
    """What squares a parameter's gradient as soon as it is there, and drops it."""

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        for piece in pieces:
            slot = parameter.grad if piece.index is None else parameter.grad[piece.index]
            gradient = slot[piece.start : piece.start + piece.rows]
            gradient_OI = gradient.t() if piece.weight.transposed else gradient
            fisher[piece.weight.name].addcmul_(gradient_OI, gradient_OI, value=1 / sequences)
        parameter.grad = None

    return add


def _numel(piece: Piece) -> int:
    return piece.weight.spec.nbytes // piece.weight.spec.dtype.itemsize
