"""What single blocks and weights cost."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from tersely.report.cells import MOST_BARS, MOST_ROWS, Cell, Figure, Table, counted, measured, short, shortened
from tersely.report.charts import Line, Mark, Series, lines, rows
from tersely.results import Blame


def blame_section(blame: Blame) -> dict[str, Any]:
    restore = blame.direction == "restore"
    told = (
        "By how much the KL divergence falls when this site alone gets the base's weights back."
        if restore
        else "The KL divergence of the base with this site alone compressed."
    )
    figures = []
    for level, title in (("block", "What each block costs"), ("weight", "What single weights cost")):
        own = sorted((s for s in blame.sites if s.level == level), key=lambda s: -s.cost.value)
        if own:
            shown = own[:MOST_BARS]
            made = [
                Line(
                    _site_name(s.name, s.block, s.level),
                    (Mark(s.cost.value, s.cost.low, s.cost.high, measured(s.cost).text),),
                )
                for s in shown
            ]
            more = f" The dearest {len(shown)} of {len(own)}." if len(own) > len(shown) else ""
            svg = rows(f"blame-{level}", title, made, unit="nats a token", bars=True)
            figures.append(Figure(title, f"{told}{more} Whiskers: 95 % intervals.", Markup(svg)))
    depth = []
    if blame.depth:
        for key, title, label, zero in (
            ("error", "Error along the depth", "relative error of the hidden states", True),
            ("cosine", "Direction along the depth", "mean cosine of the hidden states", False),
        ):
            points = tuple((float(i), v, v, v) for i, v in enumerate(getattr(p, key) for p in blame.depth))
            blocks = [str(p.block) for p in blame.depth]
            svg = lines(
                f"depth-{key}", title, [Series("", points)], x_label="block", y_label=label, names=blocks, zero=zero
            )
            depth.append(Figure(title, "", Markup(svg)))
    total = measured(blame.kl)
    body = tuple(
        (
            Cell(short(s.name.removesuffix(".weight"), 120)),
            Cell(short(s.role, 40)),
            Cell(counted(s.parameters), order=s.parameters),
            Cell(f"{s.bits:.2f}" if s.bits is not None else ""),
            Cell(measured(s.cost).text, measured(s.cost).below, order=s.cost.value),
        )
        for s in blame.sites[:MOST_ROWS]
    )
    head = f"The whole model: KL {total.text} ({total.below}) nats a token, on {blame.tokens:,} tokens of "
    head += f"{blame.documents:,} documents of {short(blame.text, 80)}. Costs of sites need not add up to it."
    return {
        "head": head,
        "figures": figures,
        "depth": depth,
        "table": Table("Sites", ("site", "part", "parameters", "bits", "cost, nats"), body, left=2, sortable=True),
        "more": max(0, len(blame.sites) - MOST_ROWS),
        "notes": shortened(blame.notes),
    }


def _site_name(name: str, block: int | None, level: str) -> str:
    path = name.removesuffix(".weight")
    if block is None:
        return short(path, 60)
    if level == "block":
        return f"block {block}"
    inside = path.partition(f".{block}.")[2] or path
    return f"{block} · {short(inside, 60)}"
