"""How fast models run, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from tersely.plan.cost import duration, size
from tersely.report.terminal import table
from tersely.results import Point, Setting, Speed

_PACKAGES = {"transformers": "transformers", "llama.cpp": "llama-cpp-python", "vllm": "vllm"}
"""Engine -> the package whose version is shown."""


def speed_table(speeds: Sequence[Speed]) -> RenderableType:
    """Tokens a second by batch and length, then what each model takes, then with what that was measured.

    The speeds of several models have their ratio to the first one's beside them, in brackets where the runs of the two
    overlap: the slowest of the faster is no faster than the fastest of the slower.
    """
    names = _names(speeds)
    parts: list[RenderableType] = []
    for phase in ("prefill", "decode"):
        parts += [_grid(phase, speeds, names), Text("")]
    parts += [_costs(speeds, names), Text("")]
    parts.append(Text("\n".join([*_engines(speeds, names), *_how(speeds)])))
    told: dict[str, list[str]] = {}
    for name, each in zip(names, speeds, strict=True):
        for note in each.notes:
            told.setdefault(note, []).append(name)
    if told:
        parts.append(Text("\n" + "\n".join(f"note: {', '.join(of)}: {note}" for note, of in told.items())))
    return Group(*parts)


def _grid(phase: str, speeds: Sequence[Speed], names: Sequence[str]) -> RenderableType:
    """A row for each model and batch, a column for each length."""
    cells = [{(p.batch, p.length): p for p in each.points if p.phase == phase} for each in speeds]
    lengths = sorted({length for found in cells for _, length in found})
    rows = []
    for number, (name, found) in enumerate(zip(names, cells, strict=True)):
        for row, batch in enumerate(sorted({batch for batch, _ in found})):
            shown = []
            for length in lengths:
                point, base = found.get((batch, length)), cells[0].get((batch, length))
                shown.append(_rate(point, base if number else None))
            rows.append((name if row == 0 else "", str(batch), *shown))
    return table((f"{phase}, tokens a second", "batch", *(f"length {n}" for n in lengths)), rows)


def _rate(point: Point | None, base: Point | None) -> str:
    if point is None:
        return "-"
    shown = _number(point.tokens_per_second)
    if base is None:
        return shown
    ratio = f"{point.tokens_per_second / base.tokens_per_second:.2f}x" if base.tokens_per_second else "-"
    apart = point.slowest < base.fastest or base.slowest < point.fastest
    return f"{shown}  {ratio} " if apart else f"{shown} ({ratio})"


def _costs(speeds: Sequence[Speed], names: Sequence[str]) -> RenderableType:
    rows = [
        (
            name,
            _seconds(each.first_token),
            _seconds(each.load),
            size(each.memory_loaded),
            size(each.memory_peak),
            size(each.disk),
        )
        for name, each in zip(names, speeds, strict=True)
    ]
    return table(("", "first token", "loading", "memory loaded", "at its peak", "on disk"), rows)


def _engines(speeds: Sequence[Speed], names: Sequence[str]) -> list[str]:
    """Of each model: what ran it, and as what; where the places differ, on what too."""
    places = {_place(each.setting) for each in speeds}
    lines = []
    for name, each in zip(names, speeds, strict=True):
        version = each.setting.versions.get(_PACKAGES.get(each.engine, ""), "")
        words = [f"{each.engine} {version}".strip(), f"weights {each.format}"]
        lines.append(f"{name}: " + ", ".join(words + ([_place(each.setting)] if len(places) > 1 else [])))
    return lines


def _how(speeds: Sequence[Speed]) -> list[str]:
    places = {_place(each.setting): None for each in speeds}
    points = [p for each in speeds for p in each.points]
    repeats = sorted({p.repeats for p in points})
    tokens = sorted({p.tokens for p in points if p.phase == "decode"})
    lines = [next(iter(places))] if len(places) == 1 else []
    if points:
        runs = f"{repeats[0]}" if len(repeats) == 1 else f"{repeats[0]} to {repeats[-1]}"
        steps = " or ".join(map(str, tokens))
        lines.append(f"medians of {runs} runs; prompts of random tokens, decode: {steps} tokens after each")
    if len(speeds) > 1:
        lines.append(f"x: times the speed of {_names(speeds)[0]}; in brackets where the runs of the two overlap")
        if len(places) > 1:
            lines.append("these were not measured in the same place: a ratio tells of that as well")
    return lines


def _place(setting: Setting) -> str:
    threads = f"{setting.threads} thread" + ("s" if setting.threads != 1 else "")
    device = f" ({setting.device})" if setting.device != "cpu" else ""
    return f"{setting.hardware}{device}, {threads}"


def _names(speeds: Sequence[Speed]) -> list[str]:
    """The last part of each path, or as much more as tells them apart."""
    whole = [each.model.name for each in speeds]
    short = [Path(name).name or name for name in whole]
    names = [s if short.count(s) == 1 else w for s, w in zip(short, whole, strict=True)]
    return [
        name if names.count(name) == 1 else f"{name} ({each.engine})" for name, each in zip(names, speeds, strict=True)
    ]


def _seconds(value: float) -> str:
    return f"{1000 * value:.3g} ms" if value < 1 else duration(value)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"
