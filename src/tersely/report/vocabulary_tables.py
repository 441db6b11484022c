"""Vocabularies as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table

from tersely.plan.cost import size
from tersely.report.terminal import table
from tersely.results import Trimming
from tersely.results.renewal import Renewal
from tersely.results.vocabulary import Fertility, VocabularyUse

SHARES = (0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999, 1.0)


def trim_table(facts: Trimming) -> RenderableType:
    """What would stay."""
    gone = facts.rows_before - facts.rows_after
    lines = [
        ("rows", f"{facts.rows_before:,}", f"{facts.rows_after:,}", f"{facts.rows_after / facts.rows_before:.1%}"),
        ("stay whatever is counted", "", f"{facts.mandatory:,}", ""),
        ("were not counted", "", f"{facts.uncounted:,}", "others are made of them, or they fill the number"),
        ("bytes saved", "", size(gone * facts.bytes_a_row), ""),
    ]
    if facts.coverage is not None:
        lines.append(("counted tokens that stay", "", f"{facts.coverage:.4%}", ""))
    return table(("vocabulary", "before", "after", ""), lines)


def curve_table(facts: Trimming) -> Table:
    """How many rows hold which share of a corpus."""
    lines = []
    for share in SHARES:
        at = next((n for n, own in enumerate(facts.curve_coverage) if own >= share), None)
        if at is not None:
            rows = facts.curve_rows[at]
            saved = (facts.rows_before - rows) * facts.bytes_a_row
            lines.append((f"{share:.2%}", f"{rows:,}", f"{rows / facts.rows_before:.1%}", size(saved)))
    return table(("of the corpus", "rows", "of all rows", "saved"), lines)


def use_table(uses: Sequence[VocabularyUse]) -> RenderableType:
    """How tokenizers cut texts, a line for each group."""
    return Group(*(part for use in uses for part in (f"{use.tokenizer}: {use.size:,} tokens", _use(use), "")))


def renewal_table(found: Renewal) -> RenderableType:
    """What a new vocabulary has of the old one."""
    lines = [
        ("rows before", f"{found.rows_before:,}", ""),
        ("rows after", f"{found.rows_after:,}", f"{found.empty:,} of them without a token" if found.empty else ""),
        ("old rows, bit for bit", f"{found.copied:,}", ""),
        (f"rows by {found.method}", f"{found.initialised:,}", ""),
    ]
    if found.fallen:
        lines.append(("rows by mean", f"{found.fallen:,}", f"{found.method} had no answer for them"))
    if found.tokens_before:
        share = found.tokens_after / found.tokens_before
        lines.append(("tokens of the texts", f"{found.tokens_after:,}", f"{share:.1%} of {found.tokens_before:,}"))
    notes = [f"note: {note}" for note in found.notes]
    notes += [f"note: {name} went: {reason}" for name, reason in found.removed.items()]
    return Group(table(("vocabulary", "", ""), lines), *notes)


def _use(use: VocabularyUse) -> Table:
    headers = (
        "texts",
        "tokens",
        "tokens/word",
        "bytes/token",
        "whole words",
        "unknown",
        "byte tokens",
        "Renyi",
        "rows used",
        "by it alone",
    )
    return table(headers, [_line(own) for own in (*use.groups, *([use.total] if len(use.groups) > 1 else []))])


def _line(own: Fertility) -> tuple[str, ...]:
    return (
        own.group,
        f"{own.tokens:,}",
        f"{own.tokens_per_word:.3f}",
        f"{own.bytes_per_token:.3f}",
        f"{own.whole_words:.1%}",
        f"{own.unknown:.2%}",
        f"{own.byte_tokens:.2%}",
        f"{own.renyi_efficiency:.3f}",
        f"{own.rows:,}",
        f"{own.own_rows:,}",
    )
