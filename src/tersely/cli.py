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

    from tersely.evaluation import Estimate

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
        resume = (
            "; what is finished is kept: start the same command with --resume" if options.name == "compress" else ""
        )
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
    from tersely.evaluation import evaluate

    with _progress() as progress:
        result = evaluate(
            options.model,
            options.text,
            against=options.against,
            context=options.context,
            samples=options.samples,
            device=options.device,
            seed=options.seed or 0,
            progress=lambda done, total: progress("evaluating", done / max(total, 1)),
        )

    def lines() -> Any:
        from tersely.report.terminal import table

        rows = [
            ("loss", _estimate(result.loss), "nats a token"),
            ("perplexity", f"{result.perplexity:.3f}", ""),
            ("bits per byte", _estimate(result.bits_per_byte), ""),
        ]
        if result.base is not None:
            rows += [
                ("loss of the base", _estimate(result.base_loss), ""),
                ("difference", _estimate(result.loss_difference), "paired; above 0: worse than the base"),
                ("KL divergence", _estimate(result.kl), "nats a token, base || model"),
                ("same top token", _estimate(result.top1_agreement, 100, " %"), ""),
            ]
        rows.append(
            (
                "on",
                f"{result.tokens} tokens",
                f"{result.documents} {result.kind} of at most {result.context}, {result.dtype}",
            )
        )
        return table(("", "value +- standard error", ""), rows, left=3)

    _show(options, json.loads(result.to_json()), lines)


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
        "Measure loss, perplexity and bits per byte on a text, with standard errors. Against a base, also the "
        "paired difference, the KL divergence and how often both find the same token most likely.",
        model=model,
    )
    made.add_argument("--against", metavar="BASE", help="the model to compare with, usually the uncompressed one")
    made.add_argument(
        "--text",
        required=True,
        metavar="FILE",
        help="documents separated by <|endoftext|> lines (FILE[-200:] takes the "
        "last 200), or one long text, cut into windows",
    )
    made.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens of a window, and at most of a document (default: what the model takes, at most 2048)",
    )
    made.add_argument("--samples", type=int, metavar="N", help="documents or windows to use (default: all)")
    _device(made)
    made.add_argument("--seed", type=int, metavar="N", help="of the choice of windows")
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


def _estimate(estimate: Estimate | None, factor: float = 1, unit: str = "") -> str:
    assert estimate is not None
    return f"{factor * estimate.value:.4f} +- {factor * estimate.stderr:.4f}{unit}"


if __name__ == "__main__":
    sys.exit(main())
