"""The command line: one verb per stage. Only this module prints."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersely import __version__
from tersely.errors import TerselyError

if TYPE_CHECKING:
    from rich.console import Console

    from tersely.evaluation.store import Store

_SHOWN_RUNS = 20
_EPILOG = """\
a first job, in three commands:
  tersely inspect  path/to/model
  tersely compress path/to/model small --recipe w4a16-gptq --calibration text.txt
  tersely evaluate small --against path/to/model --text held-out.txt

exit codes: 0 done; 2 an argument or recipe; 3 the checkpoint; 4 the text; 5 the output folder; 6 it cannot fit;
7 verification failed; 130 stopped with Ctrl-C. Results go to standard output, everything else to standard error.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.verb(options)
    except TerselyError as error:
        print(f"tersely: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        again = {
            "compress": "; what is finished is kept: start the same command with --resume",
            "evaluate": "; what is measured is kept: the same command continues",
            "blame": "; what is measured is kept: the same command continues",
        }
        resume = again.get(options.name, "") if not getattr(options, "no_store", False) else ""
        print(f"tersely: stopped{resume}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    return 0


def _inspect(options: argparse.Namespace) -> None:
    from tersely.checkpoint import open_checkpoint
    from tersely.graph import read_graph
    from tersely.report.terminal import inspection, inspection_dict

    checkpoint = open_checkpoint(options.model)
    graph = read_graph(checkpoint)
    _show(options, inspection_dict(checkpoint, graph), lambda: inspection(checkpoint, graph))


def _compress(options: argparse.Namespace) -> None:
    from tersely.compression import run
    from tersely.job import prepare
    from tersely.plan.cost import duration
    from tersely.plan.recipe import load_recipe
    from tersely.report.terminal import cost_lines, report_table
    from tersely.writer import refuse_existing

    if not options.resume:
        refuse_existing(Path(options.out).absolute())
    seed = [] if options.seed is None else [f"seed={options.seed}"]
    recipe = load_recipe(options.recipe, [*options.set, *seed])
    job = prepare(
        options.model,
        recipe,
        options.out,
        calibration=options.calibration,
        format=options.format,
        device=options.device,
    )
    _console(sys.stderr).print(cost_lines(job.cost))
    if options.dry_run:
        job.cost.check(job.out)
        _show(options, dataclasses.asdict(job.cost), lambda: "dry run: nothing was written")
        return
    with _progress() as progress:
        report = run(job, resume=options.resume, progress=progress)
    _show(
        options,
        {**report.to_dict(), "out": report.out, "seconds": round(report.seconds, 2)},
        lambda: report_table(report),
    )
    _console(sys.stderr).print(
        f"\nwrote {report.out} in {duration(report.seconds)}; next: tersely evaluate {report.out} "
        f"--against {options.model} --text FILE",
        soft_wrap=True,
    )


def _evaluate(options: argparse.Namespace) -> None:
    from tersely.evaluation.evaluator import evaluate

    with _store(options) as store, _progress() as progress:
        result = evaluate(
            options.model,
            options.text,
            against=options.against,
            tasks=options.tasks,
            data=options.data,
            context=options.context,
            samples=options.samples,
            writing=options.writing,
            budget=_time(options.budget),
            device=options.device,
            seed=options.seed or 0,
            store=store,
            progress=progress,
        )
        kept = () if store is None else store.runs(kind="evaluation", fingerprint=result.model.fingerprint, limit=1)

    def page() -> Any:
        from tersely.report.evaluation_tables import evaluation_page

        return evaluation_page(result)

    _show(options, json.loads(result.to_json()), page)
    for run in kept:
        print(f"\nkept as run {run.id}; next: tersely report {options.model}", file=sys.stderr)


def _blame(options: argparse.Namespace) -> None:
    from tersely.evaluation.blame import blame
    from tersely.report.blame_tables import blame_table

    with _store(options) as store, _progress() as progress:
        result = blame(
            options.model,
            options.text,
            against=options.against,
            direction=options.direction,
            context=options.context,
            samples=options.samples,
            budget=_time(options.budget),
            weights=options.weights,
            device=options.device,
            seed=options.seed or 0,
            store=store,
            progress=progress,
        )
    _show(options, json.loads(result.to_json()), lambda: blame_table(result))


def _speed(options: argparse.Namespace) -> None:
    from tersely.evaluation.speed import speeds
    from tersely.report.speed_tables import speed_table

    with _store(options) as store, _progress() as progress:
        results = speeds(
            [options.model, *options.others],
            engine=options.engine,
            batches=options.batch,
            lengths=options.length,
            tokens=options.tokens,
            repeats=options.repeats,
            threads=options.threads,
            device=options.device,
            budget=_time(options.budget),
            progress=progress,
        )
        if store is not None:
            for result in results:
                store.add(result)
    _show(options, [json.loads(result.to_json()) for result in results], lambda: speed_table(results))


def _report(options: argparse.Namespace) -> None:
    from tersely.evaluation.dossiers import write_report

    with _store(options) as store:
        page, facts = write_report(
            [options.model, *options.others], store, out=options.out, overwrite=options.overwrite
        )
    _show(options, {"page": str(page), "json": str(facts)}, lambda: f"wrote {page} and {facts}")


def _runs(options: argparse.Namespace) -> None:
    from tersely.evaluation.comparing import compare_runs
    from tersely.evaluation.store import export
    from tersely.report.runs_tables import comparison_table, run_lines, runs_table
    from tersely.results.plain import to_plain

    with _store(options) as store:
        assert store is not None
        if options.action == "show":
            run = store.get(options.id)
            _show(options, to_plain(run), lambda: run_lines(run))
        elif options.action == "compare":
            compared = compare_runs(store.get(options.first), store.get(options.second))
            _show(options, to_plain(compared), lambda: comparison_table(compared))
        elif options.action == "export":
            file = export(store.runs(), options.file, overwrite=options.overwrite)
            _show(options, {"file": str(file)}, lambda: f"wrote {file}")
        elif options.action == "delete":
            store.delete(options.id)
            _show(options, {"deleted": options.id}, lambda: f"deleted run {options.id}")
        else:
            runs = store.runs(limit=getattr(options, "limit", _SHOWN_RUNS))
            _show(options, to_plain(runs), lambda: runs_table(runs))


def _tasks(options: argparse.Namespace) -> None:
    from tersely.evaluation.tasks import task_names
    from tersely.report.terminal import table

    found = task_names(None if options.data is None else Path(options.data))
    rows = [
        (t.name, t.group, t.title, t.metric, "" if t.items is None else str(t.items), "" if t.found else t.where)
        for t in found
    ]
    headers = ("task", "asks for", "what it is", "metric", "items", "data expected under --data")
    _show(options, [dataclasses.asdict(task) for task in found], lambda: table(headers, rows, left=4))


def _generate(options: argparse.Namespace) -> None:
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


def _verify(options: argparse.Namespace) -> None:
    from tersely.verify import verify

    result = verify(options.model, source=options.source, run=not options.no_run)
    text = (
        f"{result.folder}: {result.files} files have the hashes of the manifest; all "
        f"{result.source_tensors} tensors of the source are accounted for, {result.encoded} of them compressed"
        + ("; the source is the one that was compressed" if result.source_unchanged else "")
        + ("; it loads in transformers and runs" if result.ran else "; it was not run")
    )
    _show(options, dataclasses.asdict(result), lambda: text)


def _families(options: argparse.Namespace) -> None:
    from tersely.families import families
    from tersely.report.terminal import table

    rows = [(t, f.auto_class, f"families/{f.name}.toml") for t, f in sorted(families().items())]
    _show(
        options,
        [dict(zip(("model_type", "class", "table"), row, strict=True)) for row in rows],
        lambda: table(("model_type", "class", "table"), rows, left=3),
    )


def _methods(options: argparse.Namespace) -> None:
    from tersely.methods import METHODS
    from tersely.plan.recipe import method_fields
    from tersely.report.terminal import table

    rows = [
        (
            m.name,
            ", ".join(sorted(m.needs)) or "nothing",
            " ".join((m.__doc__ or "").split("\n")[0].split()),
            ", ".join(f"{name}={getattr(m, name)!r}" for name in method_fields(m)),
        )
        for m in METHODS
    ]
    headers = ("method", "measures", "what it does", "settings")
    _show(options, [dict(zip(headers, row, strict=True)) for row in rows], lambda: table(headers, rows, left=4))


def _recipes(options: argparse.Namespace) -> None:
    from tersely.plan.recipe import presets
    from tersely.report.terminal import table

    rows = [(name, text.splitlines()[0].lstrip("# ")) for name, text in presets().items()]
    _show(options, presets(), lambda: table(("recipe", "what it does"), rows, left=2))


def _demo(options: argparse.Namespace) -> None:
    from tersely.demo import run_demo
    from tersely.demo.terminal import demo_page

    with _progress() as progress:
        demo = run_demo(options.out, progress=progress)
    _show(options, demo.to_dict(), lambda: demo_page(demo))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tersely",
        description="Make open-weights language models smaller, and prove what was kept.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tersely {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    model = "a checkpoint folder, or a name on the Hugging Face hub"

    def verb(
        name: str, run: Callable[[argparse.Namespace], None], text: str, **arguments: str
    ) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=text.split(". ")[0].rstrip("."), description=text)
        for argument, explained in arguments.items():
            made.add_argument(argument, help=explained)
        made.add_argument("--json", action="store_true", help="print the result as JSON")
        made.set_defaults(verb=run, name=name)
        return made

    verb(
        "inspect",
        _inspect,
        "Show parameters and bytes by role and block. Only headers are read, so it takes a moment "
        "for a model of any size.",
        model=model,
    )
    made = verb(
        "compress",
        _compress,
        "Compress a checkpoint into a new folder. It prints what it will use before it starts; a job "
        "that is stopped or killed continues with --resume and ends with the same bytes.",
        model=model,
        out="the folder to write; it appears only when it is whole",
    )
    made.add_argument("--recipe", required=True, metavar="R", help="a preset (see `tersely recipes`) or a TOML file")
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting of the recipe: group=64, steps.0.bits=3, calibration.samples=64; may be repeated",
    )
    made.add_argument(
        "--calibration",
        metavar="FILE",
        help="text for recipes that measure: documents separated by <|endoftext|> "
        "lines (FILE[:256] takes the first 256), or one long text",
    )
    made.add_argument(
        "--format",
        choices=("compressed-tensors", "dense"),
        default="compressed-tensors",
        help="dense: an ordinary checkpoint of the same size, with the compressed values",
    )
    _device(made)
    made.add_argument("--seed", type=int, metavar="N", help="of all choices made by chance (default: the recipe's)")
    made.add_argument("--resume", action="store_true", help="continue a job that was stopped or killed")
    made.add_argument(
        "--dry-run", action="store_true", help="check everything and print the expected cost, write nothing"
    )
    made = verb(
        "evaluate",
        _evaluate,
        "Measure a model on a text, on tasks, or both. Against a base, everything is paired: it says what was lost, "
        "how sure that is, and what this much data could not have shown. What is measured is kept as it comes: an "
        "evaluation that is stopped or killed continues when the same command is given again.",
        model=model,
    )
    made.add_argument("--against", metavar="BASE", help="the model to compare with, usually the uncompressed one")
    _text(made, required=False, most=2048)
    made.add_argument(
        "--tasks",
        type=_names,
        default=[],
        metavar="A,B",
        help="tasks, see `tersely tasks`; any task of lm-evaluation-harness, or a YAML file of your own",
    )
    made.add_argument("--data", metavar="DIR", help="the folder with the tasks' data")
    _budget(made, "everything; sample sizes are chosen to fit")
    made.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="at most so many documents or windows, and items of each task (default: all)",
    )
    made.add_argument(
        "--writing", type=int, default=3, metavar="N", help="texts that the models continue, to look at (default: 3)"
    )
    _device(made)
    made.add_argument("--seed", type=int, metavar="N", help="of everything drawn by chance")
    _kept(made)
    made = verb(
        "blame",
        _blame,
        "Find where quality was lost. One block or weight at a time gets its original values back, and the change of "
        "the KL divergence is measured: blocks first, then the weights of the dearest ones, as far as the time goes.",
        model="the compressed model",
    )
    made.add_argument("--against", required=True, metavar="BASE", help="the model that it was made from")
    _text(made, required=True, most=512)
    made.add_argument(
        "--direction",
        choices=("restore", "spoil"),
        default="restore",
        help="restore: one site of the compressed model is set back (default); spoil: one site of the original is "
        "compressed",
    )
    _budget(made, "everything; sample sizes and sites are chosen to fit")
    made.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="documents or windows to use (default: 64; with a budget what fits, at most 256)",
    )
    made.add_argument("--weights", type=int, metavar="N", help="at most so many single weights, after the blocks")
    _device(made)
    made.add_argument("--seed", type=int, metavar="N", help="of the choice of windows")
    _kept(made)
    made = verb(
        "speed",
        _speed,
        "Measure time to the first token, tokens a second for prompts and for writing, and peak memory, over a grid "
        "of batch sizes and lengths. Several models take turns, so that their ratios are of paired runs.",
        model="a checkpoint folder, or a GGUF file",
    )
    made.add_argument("others", nargs="*", metavar="OTHERS", help="more models, compared with the first")
    made.add_argument("--engine", metavar="E", help="transformers, llama.cpp or vllm (default: by the model)")
    made.add_argument("--batch", type=_numbers, default=[1, 4], metavar="N,N", help="sequences at once (default: 1,4)")
    made.add_argument(
        "--length", type=_numbers, default=[128, 512], metavar="N,N", help="tokens of a prompt (default: 128,512)"
    )
    made.add_argument("--tokens", type=int, default=32, metavar="N", help="tokens to write (default: 32)")
    made.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="of each cell; the median counts (default: 5)"
    )
    made.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: what the engine takes)")
    _budget(made, "all models; cells that do not fit are left out and named")
    _device(made)
    _kept(made)
    made = verb(
        "report",
        _report,
        "Write a page about a compressed model: what was done, what was kept and lost, where, how fast it is. One "
        "HTML file that needs no network, and the same facts as JSON. It shows what evaluate, blame and speed have "
        "measured; with several models it compares them.",
        model="the compressed model",
    )
    made.add_argument("others", nargs="*", metavar="OTHERS", help="more models, compared with the first")
    made.add_argument("--out", metavar="FILE", help="the page to write (default: MODEL-report.html)")
    made.add_argument("--overwrite", action="store_true", help="replace a page that is there")
    _kept(made, none=False)
    made = verb("runs", _runs, "List, show, compare and export what was measured.")
    _kept(made, none=False)
    actions = made.add_subparsers(dest="action", metavar="ACTION", title="actions (without one: list)")
    listed = actions.add_parser("list", help="list them, newest first")
    listed.add_argument(
        "--limit", type=int, default=_SHOWN_RUNS, metavar="N", help=f"at most so many (default: {_SHOWN_RUNS})"
    )
    shown = actions.add_parser("show", help="show one")
    shown.add_argument("id", type=int, metavar="RUN")
    compared = actions.add_parser("compare", help="two runs side by side, where they measured the same")
    compared.add_argument("first", type=int, metavar="RUN")
    compared.add_argument("second", type=int, metavar="RUN")
    exported = actions.add_parser("export", help="write all of them to a .json or .csv file")
    exported.add_argument("file", metavar="FILE")
    exported.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    deleted = actions.add_parser("delete", help="delete one")
    deleted.add_argument("id", type=int, metavar="RUN")
    for action in (listed, shown, compared, exported, deleted):
        action.add_argument("--store", default=argparse.SUPPRESS, metavar="FILE", help="where runs are kept")
        action.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print the result as JSON")
    made = verb("tasks", _tasks, "List the tasks that come with tersely, and where their data belong.")
    made.add_argument("--data", metavar="DIR", help="the folder with the tasks' data: says what is there")
    made = verb("generate", _generate, "Continue a prompt.", model=model, prompt="the text to continue")
    made.add_argument("--tokens", type=int, default=128, metavar="N", help="at most so many new tokens (default: 128)")
    made.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the most likely token (default)"
    )
    _device(made)
    made.add_argument("--seed", type=int, metavar="N", help="of the draws")
    made = verb(
        "verify",
        _verify,
        "Check a folder that compress wrote. Hashes of all files, an account of every tensor of the source, and a "
        "run in plain transformers.",
        model="the folder",
    )
    made.add_argument("--source", metavar="MODEL", help="also check that this is the checkpoint that was compressed")
    made.add_argument("--no-run", action="store_true", help="do not load the model")
    verb("families", _families, "List the model families that tersely knows.")
    verb("methods", _methods, "List the compression methods and their settings.")
    verb("recipes", _recipes, "List the recipes that come with tersely.")
    made = verb(
        "demo",
        _demo,
        "Compress the small model in the package and measure what it cost. Nothing is downloaded.",
    )
    made.add_argument("--out", default="demo-out", metavar="DIR", help="the folder to write (default: demo-out)")
    return parser


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu (default), cuda or cuda:N")


