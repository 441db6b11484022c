"""Compresso: which structures are cut is learned together with a low-rank change of the weights.

Shapes: G structures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from tersely.errors import UsageError
from tersely.methods.cut.protocol import Gating, Kind, Structures
from tersely.methods.tune.protocol import check_counts, check_rates, check_share

BETA = 2 / 3
_GAMMA, _ZETA = -0.1, 1.1
_MAGIC = 0.8
"""What the authors multiply log alpha by in a gate that is no longer drawn."""
LIMIT = math.log(100)
"""Of log alpha, on both sides."""


@final
@dataclass(frozen=True)
class Compresso(Gating):
    """Learns a hard concrete gate for every structure, under a Lagrangian that keeps as many open as shall be left.

        u ~ U(0, 1)
        s = sigmoid((log u - log(1 - u) + log alpha) / beta)
        z = clip(s (zeta - gamma) + gamma, 0, 1),   beta = 2/3, gamma = -0.1, zeta = 1.1

        min over gates, adapters, max over lambda of
            loss + sum over places of lambda_1 (c - t) + lambda_2 (c - t)^2
        c = share of the place's structures that is expected to be cut, t = the share that shall be

    The loss is that of the next token of the calibration text; weights stand still but for low-rank adapters of the
    queries and values. t grows from 0 over the warm-up. Then the structures with the largest log alpha stay, and the
    adapters are tuned further. (Guo et al., 2023, arXiv 2310.05015; gates: Louizos et al., 2018, arXiv 1712.01312.)
    """

    name: ClassVar[str] = "compresso"

    soft: bool = False
    """What stays keeps gates of sigmoid(0.8 log alpha / beta), as the authors have it; else of 1."""

    def __post_init__(self) -> None:
        check_counts(1, tokens=self.tokens, batch=self.batch)
        check_counts(0, recovery_tokens=self.recovery_tokens, rank=self.rank)
        check_share("warm_up", self.warm_up)
        check_rates(
            gate_rate=self.gate_rate,
            penalty_rate=self.penalty_rate,
            rate=self.rate,
            recovery_rate=self.recovery_rate,
            scale=self.scale,
        )
        if abs(self.start) > LIMIT:
            raise UsageError(f"start={self.start}: expected -{LIMIT:.2f} to {LIMIT:.2f}, within which log alpha stays")
        if self.recovery_tokens and not self.rank:
            raise UsageError("rank=0 leaves nothing to tune afterwards; set recovery_tokens=0")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gates"})

    @property
    def kinds(self) -> frozenset[Kind]:
        return frozenset({"neurons", "heads", "hidden", "experts"})

    def __call__(self, structures: Structures, seed: int) -> Tensor:  # noqa: ARG002 (protocol)
        """log alpha; `seed` had its part in the training."""
        assert structures.gates_G is not None
        return structures.gates_G.double()

    @property
    def limit(self) -> float:
        return LIMIT

    def drawn(self, log_alpha_G: Tensor, uniform_G: Tensor) -> Tensor:
        s_G = torch.sigmoid((uniform_G.logit() + log_alpha_G) / BETA)
        return (s_G * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)

    def open_chance(self, log_alpha_G: Tensor) -> Tensor:
        """P(z > 0) = sigmoid(log alpha - beta log(-gamma / zeta))."""
        return torch.sigmoid(log_alpha_G - BETA * math.log(-_GAMMA / _ZETA))

    def settled(self, log_alpha_G: Tensor, keep: int) -> Tensor:
        kept = log_alpha_G.sort(descending=True, stable=True).indices[:keep]
        gate_G = torch.zeros_like(log_alpha_G)
        gate_G[kept] = torch.sigmoid(_MAGIC * log_alpha_G[kept] / BETA) if self.soft else 1.0
        return gate_G
