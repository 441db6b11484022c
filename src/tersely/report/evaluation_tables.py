"""Evaluations as text for the terminal: the verdict first, then the numbers it rests on."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from tersely.plan.cost import duration, size
from tersely.report.terminal import table
from tersely.results import Bin, Estimate, Evaluation, Sample, TaskResult, TextResult

_SHOWN = 10


def evaluation_page(result: Evaluation) -> RenderableType:
    """Everything that was found, the verdict first."""
    parts: list[RenderableType] = []
    if result.base is not None:
        parts.append(_heading("Verdict"))
        parts.append(Text("\n".join(dict.fromkeys([result.verdict, *(c.sentence for c in result.comparisons)]))))
    if result.text is not None:
        parts += [_heading(f"Text: {result.text.text}"), _text_table(result.text)]
        parts += [_bins("by place in the sequence", result.text.by_position)]
        parts += [_bins("by how often the token stands in this text", result.text.by_frequency)]
    if result.tasks:
        parts += [_heading("Tasks"), _task_table(result.tasks)]
    if result.samples:
        parts += [_heading("Samples, the most likely token each time"), *map(_sample, result.samples[:2])]
    if result.notes:
        parts.append(Text("\n" + "\n".join(f"note: {note}" for note in result.notes)))
    parts.append(Text(f"\n{_where(result)}", style="dim"))
    return Group(*parts)


def number(estimate: Estimate | None, factor: float = 1, digits: int = 4) -> str:
    """Value +- standard error."""
    if estimate is None:
        return ""
    return f"{factor * estimate.value:.{digits}f} +- {factor * estimate.stderr:.{digits}f}"


def interval(estimate: Estimate | None, factor: float = 1, digits: int = 4) -> str:
    """The 95 % interval."""
    if estimate is None:
        return ""
    return f"{factor * estimate.low:.{digits}f} to {factor * estimate.high:.{digits}f}"


def _text_table(text: TextResult) -> RenderableType:
    found = text.divergence
    part = "" if found is None or text.whole else f", {found.documents} of {text.documents} {text.kind}"
    rows: list[tuple[str, str, str, str]] = [("loss", number(text.loss), interval(text.loss), "nats a token")]
    if found is not None:
        rows += [
            (
                f"loss of the base{', shared tokens' if found.vocabulary == 'shared' else ''}{part}",
                number(found.base_loss),
                interval(found.base_loss),
                "",
            ),
            (
                f"difference{part}",
                number(found.loss_difference),
                interval(found.loss_difference),
                "paired; above 0: worse",
            ),
        ]
    rows += [
        ("perplexity", f"{text.perplexity:.3f}", "", ""),
        ("bits per byte", number(text.bits_per_byte), interval(text.bits_per_byte), ""),
    ]
    if found is not None:
        quantiles = found.kl_quantiles
        rows += [
            (f"KL divergence{part}", number(found.kl), interval(found.kl), "nats a token, base || model"),
            ("  of the median token", f"{quantiles['0.5']:.4f}", "", f"99th percentile {quantiles['0.99']:.3f}"),
            ("same top token", *_percent(found.top1_agreement), "%"),
            ("overlap of the top five", *_percent(found.top5_agreement), "%"),
            ("right only before", *_percent(found.lost), "% of tokens: lost"),
            ("right only now", *_percent(found.gained), "% of tokens: gained"),
            ("base's token among five", f"{100 * (found.rank['1'] + found.rank['2-5']):.2f}", "", "% of tokens"),
        ]
        if found.outside is not None:
            rows.append(("outside the shared tokens", *_percent(found.outside), "% of the base's probability"))
    rows.append(
        ("on", f"{text.tokens} tokens", "", f"{text.documents} {text.kind} of at most {text.context}"),
    )
    return table(("", "value +- standard error", "95 % interval", ""), rows, left=1)


def _percent(estimate: Estimate) -> tuple[str, str]:
    return number(estimate, 100, 2), interval(estimate, 100, 2)


def _bins(title: str, bins: Sequence[Bin]) -> RenderableType:
    rows = [
        (
            f"{each.first}" if each.first == each.last else f"{each.first} to {each.last}",
            str(each.tokens),
            f"{each.loss.value:.4f}",
            "" if each.base_loss is None else f"{each.base_loss.value:.4f}",
            "" if each.kl is None else number(each.kl),
        )
        for each in bins
    ]
    compared = any(each.kl is not None for each in bins)
    headers = (f"\n{title}", "\ntokens", "\nloss", "\nof the base", "\nKL")
    return table(headers if compared else headers[:3], [row if compared else row[:3] for row in rows])


def _task_table(tasks: Sequence[TaskResult]) -> RenderableType:
    compared = any(task.base is not None for task in tasks)
    rows = []
    for task in tasks:
        factor, digits = (100, 1) if task.metric != "score" else (1, 4)
        row = [
            f"{task.group}: {task.name}",
            task.metric,
            f"{task.items} of {task.available}",
            number(task.value, factor, digits),
        ]
        if compared:
            row += [
                number(task.base, factor, digits),
                "" if task.lost is None else f"-{task.lost} +{task.gained}",
            ]
        row.append("" if task.chance is None else f"{factor * task.chance:.1f}")
        row.append("" if task.calibration is None else f"{task.calibration.brier.value:.3f}")
        row.append("" if task.calibration is None else f"{task.calibration.error.value:.3f}")
        rows.append(tuple(row))
    middle = ("base", "flips") if compared else ()
    return table(("task", "metric", "items", "score, %", *middle, "chance", "Brier", "ECE"), rows, left=2)


def _sample(sample: Sample) -> RenderableType:
    rows = [("prompt", sample.prompt.strip()), ("model", sample.model.strip())]
    if sample.base is not None:
        rows.append(("base", sample.base.strip()))
    return table(("", ""), rows, left=2)


def _where(result: Evaluation) -> str:
    model, base, here = result.model, result.base, result.setting
    against = "" if base is None else f" against {base.name} ({base.dtype}, {size(base.bytes)})"
    return (
        f"{model.name} ({model.dtype}, {size(model.bytes)}){against}, in transformers "
        f"{here.versions.get('transformers', '')} on {here.device} ({here.hardware}, {here.threads} threads), "
        f"seed {result.seed}, {duration(result.seconds)}"
    )


def _heading(title: str) -> Text:
    return Text(f"\n{title}", style="bold")
