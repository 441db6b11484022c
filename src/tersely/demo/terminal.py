"""The demo as a page for the terminal: each step with the command that does it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tersely.checkpoint import open_checkpoint
from tersely.demo import CALIBRATION, EVALUATION, MODEL, RECIPE, TOKENS, Demo
from tersely.evaluation import Estimate, perplexity
from tersely.graph import read_graph
from tersely.plan.cost import size
from tersely.report.terminal import inspection, report_table, table


def demo_page(demo: Demo) -> RenderableType:
    """Five steps, the table of what it cost, and how to load the result."""
    out, checkpoint = demo.report.out, open_checkpoint(MODEL)
    model, recipe, calibration, evaluation = map(_short, (MODEL, RECIPE, CALIBRATION, EVALUATION))
    measured, checked = demo.evaluation, demo.verification
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
            f"{measured.tokens} tokens of {measured.documents} texts that neither training nor calibration "
            "saw; the numbers are in the table below"
        ),
        _heading("4. Let both write", f'tersely generate {out} "{demo.prompt}" --tokens {TOKENS}'),
        _side_by_side(demo),
        _heading("5. Verify the folder", f"tersely verify {out} --source {model}"),
        Text(
            f"{checked.files} files have their hashes, all {checked.source_tensors} tensors of the source "
            "are accounted for, and it runs in plain transformers"
        ),
        _heading("What it cost", ""),
        _costs(demo),
        Text(f"\n{_summary(demo)}"),
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
    made.add_row(*(f"{demo.prompt}{text}" for text in (demo.before, demo.after)))
    return made


def _costs(demo: Demo) -> RenderableType:
    report, found = demo.report, demo.evaluation
    before, after = demo.matrix_bytes
    base = found.base_loss
    assert base is not None
    rows = [
        ("matrices", size(before), size(after), f"{demo.matrix_ratio:.2f} times smaller"),
        (
            "all weights",
            size(report.bytes_before),
            size(report.bytes_after),
            f"{report.ratio:.2f} times smaller",
        ),
        ("bits per weight", f"{8 * report.bytes_before / report.parameters:.2f}", f"{report.bits:.2f}", ""),
        ("loss (nats a token)", _number(base), _number(found.loss), f"{_number(found.loss_difference)} more"),
        ("perplexity", f"{perplexity(base.value):.2f}", f"{found.perplexity:.2f}", ""),
        ("KL divergence (nats a token)", "", _number(found.kl), ""),
        ("same token most likely", "", _number(found.top1_agreement, 100, " %"), ""),
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


def _number(estimate: Estimate | None, factor: float = 1, unit: str = "") -> str:
    assert estimate is not None
    digits = 1 if unit else 4
    return f"{factor * estimate.value:.{digits}f} +- {factor * estimate.stderr:.{digits}f}{unit}"
