"""The verb `runs`: what was measured, listed, shown, compared, exported and deleted."""

from __future__ import annotations

import argparse

from tersely.cli.console import show


def list_runs(options: argparse.Namespace) -> None:
    from tersely.evaluation.store import Store
    from tersely.report.runs_tables import runs_table
    from tersely.results.plain import to_plain

    with Store(options.store) as store:
        runs = store.runs(limit=options.limit)
    show(options, to_plain(runs), lambda: runs_table(runs))


def show_run(options: argparse.Namespace) -> None:
    from tersely.evaluation.store import Store
    from tersely.report.runs_tables import run_lines
    from tersely.results.plain import to_plain

    with Store(options.store) as store:
        run = store.get(options.id)
    show(options, to_plain(run), lambda: run_lines(run))


def compare_runs(options: argparse.Namespace) -> None:
    from tersely.evaluation.comparing import compare_runs
    from tersely.evaluation.store import Store
    from tersely.report.runs_tables import comparison_table
    from tersely.results.plain import to_plain

    with Store(options.store) as store:
        compared = compare_runs(store.get(options.first), store.get(options.second))
    show(options, to_plain(compared), lambda: comparison_table(compared))


def export_runs(options: argparse.Namespace) -> None:
    from tersely.evaluation.store import Store, export

    with Store(options.store) as store:
        file = export(store.runs(), options.file, overwrite=options.overwrite)
    show(options, {"file": str(file)}, lambda: f"wrote {file}")


def delete_run(options: argparse.Namespace) -> None:
    from tersely.evaluation.store import Store

    with Store(options.store) as store:
        store.delete(options.id)
    show(options, {"deleted": options.id}, lambda: f"deleted run {options.id}")
