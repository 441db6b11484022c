"""What a trimmed vocabulary keeps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Trimming:
    """The rows that stay of an embedding, and why."""

    rows_before: int
    rows_after: int
    mandatory: int
    """Rows that stay whatever is counted: added tokens, those that files name, single bytes or characters."""
    uncounted: int
    """Further rows that were not counted: others are made of them, or they fill the number."""
    coverage: float | None
    """Share of the counted tokens that stay; None where no text was counted."""
    curve_rows: list[int]
    curve_coverage: list[float]
    """The share that so many rows would have kept."""
    bytes_a_row: int
    """Of all weights together that have a row for each token."""
    unreachable: list[str]
    """Tokens that were counted or asked for, but that the tokenizer never gives."""
    removed: dict[str, str]
    """Files that went, with the reason."""
    notes: list[str]
