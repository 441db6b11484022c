"""The verbs that look at a model, make one, run one or check one."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tersely.cli.console import console, progress, show

if TYPE_CHECKING:
    from tersely.job import Job


def inspect(options: argparse.Namespace) -> None:
    from tersely.checkpoint import open_checkpoint
    from tersely.graph import read_graph
    from tersely.report.terminal import inspection, inspection_dict

    checkpoint = open_checkpoint(options.model)
    graph = read_graph(checkpoint)
    show(options, inspection_dict(checkpoint, graph), lambda: inspection(checkpoint, graph))


def compress(options: argparse.Namespace) -> None:
    from tersely.report.terminal import cost_lines
    from tersely.writer import refuse_existing

    if not options.resume:
        refuse_existing(Path(options.out).absolute())
    job = _job(options)
    console(sys.stderr).print(cost_lines(job.cost))
    if options.dry_run:
        job.cost.check(job.out)
        show(options, dataclasses.asdict(job.cost), lambda: "dry run: nothing was written")
    else:
        run_job(job, options)


def _job(options: argparse.Namespace) -> Job:
    from tersely.job import prepare
    from tersely.plan.reading import load_recipe

    seed = [] if options.seed is None else [f"seed={options.seed}"]
    return prepare(
        options.model,
        load_recipe(options.recipe, [*options.set, *seed]),
        options.out,
        calibration=options.calibration,
        format=options.format,
        device=options.device,
    )


def run_job(job: Job, options: argparse.Namespace) -> None:
    """Do a prepared job and print what it gave."""
    from tersely.compression import run
    from tersely.plan.cost import duration
    from tersely.report.terminal import report_table

    with progress() as say:
        report = run(job, resume=options.resume, progress=say)
    plain = {**report.to_dict(), "out": report.out, "seconds": round(report.seconds, 2)}
    show(options, plain, lambda: report_table(report))
    console(sys.stderr).print(
        f"\nwrote {report.out} in {duration(report.seconds)}; next: tersely evaluate {report.out} "
        f"--against {options.model} --text FILE",
        soft_wrap=True,
    )


def generate(options: argparse.Namespace) -> None:
    from tersely.runtime import generate

    def stream(piece: str) -> None:
        if not options.json:
            print(piece, end="", flush=True)

    text = generate(
        options.model,
        options.prompt,
        max_new_tokens=options.tokens,
        temperature=options.temperature,
        seed=options.seed or 0,
        device=options.device,
        stream=stream,
    )
    print(json.dumps({"prompt": options.prompt, "text": text}, ensure_ascii=False) if options.json else "")


def verify(options: argparse.Namespace) -> None:
    from tersely.verify import verify

    result = verify(options.model, source=options.source, run=not options.no_run)
    text = (
        f"{result.folder}: {result.files} files have the hashes of the manifest; all "
        f"{result.source_tensors} tensors of the source are accounted for, {result.encoded} of them compressed"
        + ("; the source is the one that was compressed" if result.source_unchanged else "")
        + ("; it loads in transformers and runs" if result.ran else "; it was not run")
    )
    show(options, dataclasses.asdict(result), lambda: text)


def export(options: argparse.Namespace) -> None:
    from tersely.export.folder import export_folder
    from tersely.export.gguf import write_gguf

    if options.to == "gguf":
        report = write_gguf(options.model, options.out)
        show(options, json.loads(report.to_json()), lambda: "\n".join(report.lines()))
    else:
        export_folder(options.model, options.out, options.to)
        show(options, {"out": options.out, "to": options.to}, lambda: f"wrote {options.out}")


def demo(options: argparse.Namespace) -> None:
    from tersely.demo import run_demo
    from tersely.demo.terminal import demo_page

    with progress() as say:
        made = run_demo(options.out, progress=say)
    show(options, made.to_dict(), lambda: demo_page(made))
