"""How far a model's predictions are from its parent's, in pieces that fit into memory.

T tokens, V entries of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_ELEMENTS = 1 << 24
"""Logits that are worked on at once."""


def divergence(parent_TV: Tensor, student_TV: Tensor) -> Tensor:
    """Sum over tokens of KL(parent || student), in nats; gradients flow to the student's logits."""
    tokens = max(1, _ELEMENTS // parent_TV.shape[1])
    pieces = list(zip(torch.split(parent_TV, tokens), torch.split(student_TV, tokens), strict=True))
    if len(pieces) == 1:
        return _divergence(*pieces[0])
    total: Tensor = torch.stack([checkpoint(_divergence, *piece, use_reentrant=False) for piece in pieces]).sum()
    return total


def _divergence(parent_TV: Tensor, student_TV: Tensor) -> Tensor:
    parent, student = parent_TV.float().log_softmax(-1), student_TV.float().log_softmax(-1)
    return torch.nn.functional.kl_div(student, parent, reduction="sum", log_target=True)
