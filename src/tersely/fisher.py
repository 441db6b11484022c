"""The diagonal of the empirical Fisher information: how steeply the loss depends on each weight.

    F = mean over sequences of (d loss / d w)^2,   loss = mean over a sequence's predicted tokens of -log p(token)

Each sequence's gradient is squared by itself: the square of the mean gradient would be far too small. Gradients are
float32, since squares of bfloat16 ones underflow. (As SqueezeLLM takes it: Kim et al., ICML 2024, arXiv 2306.07629.)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from tersely.checkpoint import Checkpoint
from tersely.graph import Graph
from tersely.stream.gradients import gradient_bytes, gradients

_NEEDS = frozenset({"fisher"})


def fishers(
    checkpoint: Checkpoint, graph: Graph, sequences: Sequence[Tensor], weights: Collection[str], device: torch.device
) -> dict[str, Tensor]:
    """The Fisher information of stored weights, (outputs, inputs) each, float32, on the device.

    sequences: token ids, (L,) int64, at least two each. weights: names as stored. The model runs in float32, one block
    at a time. Raises UsageError and CheckpointError as `gradients`.
    """
    found: dict[str, Tensor] = {}
    for _, own in gradients(checkpoint, graph, sequences, wanted=weights, device=device, needs=_NEEDS):
        found |= {name: gradient.square for name, gradient in own.items() if gradient.square is not None}
    return found


def fisher_bytes(graph: Graph, weights: Collection[str], lengths: Sequence[int]) -> int:
    """Memory that `fishers` needs at most, about: the results, and what `gradients` does. lengths: of the sequences."""
    return gradient_bytes(graph, weights, lengths, needs=_NEEDS, held=True)
