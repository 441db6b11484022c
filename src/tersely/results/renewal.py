"""What a model with new tokens has of the old one."""

from __future__ import annotations

from dataclasses import dataclass

from tersely.results.plain import Measurement


@dataclass(frozen=True)
class Renewal(Measurement):
    """A vocabulary that was extended, or replaced by another."""

    method: str
    """That gave rows to new tokens."""
    rows_before: int
    rows_after: int
    copied: int
    """Rows that are old ones, bit for bit."""
    initialised: int
    fallen: int
    """Tokens that the method had no answer for: their rows are means of their pieces, or of all rows."""
    empty: int
    """Rows that no token has."""
    tokens_before: int
    """Of the texts that were given, 0 where there were none."""
    tokens_after: int
    removed: dict[str, str]
    """Files that went, with the reason."""
    notes: list[str]
