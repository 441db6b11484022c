"""Experts by what they add to the model, as their router weighs it (REAP: Lasby et al., 2025, arXiv 2510.13999)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tersely.methods.cut.protocol import Kind, Structures


@dataclass(frozen=True)
class Routed:
    """Keep the experts that add most to the residual stream.

    score_e = sum over tokens routed to e of |g_e(x) f_e(x)| / all tokens,   g: the router's weight, f: the expert

    (REAP divides by the tokens that were routed to e: what an expert adds where it is used, be that seldom. Set
    `by_use` for that.)
    """

    name: ClassVar[str] = "routed"

    by_use: bool = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"routed"})

    @property
    def kinds(self) -> frozenset[Kind]:
        return frozenset({"experts"})

    def __call__(self, structures: Structures, seed: int) -> Tensor:  # noqa: ARG002 (protocol)
        assert structures.routed_G is not None
        assert structures.tokens_G is not None
        added_G = structures.routed_G.double()
        return added_G / structures.tokens_G.clamp(min=1) if self.by_use else added_G
