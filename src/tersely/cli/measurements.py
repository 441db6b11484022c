"""The verbs that measure a model, and show what was measured."""

from __future__ import annotations

import argparse
import json
import sys

from tersely.cli.console import kept_runs, progress, show


def evaluate(options: argparse.Namespace) -> None:
    from tersely.evaluation.evaluator import evaluate
    from tersely.report.evaluation_tables import evaluation_page

    with kept_runs(options) as store, progress() as say:
        result = evaluate(
            options.model,
            options.text,
            against=options.against,
            tasks=options.tasks,
            data=options.data,
            context=options.context,
            samples=options.samples,
            writing=options.writing,
            budget=_seconds(options.budget),
            device=options.device,
            seed=options.seed or 0,
            store=store,
            progress=say,
        )
        kept = () if store is None else store.runs(kind="evaluation", fingerprint=result.model.fingerprint, limit=1)
    show(options, json.loads(result.to_json()), lambda: evaluation_page(result))
    for run in kept:
        print(f"\nkept as run {run.id}; next: tersely report {options.model}", file=sys.stderr)


def blame(options: argparse.Namespace) -> None:
    from tersely.evaluation.blame import blame
    from tersely.report.blame_tables import blame_table

    with kept_runs(options) as store, progress() as say:
        result = blame(
            options.model,
            options.text,
            against=options.against,
            direction=options.direction,
            context=options.context,
            samples=options.samples,
            budget=_seconds(options.budget),
            weights=options.weights,
            device=options.device,
            seed=options.seed or 0,
            store=store,
            progress=say,
        )
    show(options, json.loads(result.to_json()), lambda: blame_table(result))


def speed(options: argparse.Namespace) -> None:
    from tersely.evaluation.speed import race
    from tersely.report.speed_tables import speed_table

    with kept_runs(options) as store, progress() as say:
        results = race(
            [options.model, *options.others],
            engine=options.engine,
            batches=options.batch,
            lengths=options.length,
            tokens=options.tokens,
            repeats=options.repeats,
            threads=options.threads,
            device=options.device,
            budget=_seconds(options.budget),
            progress=say,
        ).speeds
        if store is not None:
            for result in results:
                store.add(result)
    show(options, [json.loads(result.to_json()) for result in results], lambda: speed_table(results))


def report(options: argparse.Namespace) -> None:
    from tersely.evaluation.dossiers import write_report

    with kept_runs(options) as store:
        page, facts = write_report(
            [options.model, *options.others], store, out=options.out, overwrite=options.overwrite
        )
    show(options, {"page": str(page), "json": str(facts)}, lambda: f"wrote {page} and {facts}")


def _seconds(text: str | None) -> float | None:
    from tersely.plan.cost import parse_duration

    return None if text is None else parse_duration(text)
