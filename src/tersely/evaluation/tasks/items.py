"""The items of a task: plain dicts, by sub-task and split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Item = dict[str, Any]
Splits = Mapping[str, Sequence[Item]]
"""`test`: what is asked; `shots`: examples that stand before each question."""


@dataclass(frozen=True)
class Tokens:
    """What tasks that are cut to a length ask of a model: its tokenizer, and how many positions all models have."""

    tokenizer: Any
    positions: int


@dataclass(frozen=True)
class Items:
    """Of one task. parts: sub-task -> its items, in order; a single one is named "". notes: what could not be read."""

    parts: Mapping[str, Splits]
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Items that can be asked."""
        return sum(len(splits["test"]) for splits in self.parts.values())


Source = Callable[[Sequence[Path], Tokens | None], Items]
"""From the files of a task and what the models allow. Raises DataError: not the files that were expected."""
