"""Blame as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from tersely.plan.cost import size
from tersely.report.terminal import table
from tersely.results import Blame, Depth, Estimate, Site

_BLOCKS, _WEIGHTS, _DEPTHS, _NOTES = 12, 10, 6, 10
_WIDTHS = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16}


def blame_table(result: Blame) -> RenderableType:
    """The dearest blocks, the dearest weights, and the error along the depth.

    `to restore`: the bytes that the site would grow by with the base's weights, in the base's dtype; `per MB`: what
    the KL falls by for each 10^6 of these, which says where more bits are well spent.
    """
    cost = "KL falls by" if result.direction == "restore" else "KL alone"
    headers = ("block", "bits", cost, "+-", "of all", "to restore", "per MB")
    blocks = [site for site in result.sites if site.block is None or site.level == "block"]
    weights = [site for site in result.sites if site not in blocks]
    parts: list[RenderableType] = [Text(_headline(result) + "\n")]
    if blocks:
        parts.append(table(headers, [_row(site, result) for site in blocks[:_BLOCKS]]))
        parts += _more(len(blocks) - _BLOCKS)
    if weights:
        parts.append(Text(""))
        parts.append(table(("weight", *headers[1:]), [_row(site, result) for site in weights[:_WEIGHTS]]))
        parts += _more(len(weights) - _WEIGHTS)
    if best := _best(result):
        parts.append(Text(f"\nmost for its bytes: {best}"))
    if result.depth:
        parts.append(Text(f"\nerror along the depth: {_along(result.depth)}"))
    if result.notes:
        parts.append(Text("\n" + "\n".join(f"note: {note}" for note in result.notes[:_NOTES])))
        parts += _more(len(result.notes) - _NOTES)
    return Group(*parts)


def _headline(result: Blame) -> str:
    how = (
        "each line: one site with the base's weights"
        if result.direction == "restore"
        else "each line: the base with one site compressed"
    )
    return (
        f"KL {_nats(result.kl)} nats a token: {result.model.name} against {result.base.name} on "
        f"{result.documents} text{'s' * (result.documents != 1)}, {result.tokens} tokens\n{how}"
    )


def _row(site: Site, result: Blame) -> tuple[str, ...]:
    extra = _bytes(site, result)
    return (
        site.name.removesuffix(".weight"),
        "" if site.bits is None else f"{site.bits:.2f}",
        f"{site.cost.value:.4f}",
        _error(site.cost),
        f"{100 * site.cost.value / result.kl.value:.1f} %" if result.kl.value else "",
        size(extra) if extra else "",
        f"{1e6 * site.cost.value / extra:.3g}" if extra else "",
    )


def _bytes(site: Site, result: Blame) -> float | None:
    """By how much a site grows with the base's weights; None where that is not known."""
    width = _WIDTHS.get(result.base.dtype)
    return None if width is None or site.bits is None else max(0.0, site.parameters * (width - site.bits) / 8)


def _best(result: Blame) -> str:
    """The site with the largest gain for a byte, of those whose gain is more than chance; "" where there is none."""
    sure = [
        (site.cost.value / extra, site)
        for site in result.sites
        if site.cost.low > 0 and (extra := _bytes(site, result))
    ]
    if len(sure) < 2:
        return ""
    gain, site = max(sure, key=lambda pair: pair[0])
    return f"{site.name.removesuffix('.weight')}, {site.cost.value:.4f} nats for {size(site.cost.value / gain)}"


def _along(depth: Sequence[Depth]) -> str:
    """Some of the blocks, evenly spread, the last one among them."""
    count = min(_DEPTHS, len(depth))
    chosen = [depth[round((n + 1) * len(depth) / count) - 1] for n in range(count)]
    return ", ".join(f"{100 * each.error:.3g} % behind block {each.block}" for each in chosen)


def _nats(estimate: Estimate) -> str:
    error = _error(estimate)
    return f"{estimate.value:.4f}" + (f" +- {error}" if error else "")


def _error(estimate: Estimate) -> str:
    return f"{estimate.stderr:.4f}" if estimate.stderr < float("inf") else ""


def _more(count: int) -> list[RenderableType]:
    return [Text(f"and {count} more, with --json")] if count > 0 else []
