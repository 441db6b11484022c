"""What a task gives: a score per model and item, and what belongs beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["right", "score", "auc"]


@dataclass(frozen=True)
class TaskInfo:
    """A task that can be asked for by name.

    items: of the data at hand; None where there is none, or where it depends on the model. found: the data lies in
    its place. where: that place, from the data folder.
    """

    name: str
    title: str
    group: str
    metric: str
    items: int | None
    found: bool
    where: str


@dataclass(frozen=True)
class TaskScores:
    """One task, asked of one or two models: the same items in the same order.

    kind: "right" (scores are 0 or 1), "score" (any number, their mean counts) or "auc" (scores tell members from
    others, by `labels`). available: items that the data has. sha256: names the items used, by their prompts and
    targets. parts: per item, the sub-task it belongs to, "" where there are none.
    scores: per model, per item. labels: of kind "auc", whether the item is a member.
    choices: per model and item, the probability of each choice as a share of all choices' together, from the summed
    log-likelihoods of their tokens; None where a task has no choices. answers: index of the right choice, per item.
    harness: per model, what the harness itself aggregated, under its own names ("acc,none", "acc_stderr,none").
    """

    name: str
    title: str
    group: str
    metric: str
    higher_is_better: bool
    chance: float | None
    kind: Kind
    available: int
    sha256: str
    parts: tuple[str, ...]
    scores: tuple[tuple[float, ...], ...]
    labels: tuple[bool, ...] | None
    choices: tuple[tuple[tuple[float, ...], ...], ...] | None
    answers: tuple[int, ...] | None
    harness: tuple[Mapping[str, float], ...]
    seconds: float = field(default=0.0, compare=False)
