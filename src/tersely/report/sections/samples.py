"""Texts that the models continued, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tersely.report.cells import long_text
from tersely.results import Sample


def sample_section(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    made = []
    for s in samples:
        model, base = long_text(s.model), None if s.base is None else long_text(s.base)
        same = 0
        if base is not None:
            same = next(
                (i for i, (a, b) in enumerate(zip(model, base, strict=False)) if a != b), min(len(model), len(base))
            )
            if model != base and same < min(len(model), len(base)):
                same = max(model.rfind(" ", 0, same), model.rfind("\n", 0, same)) + 1
        columns = [("model", model, s.repetition)]
        if base is not None:
            columns.insert(0, ("base", base, s.base_repetition or 0.0))
        made.append(
            {
                "prompt": long_text(s.prompt),
                "equal": base is not None and s.base == s.model,
                "columns": [
                    {"who": who, "same": text[:same], "rest": text[same:], "repetition": _repeats(repetition)}
                    for who, text, repetition in columns
                ],
            }
        )
    return made


def _repeats(share: float) -> str:
    return f"{100 * share:.0f} % repeated" if share >= 0.005 else ""
