"""What the verbs share: results on standard output, progress on standard error, and the store of runs."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from tersely.evaluation.store import Store


def show(options: argparse.Namespace, plain: Any, shown: Callable[[], Any]) -> None:
    """Print a result: `plain` with --json, else what `shown` makes."""
    if options.json:
        print(json.dumps(plain, indent=2, ensure_ascii=False, default=str))
    else:
        console(sys.stdout).print(shown(), soft_wrap=False)


def console(stream: Any) -> Console:
    """A console that takes text as it is; 160 columns where the stream is no terminal."""
    from rich.console import Console

    width = None if stream.isatty() else 160
    # Paths and tensor names may hold brackets, which are no markup.
    return Console(file=stream, highlight=False, markup=False, emoji=False, width=width)


@contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """Progress on standard error: a bar with the time left, or, where that is no terminal, a line every 20 seconds."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from tersely.plan.cost import duration

    errors = console(sys.stderr)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    start = said = time.monotonic()

    def say(what: str, share: float) -> None:
        nonlocal said
        bar.update(task, description=what, completed=share)
        now = time.monotonic()
        if not errors.is_terminal and now - said > 20 and share > 0:
            said = now
            print(f"{100 * share:3.0f} %  {what}, {duration((now - start) * (1 / share - 1))} left", file=sys.stderr)

    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        yield say


@contextmanager
def kept_runs(options: argparse.Namespace) -> Iterator[Store | None]:
    """The store of runs; None where the user wants none."""
    from tersely.evaluation.store import Store

    if getattr(options, "no_store", False):
        yield None
        return
    with Store(options.store) as store:
        yield store
