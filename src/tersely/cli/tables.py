"""The verbs that list what tersely comes with."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from tersely.cli.console import show


def tasks(options: argparse.Namespace) -> None:
    from tersely.evaluation.tasks import task_names
    from tersely.report.terminal import table

    found = task_names(None if options.data is None else Path(options.data))
    rows = [
        (t.name, t.group, t.title, t.metric, "" if t.items is None else str(t.items), "" if t.found else t.where)
        for t in found
    ]
    headers = ("task", "asks for", "what it is", "metric", "items", "data expected under --data")
    show(options, [dataclasses.asdict(task) for task in found], lambda: table(headers, rows, left=4))


def families(options: argparse.Namespace) -> None:
    from tersely.families import families
    from tersely.report.terminal import table

    rows = [(t, f.auto_class, f"families/{f.name}.toml") for t, f in sorted(families().items())]
    headers = ("model_type", "class", "table")
    show(options, [dict(zip(headers, row, strict=True)) for row in rows], lambda: table(headers, rows, left=3))


def methods(options: argparse.Namespace) -> None:
    from tersely.methods import CUTS, DROPS, METHODS, REBASES, SPLITS, TRIMS, TUNES, Method
    from tersely.plan.reading import method_fields
    from tersely.report.terminal import table

    stages: tuple[tuple[str, tuple[type[Method], ...]], ...] = (
        ("shape", (*TRIMS, *CUTS, *DROPS, *SPLITS)),
        ("basis", REBASES),
        ("encode", METHODS),
        ("tune", TUNES),
    )
    rows = [
        (
            m.name,
            stage,
            " ".join((m.__doc__ or "").split("\n")[0].split()),
            ", ".join(f"{name}={getattr(m, name)!r}" for name in method_fields(m)),
        )
        for stage, methods in stages
        for m in methods
    ]
    headers = ("method", "stage", "what it does", "settings")
    show(options, [dict(zip(headers, row, strict=True)) for row in rows], lambda: table(headers, rows, left=4))


def recipes(options: argparse.Namespace) -> None:
    from tersely.plan.reading import presets
    from tersely.report.terminal import table

    rows = [(name, text.splitlines()[0].lstrip("# ")) for name, text in presets().items()]
    show(options, presets(), lambda: table(("recipe", "what it does"), rows, left=2))
