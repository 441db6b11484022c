"""The demo as a page for the terminal: each step with the command that does it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tersely.checkpoint import open_checkpoint
from tersely.demo import CALIBRATION, EVALUATION, MODEL, RECIPE, WEIGHTS, Demo
from tersely.evaluation.text_result import perplexity
from tersely.graph import read_graph
from tersely.plan.cost import size
from tersely.report.blame_tables import blame_table
from tersely.report.terminal import inspection, report_table, table
from tersely.results import Estimate


def demo_page(demo: Demo) -> RenderableType:
    """Each step, the table of what it cost, and how to load the result."""
    out, checkpoint = demo.report.out, open_checkpoint(MODEL)
    model, recipe, calibration, evaluation = map(_short, (MODEL, RECIPE, CALIBRATION, EVALUATION))
    measured, checked = demo.evaluation, demo.verification
    text = measured.text
    assert text is not None
    return Group(
        _heading("1. Inspect the model in the package", f"tersely inspect {model}"),
        inspection(checkpoint, read_graph(checkpoint)),
        _heading(
            "2. Compress it",
            f"tersely compress {model} {out} --recipe {recipe} --calibration {calibration}",
        ),
        report_table(demo.report),
        _heading(
            "3. Evaluate it against the original",
            f"tersely evaluate {out} --against {model} --text {evaluation}",
        ),
        Text(
            f"{text.tokens} tokens of {text.documents} texts that neither training nor calibration "
            f"saw.\n{measured.verdict}"
        ),
        _side_by_side(demo),
        _heading(
            "4. Find where it lost", f"tersely blame {out} --against {model} --text {evaluation} --weights {WEIGHTS}"
        ),
        blame_table(demo.blame),
        _heading("5. Verify the folder", f"tersely verify {out} --source {model}"),
        Text(
            f"{checked.files} files have their hashes, all {checked.source_tensors} tensors of the source "
            "are accounted for, and it runs in plain transformers"
        ),
        _heading("What it cost", ""),
        _costs(demo),
        Text(f"\n{_summary(demo)}"),
        _heading("The whole report", f"tersely report {out}"),
        Text(f"{demo.page} has pictures; open it in a browser"),
        _heading("Load it", "no tersely needed: pip install transformers compressed-tensors accelerate"),
        Text(
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f'model = AutoModelForCausalLM.from_pretrained("{out}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{out}")'
        ),
    )


def _short(path: Path) -> str:
    """Relative to the folder where the user stands, if it lies below."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _heading(title: str, command: str) -> Text:
    line = Text(f"\n{title}\n", style="bold")
    return line.append(f"  {command}\n", style="not bold dim") if command else line


def _side_by_side(demo: Demo) -> Table:
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 4, 0, 0))
    for title in ("original", "compressed"):
        made.add_column(title, max_width=70)
    sample = demo.sample
    made.add_row(*(f"{sample.prompt}{text}" for text in (sample.base, sample.model)))
    return made


def _costs(demo: Demo) -> RenderableType:
    report, found = demo.report, demo.evaluation
    before, after = demo.matrix_bytes
    text = found.text
    assert text is not None
    assert text.divergence is not None
    base, apart = text.divergence.base_loss, text.divergence
    rows = [
        ("matrices", size(before), size(after), f"{demo.matrix_ratio:.2f} times smaller"),
        (
            "all weights",
            size(report.bytes_before),
            size(report.bytes_after),
            f"{report.ratio:.2f} times smaller",
        ),
        ("bits per weight", f"{8 * report.bytes_before / report.parameters:.2f}", f"{report.bits:.2f}", ""),
        ("loss (nats a token)", _number(base), _number(text.loss), f"{_number(apart.loss_difference)} more"),
        ("perplexity", f"{perplexity(base.value):.2f}", f"{text.perplexity:.2f}", ""),
        ("KL divergence (nats a token)", "", _number(apart.kl), ""),
        ("same token most likely", "", _number(apart.top1_agreement, 100, " %"), ""),
    ]
    return table(("", "original", "compressed", "difference"), rows)


def _summary(demo: Demo) -> str:
    kept = demo.report.bytes_before - demo.matrix_bytes[0]
    share = 100 * kept / demo.report.bytes_before
    return (
        "+- is the standard error over the texts. The embedding and the norms stay in 16 bits: "
        f"{share:.0f} % of this\nsmall model, which is why all weights together shrink less than the "
        "matrices; in\nmodels of several billion parameters that share is below a tenth."
    )


def _number(estimate: Estimate, factor: float = 1, unit: str = "") -> str:
    digits = 1 if unit else 4
    return f"{factor * estimate.value:.{digits}f} +- {factor * estimate.stderr:.{digits}f}{unit}"
