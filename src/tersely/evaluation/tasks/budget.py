"""How many items of each task are asked within a time: a pilot, and then the same time for each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tersely.evaluation.tasks.harness import Prepared

_FEWEST = 20
"""Items that a task should have, where the budget allows."""
_FIRST, _GROWTH = 2, 4
"""Items of a pilot's first round, and how many times larger a round may be than the one before."""
_PILOT_SHARE = 0.15
_SAFE = 0.95


@dataclass(eq=False)
class Asked:
    """A task while it is asked.

    order: (task object, item), as drawn; most: of them to ask; count: asked so far. rate: seconds that all models
    together run for an item, None while all answers were known; extra: seconds the harness takes for one, each time.
    """

    task: Prepared
    order: list[tuple[str, int]]
    most: int
    results: list[dict[str, Any]] = field(default_factory=list)
    count: int = 0
    rate: float | None = None
    extra: float = 0.0
    seconds: float = 0.0

    def time(self, count: int) -> float:
        """Seconds to ask `count` items, those included that are answered; what is not known takes none."""
        return (self.rate or 0.0) * max(0, count - self.count) + self.extra * count

    def reach(self, seconds: float) -> int:
        """How many items such a time leads to: at most four times as many as now, since rates change."""
        if self.rate is None:
            return min(self.most, max(_FIRST, self.count + self.count // 2))
        count = int((seconds + self.rate * self.count) / max(self.rate + self.extra, 1e-9))
        return min(self.most, count, max(_FEWEST, _GROWTH * self.count))


def spend(tasks: Sequence[Asked], ask: Callable[[Asked, int], None], start: float, budget: float) -> None:
    """Ask as many items of each task as the time allows: after a pilot, the same time for each (water-filling).

    ask: puts the first so many items of a task to all models. start: when the seconds of the budget began, by the
    monotonic clock.
    """
    pilot = _PILOT_SHARE * budget / len(tasks)
    for each in tasks:
        begin = time.monotonic()
        while each.count < each.most:
            count = min(each.most, max(_FIRST, _GROWTH * each.count))
            if each.count and time.monotonic() - begin + each.time(count) > pilot:
                break
            ask(each, count)
    for number, each in enumerate(tasks):
        left = _SAFE * budget - (time.monotonic() - start)
        end = time.monotonic() + shares(tasks[number:], left)[0]
        while (count := each.reach(end - time.monotonic())) >= min(each.most, 1 + int(1.1 * each.count)) > each.count:
            ask(each, count)


def shares(tasks: Sequence[Asked], seconds: float) -> list[float]:
    """The same time for each, but no more than it can use, and enough for the fewest items where there is as much."""
    full = [each.time(each.most) for each in tasks]
    least = [each.time(max(each.count, min(_FEWEST, each.most))) for each in tasks]
    if math.fsum(least) > seconds:
        least = [0.0] * len(tasks)
    low, high = 0.0, max(0.0, seconds)
    for _ in range(50):
        level = (low + high) / 2
        given = math.fsum(min(max(level, need), most) for need, most in zip(least, full, strict=True))
        low, high = (level, high) if given <= seconds else (low, level)
    return [min(max(low, need), most) for need, most in zip(least, full, strict=True)]
