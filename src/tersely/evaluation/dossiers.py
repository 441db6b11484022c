"""Everything that is known of a model: what its folder says was done, and what the store says was measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tersely.errors import CheckpointError, OutputError
from tersely.evaluation.store import Store
from tersely.evaluation.subject import subject
from tersely.evaluation.verdict import overall, settle
from tersely.report.page import Dossier, dossiers_json, render
from tersely.results import Blame, Evaluation, Report, Speed
from tersely.writer import replace_file


def write_report(
    models: Sequence[str | Path], store: Store | None, *, out: str | Path | None = None, overwrite: bool = False
) -> tuple[Path, Path]:
    """Write the page about models[0], compared with the others, and beside it the same facts as JSON.

    out: by default the model's folder with "-report.html" behind its name. Raises OutputError: a page is there
    already and must not be replaced, or cannot be written; CheckpointError: no such model.
    """
    page = Path(out) if out is not None else Path(f"{str(models[0]).rstrip('/')}-report.html")
    if page.suffix.lower() != ".html":
        raise OutputError(f"{page}: the page is HTML; give a name that ends with .html")
    _refuse(page, overwrite)
    return page, write_dossiers([dossier(model, store) for model in models], page, overwrite=overwrite)


def write_dossiers(dossiers: Sequence[Dossier], page: Path, *, overwrite: bool = False) -> Path:
    """Write the page, and beside it the same facts as JSON, whose path is returned. Raises OutputError."""
    facts = _refuse(page, overwrite)
    replace_file(page, render(dossiers).encode())
    replace_file(facts, dossiers_json(dossiers).encode())
    return facts


def _refuse(page: Path, overwrite: bool) -> Path:
    facts = page.with_suffix(".json")
    for file in (page, facts):
        if file.exists() and not overwrite:
            raise OutputError(f"{file} exists; choose another name with --out, or give --overwrite")
    return facts


def dossier(model: str | Path, store: Store | None) -> Dossier:
    """What is known of a model. Of several evaluations the newest answer to each question counts."""
    folder = Path(model)
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such model; give a folder that compress wrote, or any checkpoint")
    runs = () if store is None else store.runs(fingerprint=subject(folder, dtype="").fingerprint)
    evaluations = [run.result for run in runs if isinstance(run.result, Evaluation)]
    evaluation = merged(evaluations)
    blame = next((run.result for run in runs if isinstance(run.result, Blame)), None)
    base = next((known.base for known in (evaluation, blame) if known is not None and known.base is not None), None)
    of_base = () if store is None or base is None else store.runs(kind="speed", fingerprint=base.fingerprint)
    report, versions = _done(folder)
    return Dossier(
        name=folder.resolve().name,
        report=report,
        versions=versions,
        format=None if report is None else report.format,
        evaluation=evaluation,
        blame=blame,
        speeds=_newest(run.result for run in runs if isinstance(run.result, Speed)),
        base_speeds=_newest(run.result for run in of_base if isinstance(run.result, Speed)),
        folder=str(model),
    )


def merged(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """Several evaluations of a model, newest first, as one: of each question the newest answer.

    Those against another base than the newest one's are left out, and comparisons are corrected for their number
    anew.
    """
    if not evaluations:
        return None
    first = next((each for each in evaluations if each.base is not None), evaluations[0])
    alike = [
        each
        for each in evaluations
        if each.base is None or (first.base is not None and each.base.fingerprint == first.base.fingerprint)
    ]
    against = [each for each in alike if (each.base is None) == (first.base is None)]
    told = next((each for each in against if each.text is not None), None)
    text = None if told is None else told.text
    tasks = {task.name: task for each in reversed(against) for task in each.tasks}
    asked = {c.task: c for each in reversed(against) for c in each.comparisons if c.task is not None}
    comparisons = [*asked.values(), *(c for c in (told.comparisons if told else ()) if c.task is None)]
    settled = settle(comparisons)
    return replace(
        first,
        text=text,
        tasks=tuple(tasks.values()),
        verdict="" if first.base is None else overall(settled, None if text is None else text.whole),
        comparisons=settled,
        samples=next((each.samples for each in against if each.samples), ()),
        notes=tuple(dict.fromkeys(note for each in against for note in each.notes)),
    )


def _done(folder: Path) -> tuple[Report | None, dict[str, str]]:
    """The report and the versions of the job that wrote a folder, where one did."""
    report = None
    if (folder / "report.json").is_file():
        try:
            report = Report.from_dict(json.loads((folder / "report.json").read_text("utf-8")), out=str(folder))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder / 'report.json'}: not the report of a job ({error})") from error
    try:
        manifest: Any = json.loads((folder / "manifest.json").read_text("utf-8"))
        versions = {"tersely": str(manifest["tersely"])} | {str(k): str(v) for k, v in manifest["versions"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        versions = {}
    return report, versions


def _newest(speeds: Iterable[Speed]) -> tuple[Speed, ...]:
    """The newest of each engine."""
    found: dict[str, Speed] = {}
    for speed in speeds:
        found.setdefault(speed.engine, speed)
    return tuple(found.values())
