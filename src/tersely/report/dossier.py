"""What a report is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tersely.results import Blame, Evaluation, Report, Speed
from tersely.results.plain import from_json, to_json


@dataclass(frozen=True)
class Dossier:
    """What is known of a model: how it was made, and what was measured of it."""

    name: str
    report: Report | None
    versions: Mapping[str, str]
    """Of what made it, from manifest.json."""
    format: str | None
    """"compressed-tensors", "dense", ...; None where the folder does not say."""
    evaluation: Evaluation | None
    blame: Blame | None
    speeds: tuple[Speed, ...]
    base_speeds: tuple[Speed, ...]
    folder: str
    """As commands on the page name it; "" for a placeholder."""


@dataclass(frozen=True)
class Dossiers:
    """The models of a page, the main one first."""

    models: tuple[Dossier, ...]


def dossiers_json(dossiers: Sequence[Dossier]) -> str:
    """The facts of the page as JSON, without where a job wrote and how long it took."""
    plain = Dossiers(
        tuple(
            dataclasses.replace(d, report=d.report and dataclasses.replace(d.report, out="", seconds=0.0))
            for d in dossiers
        )
    )
    return to_json(plain).encode("utf-8", "replace").decode()


def dossiers_from_json(text: str) -> tuple[Dossier, ...]:
    """The inverse of `dossiers_json`. Raises DataError: not its JSON."""
    return from_json(Dossiers, text).models
