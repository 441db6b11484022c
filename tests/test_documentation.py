"""The pages of the methods say what the methods are."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tersely.methods import CUTS, DROPS, METHODS, REBASES, SPLITS, TRIMS, TUNES

PAGES = Path(__file__).parent.parent / "docs" / "methods"
EVERY: dict[str, Any] = {method.name: method for method in (*METHODS, *REBASES, *TUNES, *CUTS, *DROPS, *SPLITS, *TRIMS)}


def sections() -> Iterator[tuple[str, list[str]]]:
    """Method, and the lines of a section that has its name in the heading."""
    for page in sorted(PAGES.glob("*.md")):
        for section in re.split(r"^## ", page.read_text("utf-8"), flags=re.MULTILINE)[1:]:
            heading, *lines = section.splitlines()
            for name in re.findall(r"`(\w+)`", heading):
                if name in EVERY:
                    yield name, lines


@pytest.mark.parametrize("name", EVERY)
def test_every_method_has_a_section(name: str) -> None:
    assert name in dict(sections())


@pytest.mark.parametrize(("name", "lines"), list(sections()), ids=lambda value: value if isinstance(value, str) else "")
def test_the_defaults_of_a_page_are_those_of_the_method(name: str, lines: list[str]) -> None:
    """Rows of one or several settings, one default each: | `steps`, `batch` | 200, 8 | ..."""
    defaults = {field.name: field.default for field in dataclasses.fields(EVERY[name])}
    for line in lines:
        if not line.startswith("| `"):
            continue
        settings, values = (cell.strip() for cell in line.split("|")[1:3])
        names, said = re.findall(r"`(\w+)`", settings), re.sub(r"(?<=\d),(?=\d)", "", values).split(", ")
        if len(names) != len(said):
            continue
        for setting, value in zip(names, said, strict=True):
            if setting in defaults and not value.startswith("as"):
                assert json.loads(value.strip("`")) == defaults[setting], f"{setting} of {name}"
