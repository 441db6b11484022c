"""What lies beside the weights of a finished job: config, recipe, report and manifest.

They hold no times, no dates and no paths, so that equal jobs give equal bytes.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tersely import __version__
from tersely.errors import OutputError
from tersely.export import compressed_tensors
from tersely.job import Job
from tersely.report.page import Dossier, render
from tersely.results import Report, Row
from tersely.runtime.policy import CONFIG_KEY, policy_to_plain
from tersely.stored import QUANT_METHOD, Entry, groups_to_plain
from tersely.vocabulary.trim import companions_of
from tersely.writer import FileContent, clear_work, differences


def files(
    job: Job,
    facts: Mapping[str, Any],
    outcome: Mapping[str, Sequence[str]],
    entries: Mapping[str, Entry],
    report: Report,
) -> dict[str, FileContent]:
    """Name -> content of every file beside the weights.

    outcome: source tensor -> what stands for it; entries: how each encoded weight is stored.
    """
    config = dict(job.checkpoint.config)
    groups = groups_to_plain(entries)
    if job.format == "compressed-tensors":
        schemes = {name: entry.scheme for name, entry in entries.items()}
        config["quantization_config"] = compressed_tensors.quantization_config(
            job.graph, schemes, fp8_cache=fp8_cache(job)
        )
    elif job.format == "tersely":
        config["quantization_config"] = {"quant_method": QUANT_METHOD, "version": __version__, "groups": groups}
    if job.recipe.cache is not None and not fp8_cache(job):
        config[CONFIG_KEY] = policy_to_plain(job.recipe.cache)
    if job.graph.tied and any(job.graph.weight(n).role == "head" for n in job.steps):
        config["tie_word_embeddings"] = False
    manifest: dict[str, Any] = {
        "tersely": __version__,
        "versions": {p: version(p) for p in ("torch", "transformers", "compressed-tensors")}
        | {"python": platform.python_version()},
        "source": {"name": _name(job), "files": facts["source"]},
        "job": {k: v for k, v in facts.items() if k != "source"},
        "recipe_hash": job.recipe.hash,
        "seed": job.recipe.seed,
        "data": report.calibration,
        "tensors": dict(outcome),
        **({"groups": groups} if job.format == "compressed-tensors" else {}),
        "left_behind": list(job.origin.left_behind),
    }
    carried = {
        name: content
        for name, content in _companions(job).items()
        if name not in ("recipe.toml", "report.json", "report.html", "manifest.json")
    }

    def seal(hashes: Mapping[str, str]) -> bytes:
        return _json({**manifest, "files": dict(sorted(hashes.items()))})

    return {
        **carried,
        "config.json": _json(config),
        "recipe.toml": job.recipe.to_toml().encode(),
        "report.json": report.to_json().encode(),
        "report.html": _page(report, manifest["versions"]),
        "manifest.json": seal,
    }


def _companions(job: Job) -> Mapping[str, FileContent]:
    """The other files of the model."""
    if job.trim is not None:
        return companions_of(job.origin, job.trim.trimmed)
    return {name: job.origin.path / name for name in job.origin.companions}


def fp8_cache(job: Job) -> bool:
    """Whether the format itself says that keys and values are kept in FP8."""
    return job.recipe.cache is not None and job.recipe.cache.standard and job.format == "compressed-tensors"


def report(job: Job, plain: Sequence[Mapping[str, Any]], told: Sequence[str] = ()) -> Report:
    """What was done, from the facts of all units and what was told of the whole."""
    rows = tuple(Row(**row) for row in plain)
    before, parameters = job.origin.nbytes, job.origin.parameters
    after = job.checkpoint.nbytes - sum(r.bytes_before - r.bytes_after for r in rows)
    data = None
    if job.data is not None:
        data = {
            "name": job.calibration,
            "sha256": job.data.sha256,
            "kind": job.data.kind,
            "sequences": len(job.data.ids),
            "tokens": job.data.tokens,
        }
    noted: dict[tuple[int | None, str], list[str]] = {}
    for row in rows:
        if row.note:
            noted.setdefault((row.block, row.note), []).append(row.name.removesuffix(".weight"))
    notes = [f"{shape.method}: {note}" for shape in job.shapes for note in shape.notes]
    notes += [*told, *_sparsity(rows, job.checkpoint.parameters)]
    notes += [f"{', '.join(names)}: {note}" for (_, note), names in noted.items()]
    notes += [f"{n} is stored but not read by the model; carried over" for n in job.graph.extra]
    notes += [f"{n} was left behind" for n in job.origin.left_behind]
    return Report(
        source=_name(job),
        out=str(job.out),
        format=job.format,
        recipe=job.recipe.to_dict(),
        calibration=data,
        rows=rows,
        bytes_before=before,
        bytes_after=after,
        parameters=parameters,
        notes=tuple(notes),
        shapes=job.shapes,
        vocabulary=None if job.trim is None else job.trim.facts,
    )


def _sparsity(rows: Sequence[Row], parameters: int) -> list[str]:
    """What is said of zeros, where a step is for them."""
    own = [row for row in rows if row.zeros is not None]
    if not own:
        return []
    zeros, count = sum(row.zeros or 0 for row in own), sum(row.parameters for row in own)
    return [
        f"{100 * zeros / count:.2f} % of the {count:,} weights that were selected for it are zero, "
        f"{100 * zeros / parameters:.2f} % of all parameters"
    ]


def finished(job: Job, facts: Mapping[str, Any]) -> Report:
    """`--resume` of a job whose folder is whole already."""
    try:
        manifest = json.loads((job.out / "manifest.json").read_text("utf-8"))
        plain = json.loads((job.out / "report.json").read_text("utf-8"))
        before = {**manifest["job"], "source": manifest["source"]["files"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{job.out} exists, and no job of tersely left it; choose another folder") from error
    if other := list(differences(before, dict(facts))):
        raise OutputError(
            f"{job.out} exists and is the result of another job: {'; '.join(other)}. "
            "Choose another folder, or move it away"
        )
    clear_work(job.out)
    return Report.from_dict(plain, out=str(job.out))


def _page(report: Report, versions: Mapping[str, str]) -> bytes:
    """What was done, to look at. Nothing is measured yet, and the folder's own name is left out: it may change."""
    name = f"{report.source}, compressed"
    facts = dataclasses.replace(report, out="", seconds=0.0)
    dossier = Dossier(
        name=name,
        report=facts,
        versions={"tersely": __version__, **versions},
        format=report.format,
        evaluation=None,
        blame=None,
        speeds=(),
        base_speeds=(),
        folder="path/to/this/folder",
    )
    return render([dossier]).encode()


def _name(job: Job) -> str:
    """The hub name, or the folder's own name: a path would differ from machine to machine."""
    return Path(job.origin.source).resolve().name if Path(job.origin.source).exists() else job.origin.source


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
