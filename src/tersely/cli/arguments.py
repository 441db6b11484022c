"""What each verb takes. A new verb is a function here, one line in `_parser`, and a function that does the work."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from tersely import __version__
from tersely.cli import measurements, models, runs, tables
from tersely.cli.vocabulary_arguments import add_actions

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]

_SHOWN_RUNS = 20
_MODEL = "a checkpoint folder, or a name on the Hugging Face hub"
_OTHERS = "more models, compared with the first"
_EPILOG = """\
a first job, in three commands:
  tersely inspect  path/to/model
  tersely compress path/to/model small --recipe w4a16-gptq --calibration text.txt
  tersely evaluate small --against path/to/model --text held-out.txt

exit codes: 0 done; 2 an argument or recipe; 3 the checkpoint; 4 the text; 5 the output folder; 6 it cannot fit;
7 verification failed; 130 stopped with Ctrl-C. Results go to standard output, everything else to standard error.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tersely",
        description="Make open-weights language models smaller, and prove what was kept.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tersely {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _inspect(verbs)
    _compress(verbs)
    _evaluate(verbs)
    _blame(verbs)
    _speed(verbs)
    _report(verbs)
    _runs(verbs)
    _tasks(verbs)
    _generate(verbs)
    _verify(verbs)
    _export(verbs)
    _vocab(verbs)
    _verb(verbs, "families", tables.families, "List the model families that tersely knows.")
    _verb(verbs, "methods", tables.methods, "List the compression methods and their settings.")
    _verb(verbs, "recipes", tables.recipes, "List the recipes that come with tersely.")
    _demo(verbs)
    return parser


def _verb(
    verbs: Verbs, name: str, run: Callable[[argparse.Namespace], None], text: str, **arguments: str
) -> argparse.ArgumentParser:
    """A verb with what every verb takes; `arguments` are the ones without a name, each with its help."""
    made = verbs.add_parser(name, help=text.split(". ")[0].rstrip("."), description=text)
    for argument, explained in arguments.items():
        made.add_argument(argument, help=explained)
    made.add_argument("--json", action="store_true", help="print the result as JSON")
    made.set_defaults(verb=run, name=name)
    return made


def _inspect(verbs: Verbs) -> None:
    _verb(
        verbs,
        "inspect",
        models.inspect,
        "Show parameters and bytes by role and block. Only headers are read, so it takes a moment "
        "for a model of any size.",
        model=_MODEL,
    )


def _compress(verbs: Verbs) -> None:
    made = _verb(
        verbs,
        "compress",
        models.compress,
        "Compress a checkpoint into a new folder. It prints what it will use before it starts; a job "
        "that is stopped or killed continues with --resume and ends with the same bytes.",
        model=_MODEL,
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
        choices=("auto", "compressed-tensors", "tersely", "dense"),
        default="auto",
        help="auto: compressed-tensors, which engines load as it is, wherever it can say what was done, else tersely, "
        "which transformers loads after `import tersely`; dense: an ordinary checkpoint of the same size, with the "
        "compressed values",
    )
    _device(made)
    made.add_argument("--seed", type=int, metavar="N", help="of all choices made by chance (default: the recipe's)")
    made.add_argument("--resume", action="store_true", help="continue a job that was stopped or killed")
    made.add_argument(
        "--dry-run", action="store_true", help="check everything and print the expected cost, write nothing"
    )


def _export(verbs: Verbs) -> None:
    made = _verb(
        verbs,
        "export",
        models.export,
        "Write a compressed model in the form that another engine loads. No weight is rounded again where the form can "
        "hold it as it is; what had to be rounded is said.",
        model="a folder that `tersely compress` wrote (for gguf, any checkpoint)",
        out="the file (gguf) or folder to write; it appears only when it is whole",
    )
    made.add_argument(
        "--to",
        required=True,
        choices=("gguf", "compressed-tensors", "adapter", "hf"),
        help="gguf: a file for llama.cpp; compressed-tensors: for transformers and vLLM; adapter: the same, with "
        "low-rank parts as a PEFT adapter beside it; hf: an ordinary checkpoint with the compressed values",
    )


