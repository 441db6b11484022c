"""Minitron's importance: how large the activations are (Muralidharan et al., NeurIPS 2024, arXiv 2407.14679)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tersely.methods.cut.protocol import Kind, Structures


@dataclass(frozen=True)
class Minitron:
    """Keep what is active on the calibration text.

    score = sqrt(sum over sequences of (mean over tokens of |a|)^2)

    with a the input of down_proj for a neuron; of o_proj for a head, Euclidean over its coordinates; the outputs of all
    norms for a coordinate of the residual stream, summed over norms; the inputs of an expert's last matrix for an
    expert, Euclidean over its neurons.
    """

    name: ClassVar[str] = "minitron"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"activity"})

    @property
    def kinds(self) -> frozenset[Kind]:
        return frozenset({"neurons", "heads", "hidden", "experts"})

    def __call__(self, structures: Structures, seed: int) -> Tensor:  # noqa: ARG002 (protocol)
        assert structures.activity_G is not None
        return structures.activity_G.double()