def _text(parser: argparse.ArgumentParser, *, required: bool, most: int) -> None:
    parser.add_argument(
        "--text",
        required=required,
        metavar="FILE",
        help="documents separated by <|endoftext|> lines (FILE[-200:] takes the "
        "last 200), or one long text, cut into windows",
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help=f"tokens of a window, and at most of a document (default: what the model takes, at most {most})",
    )


def _budget(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--budget", metavar="TIME", help=f"time for {what}: 90s, 10min, 1h30min")


def _kept(parser: argparse.ArgumentParser, *, none: bool = True) -> None:
    parser.add_argument("--store", metavar="FILE", help="where runs are kept (default: one file for all of yours)")
    if none:
        parser.add_argument("--no-store", action="store_true", help="keep nothing")


def _show(options: argparse.Namespace, plain: Any, shown: Callable[[], Any]) -> None:
    if options.json:
        print(json.dumps(plain, indent=2, ensure_ascii=False, default=str))
    else:
        _console(sys.stdout).print(shown(), soft_wrap=False)


def _console(stream: Any) -> Console:
    from rich.console import Console

    width = None if stream.isatty() else 160
    # Paths and tensor names may hold brackets, which are no markup.
    return Console(file=stream, highlight=False, markup=False, emoji=False, width=width)


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """Progress on standard error: a bar with the time left, or, where that is no terminal, a line every 20 seconds."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from tersely.plan.cost import duration

    console = _console(sys.stderr)
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
        if not console.is_terminal and now - said > 20 and share > 0:
            said = now
            print(f"{100 * share:3.0f} %  {what}, {duration((now - start) * (1 / share - 1))} left", file=sys.stderr)

    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        yield say


@contextmanager
def _store(options: argparse.Namespace) -> Iterator[Store | None]:
    """The store of runs; None where the user wants none."""
    from tersely.evaluation.store import Store

    if getattr(options, "no_store", False):
        yield None
        return
    with Store(options.store) as store:
        yield store


def _time(text: str | None) -> float | None:
    from tersely.plan.cost import parse_duration

    return None if text is None else parse_duration(text)


def _names(text: str) -> list[str]:
    """Names with commas between them."""
    return [name for piece in text.split(",") if (name := piece.strip())]


def _numbers(text: str) -> list[int]:
    """Whole numbers with commas between them."""
    return [int(name) for name in _names(text)]


if __name__ == "__main__":
    sys.exit(main())
