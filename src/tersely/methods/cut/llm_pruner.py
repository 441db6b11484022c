"""LLM-Pruner's importance: what the loss would change by (Ma et al., NeurIPS 2023, arXiv 2305.11627).

Shapes: G structures, M elements that one weight has of each, N weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tersely.errors import UsageError
from tersely.methods.cut.protocol import Kind, Member, Structures

Saliency = Literal["param_first", "param_second", "param_mix", "vectorize"]
Reduce = Literal["sum", "mean", "max", "prod", "first", "last"]

_NEEDS = {
    "param_first": frozenset({"gradient"}),
    "param_second": frozenset({"fisher"}),
    "param_mix": frozenset({"gradient", "fisher"}),
    "vectorize": frozenset({"gradient"}),
}
_REDUCES = ("sum", "mean", "max", "prod", "first", "last")


@dataclass(frozen=True)
class LLMPruner:
    """Keep what the loss would miss, by its Taylor expansion around the weights w of a structure.

    With g the gradient of the loss and F the mean of its square, which stands for the curvature, an element that is set
    to 0 changes the loss by - w g + 1/2 w^2 F. The score that one weight gives a structure is

        param_first:   sum |w g|
        param_second:  sum w^2 F
        param_mix:     sum |- w g + 1/2 w^2 F|
        vectorize:     |sum w g|

    over the elements that it has of it, and `reduce` makes one score of those of all weights. "prod" is the N-th root
    of the product, which ranks alike and stays within what a number can hold; "first" and "last" are those of the
    weights in the order of the model: of a gated layer's neuron, its gate's and its down-projection's. Coordinates of
    the residual stream are scored block by block, and their scores added, whatever `reduce` says of one block's.

    The paper takes 10 sequences of 64 tokens, which is noisy; more text ranks better.
    """

    name: ClassVar[str] = "llm_pruner"

    saliency: Saliency = "param_first"
    reduce: Reduce = "sum"

    def __post_init__(self) -> None:
        for field, value, known in (("saliency", self.saliency, _NEEDS), ("reduce", self.reduce, _REDUCES)):
            if value not in known:
                raise UsageError(f"{field}={value!r}: expected {', '.join(known)}")

    @property
    def needs(self) -> frozenset[str]:
        return _NEEDS[self.saliency]

    @property
    def kinds(self) -> frozenset[Kind]:
        return frozenset({"neurons", "heads", "hidden", "experts"})

    def __call__(self, structures: Structures, seed: int) -> Tensor:  # noqa: ARG002 (protocol)
        scores_NG = torch.stack([self._salience(member) for member in structures.members])
        match self.reduce:
            case "sum":
                return scores_NG.sum(0)
            case "mean":
                return scores_NG.mean(0)
            case "max":
                return scores_NG.amax(0)
            case "prod":
                return scores_NG.log().mean(0).exp()
            case "first":
                return scores_NG[0]
            case "last":
                return scores_NG[-1]

    def _salience(self, member: Member) -> Tensor:
        """What one weight adds, (G,) float64."""
        if self.saliency == "vectorize":
            return _steepness(member).sum(1, dtype=torch.float64).abs().cpu()
        if self.saliency == "param_first":
            change_GM = _steepness(member)
        elif self.saliency == "param_second":
            change_GM = _bend(member)
        else:
            change_GM = _bend(member) / 2 - _steepness(member)
        return change_GM.abs().sum(1, dtype=torch.float64).cpu()


def _steepness(member: Member) -> Tensor:
    """w g."""
    assert member.gradient_GM is not None
    return member.weight_GM * member.gradient_GM


def _bend(member: Member) -> Tensor:
    """w^2 F."""
    assert member.fisher_GM is not None
    return member.weight_GM.square() * member.fisher_GM
