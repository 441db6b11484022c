"""Quality on the text: loss, and divergence from the base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from tersely.report.cells import TIMES, Cell, Figure, Table, bin_name, exponential, measured, percent, percentile, short
from tersely.report.charts import Series, lines, number
from tersely.results import Bin, Divergence, TextResult


def text_section(text: TextResult) -> dict[str, Any]:
    d = text.whole
    head = f"{text.tokens:,} predicted tokens of {text.documents:,} {text.kind}"
    head += f" (of {text.available:,})" if text.available > text.documents else ""
    head += f", at most {text.context:,} tokens each"
    body = [
        (
            Cell("loss, nats a token"),
            measured(text.loss),
            measured(d.base_loss) if d else Cell(""),
            measured(d.loss_difference, sign=True) if d else Cell(""),
        ),
        (
            Cell("perplexity"),
            Cell(number(text.perplexity, 4)),
            Cell(number(exponential(d.base_loss.value), 4) if d else ""),
            Cell(f"{TIMES} {number(exponential(d.loss_difference.value), 4)}" if d else ""),
        ),
        (Cell("bits per byte"), measured(text.bits_per_byte), Cell(""), Cell("")),
    ]
    figures = []
    for key, bins, label in (
        ("position", text.by_position, "place of the token in its sequence"),
        ("frequency", text.by_frequency, "times that the token stands in the text"),
    ):
        if bins:
            names = [bin_name(b) for b in bins]
            drawn = [Series("model", _points(bins, "loss"), "model")]
            if any(b.base_loss for b in bins):
                drawn.append(Series("base", _points(bins, "base_loss"), "base"))
            told = "by position" if key == "position" else "by token frequency"
            title = f"Loss {told}"
            svg = lines(f"loss-{key}", title, drawn, x_label=label, y_label="nats a token", names=names)
            figures.append(Figure(title, "", Markup(svg)))
            if any(b.kl for b in bins):
                title = f"KL {told}"
                svg = lines(
                    f"kl-{key}",
                    title,
                    [Series("", _points(bins, "kl"), "model")],
                    x_label=label,
                    y_label="nats a token",
                    names=names,
                    zero=True,
                )
                figures.append(Figure(title, "", Markup(svg)))
    return {
        "name": short(text.text, 200),
        "head": head,
        "sha256": text.sha256,
        "table": Table("The text", ("", "model", "base", "difference"), tuple(body)),
        "divergence": _divergence(text.divergence, text.documents) if text.divergence else None,
        "figures": figures,
        "bins": [
            _bin_table("By place in the sequence", "place", text.by_position),
            _bin_table("By how often the token stands in the text", "times", text.by_frequency),
        ],
    }


def _divergence(d: Divergence, documents: int) -> dict[str, Any]:
    body = [
        ("KL divergence, nats a token", "how far the predictions moved; 0: not at all", measured(d.kl)),
        ("same top token", "both find the same token most likely", measured(d.top1_agreement, 100, " %")),
        ("same top five", "overlap of their five likeliest tokens", measured(d.top5_agreement, 100, " %")),
        ("lost", "tokens that only the base had right", measured(d.lost, 100, " %")),
        ("gained", "tokens that only the model had right", measured(d.gained, 100, " %")),
        ("mean reciprocal rank", "of the base's favourite with the model", Cell(number(d.mean_reciprocal_rank))),
    ]
    if d.outside is not None:
        body.append(("outside", "probability of tokens that only the base has", measured(d.outside, 100, " %")))
    quantiles = Table(
        "KL of a token",
        ("", *(f"{percentile(q)}" for q in d.kl_quantiles)),
        ((Cell("nats"), *(Cell(number(v)) for v in d.kl_quantiles.values())),),
    )
    ranks = Table(
        "Rank of the base's favourite with the model",
        ("", *(f"rank {r}" if not r.endswith("-") else f"rank {r[:-1]} and up" for r in d.rank)),
        ((Cell("tokens"), *(Cell(percent(v)) for v in d.rank.values())),),
    )
    known = (
        ""
        if d.vocabulary == "full"
        else f"The two have different vocabularies: both were compared on the {d.shared:,} tokens that they share."
    )
    return {
        "table": Table(
            "Against the base", ("", "value"), tuple((Cell(name, words), value) for name, words, value in body)
        ),
        "quantiles": quantiles if d.kl_quantiles else None,
        "ranks": ranks if d.rank else None,
        "vocabulary": known,
        "compared": f"Compared on {d.tokens:,} tokens of {d.documents:,} documents"
        + (f" of {documents:,}, those that both tokenizers cut alike." if d.documents < documents else "."),
    }


def _bin_table(caption: str, header: str, bins: Sequence[Bin]) -> Table | None:
    body = tuple(
        (
            Cell(bin_name(b)),
            Cell(f"{b.tokens:,}"),
            measured(b.loss),
            measured(b.base_loss) if b.base_loss else Cell(""),
            measured(b.kl) if b.kl else Cell(""),
        )
        for b in bins
    )
    return Table(caption, (header, "tokens", "loss", "loss of the base", "KL"), body) if body else None


def _points(bins: Sequence[Bin], field: str) -> tuple[tuple[float, float, float, float], ...]:
    estimates = [(i, getattr(b, field)) for i, b in enumerate(bins)]
    return tuple((float(i), e.value, e.low, e.high) for i, e in estimates if e is not None)
