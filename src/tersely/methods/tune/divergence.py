"""How far a model's predictions are from its parent's, or from a text, in pieces that fit into memory.

T tokens, V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_ELEMENTS = 1 << 24
"""Logits that are worked on at once."""


def divergence(parent_TV: Tensor, student_TV: Tensor) -> Tensor:
    """Sum over tokens of KL(parent || student), in nats; gradients flow to the student's logits."""
    return _summed(_divergence, parent_TV, student_TV)


def surprise(ids_T: Tensor, student_TV: Tensor) -> Tensor:
    """Sum over tokens of the student's -log p, in nats; gradients flow to its logits."""
    return _summed(_surprise, ids_T, student_TV)


def _summed(loss: Callable[[Tensor, Tensor], Tensor], target_T: Tensor, student_TV: Tensor) -> Tensor:
    tokens = max(1, _ELEMENTS // student_TV.shape[1])
    pieces = list(zip(torch.split(target_T, tokens), torch.split(student_TV, tokens), strict=True))
    if len(pieces) == 1:
        return loss(*pieces[0])
    total: Tensor = torch.stack([checkpoint(loss, *piece, use_reentrant=False) for piece in pieces]).sum()
    return total


def _divergence(parent_TV: Tensor, student_TV: Tensor) -> Tensor:
    parent, student = parent_TV.float().log_softmax(-1), student_TV.float().log_softmax(-1)
    return torch.nn.functional.kl_div(student, parent, reduction="sum", log_target=True)


def _surprise(ids_T: Tensor, student_TV: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(student_TV.float(), ids_T, reduction="sum")