def _evaluate(verbs: Verbs) -> None:
    made = _verb(
        verbs,
        "evaluate",
        measurements.evaluate,
        "Measure a model on a text, on tasks, or both. Against a base, everything is paired: it says what was lost, "
        "how sure that is, and what this much data could not have shown. What is measured is kept as it comes: an "
        "evaluation that is stopped or killed continues when the same command is given again.",
        model=_MODEL,
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


def _blame(verbs: Verbs) -> None:
    made = _verb(
        verbs,
        "blame",
        measurements.blame,
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


def _speed(verbs: Verbs) -> None:
    made = _verb(
        verbs,
        "speed",
        measurements.speed,
        "Measure time to the first token, tokens a second for prompts and for writing, and peak memory, over a grid "
        "of batch sizes and lengths. Several models take turns, so that their ratios are of paired runs.",
        model="a checkpoint folder, or a GGUF file",
    )
    made.add_argument("others", nargs="*", metavar="OTHERS", help=_OTHERS)
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


def _report(verbs: Verbs) -> None:
    made = _verb(
        verbs,
        "report",
        measurements.report,
        "Write a page about a compressed model: what was done, what was kept and lost, where, how fast it is. One "
        "HTML file that needs no network, and the same facts as JSON. It shows what evaluate, blame and speed have "
        "measured; with several models it compares them.",
        model="the compressed model",
    )
    made.add_argument("others", nargs="*", metavar="OTHERS", help=_OTHERS)
    made.add_argument("--out", metavar="FILE", help="the page to write (default: MODEL-report.html)")
    made.add_argument("--overwrite", action="store_true", help="replace a page that is there")
    _kept(made, none=False)


def _runs(verbs: Verbs) -> None:
    made = _verb(verbs, "runs", runs.list_runs, "List, show, compare and export what was measured.")
    _kept(made, none=False)
    made.set_defaults(limit=_SHOWN_RUNS)
    actions = made.add_subparsers(metavar="ACTION", title="actions (without one: list)")

    def action(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=text)
        made.add_argument("--store", default=argparse.SUPPRESS, metavar="FILE", help="where runs are kept")
        made.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print the result as JSON")
        made.set_defaults(verb=run)
        return made

    made = action("list", runs.list_runs, "list them, newest first")
    made.add_argument(
        "--limit", type=int, default=_SHOWN_RUNS, metavar="N", help=f"at most so many (default: {_SHOWN_RUNS})"
    )
    made = action("show", runs.show_run, "show one")
    made.add_argument("id", type=int, metavar="RUN")
    made = action("compare", runs.compare_runs, "two runs side by side, where they measured the same")
    made.add_argument("first", type=int, metavar="RUN")
    made.add_argument("second", type=int, metavar="RUN")
    made = action("export", runs.export_runs, "write all of them to a .json or .csv file")
    made.add_argument("file", metavar="FILE")
    made.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    made = action("delete", runs.delete_run, "delete one")
    made.add_argument("id", type=int, metavar="RUN")


def _vocab(verbs: Verbs) -> None:
    text = "Trim, extend, transplant, train or measure a vocabulary."
    made = verbs.add_parser("vocab", help=text.rstrip("."), description=text)
    made.set_defaults(name="vocab", json=False)
    add_actions(made)


def _tasks(verbs: Verbs) -> None:
    made = _verb(verbs, "tasks", tables.tasks, "List the tasks that come with tersely, and where their data belong.")
    made.add_argument("--data", metavar="DIR", help="the folder with the tasks' data: says what is there")


def _generate(verbs: Verbs) -> None:
    made = _verb(verbs, "generate", models.generate, "Continue a prompt.", model=_MODEL, prompt="the text to continue")
    made.add_argument("--tokens", type=int, default=128, metavar="N", help="at most so many new tokens (default: 128)")
    made.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the most likely token (default)"
    )
    _device(made)
    made.add_argument("--seed", type=int, metavar="N", help="of the draws")


def _verify(verbs: Verbs) -> None:
    made = _verb(
        verbs,
        "verify",
        models.verify,
        "Check a folder that compress wrote. Hashes of all files, an account of every tensor of the source, and a "
        "run in plain transformers.",
        model="the folder",
    )
    made.add_argument("--source", metavar="MODEL", help="also check that this is the checkpoint that was compressed")
    made.add_argument("--no-run", action="store_true", help="do not load the model")


def _demo(verbs: Verbs) -> None:
    made = _verb(
        verbs,
        "demo",
        models.demo,
        "Compress the small model in the package and measure what it cost. Nothing is downloaded.",
    )
    made.add_argument("--out", default="demo-out", metavar="DIR", help="the folder to write (default: demo-out)")


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


def _names(text: str) -> list[str]:
    """Names with commas between them."""
    return [name for piece in text.split(",") if (name := piece.strip())]


def _numbers(text: str) -> list[int]:
    """Whole numbers with commas between them."""
    return [int(name) for name in _names(text)]
