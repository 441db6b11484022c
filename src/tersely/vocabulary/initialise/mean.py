"""The mean of the pieces into which the old tokenizer cuts a new token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tersely.vocabulary.initialise.protocol import Gap, Need, Rules, Tables, uniform, weights


@dataclass(frozen=True)
class Mean:
    """The plainest start, and on little text among the best (Yamaguchi et al., 2024, arXiv 2406.11477).

    row(t) = (1 / n) sum of the rows of the old pieces s_1 .. s_n of t
    """

    name: ClassVar[str] = "mean"
    convex: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset()

    def __call__(self, gap: Gap, tables: Tables, donor: Tables | None, seed: int) -> Rules:  # noqa: ARG002 (protocol)
        return weights([uniform(cut) for cut in gap.cuts])
