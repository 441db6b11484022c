"""compress(source, recipe, out): the only loop.

`prepare` reads headers, matches the recipe with the weights, tokenizes the calibration text and estimates the
cost; nothing is written. `run` does the job. No method, family or format is known here by name.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tersely import __version__
from tersely.ahead import Ahead, workers
from tersely.allocation import allocated
from tersely.calibrated import calibrated
from tersely.encoding import Format, Source, result
from tersely.errors import OutputError
from tersely.fisher import fishers
from tersely.graph import read_graph
from tersely.job import Job, prepare
from tersely.manifest import files, finished, report
from tersely.measure import Statistics
from tersely.plan.recipe import Recipe, Tuning
from tersely.results import Report, Reshaping
from tersely.rotation import rotate
from tersely.shape.run import reshape
from tersely.shape.setup import Setup
from tersely.stored import groups_from_plain, leaf_name, open_stored
from tersely.stream import Value
from tersely.tuning import tune_whole
from tersely.units import as_it_ran, encoded_free, files_of, keep, unit_of, units_of
from tersely.vocabulary.trim import Plan, put_trimmed, told, trimmed_checkpoint
from tersely.writer import Writer, refuse_existing, replace_file

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of the job that is done, 0 to 1."""


def compress(
    source: str | Path,
    recipe: str | Path | Recipe,
    out: str | Path,
    *,
    calibration: str | Path | None = None,
    format: Format | Literal["auto"] = "auto",
    device: str = "cpu",
    resume: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compress a checkpoint into a new folder that engines load; returns what was done.

    source: a folder, or a name on the Hugging Face hub. recipe: a preset's name, a TOML file, or a Recipe.
    calibration: a text file (documents separated by `<|endoftext|>` lines, or one long text), for recipes that
    measure. format: "compressed-tensors"; "tersely", which holds everything that tersely can do and loads after
    `import tersely`; "dense" for an ordinary checkpoint with the compressed values; "auto": "dense" where no weight is
    stored in fewer bits, else the first where it can say what was done, else the second.
    device: where the calibration and the encoding run. resume: continue a job that was killed.

    Raises the errors of tersely.errors; the source is never touched, and `out` appears only when it is whole.
    """
    return run(
        prepare(source, recipe, out, calibration=calibration, format=format, device=device),
        resume=resume,
        progress=progress,
    )


def run(job: Job, *, resume: bool = False, progress: Progress | None = None) -> Report:
    """Do a prepared job; see compress."""
    start = time.perf_counter()
    if not resume:
        refuse_existing(job.out.absolute())
    job.cost.check(job.out)
    say = progress or _silent
    free = [change for change in job.recipe.changes if not change.needs]
    with workers() as pool, torch.no_grad():
        # Without data the first blocks are encoded while the source is hashed.
        early = job.data is None and not resume and not free and not job.recipe.shapes and job.trim is None
        ahead = Ahead(pool, job, files_of(job)) if early else None
        facts = {
            "tersely": __version__,
            "source": job.origin.sha256(),
            "recipe": job.recipe.to_dict(),
            "calibration": None if job.data is None else job.data.sha256,
            **({} if job.trim is None else {"tokens": job.trim.sha256}),
            "format": job.format,
            "compute": f"{job.device.type} {str(job.dtype).removeprefix('torch.')}",
        }
        if resume and job.out.is_dir():
            return finished(job, facts)
        whole = [tuning for tuning in job.recipe.tunings if tuning.whole]
        if job.trim is not None and not job.steps and not job.recipe.shapes:
            return replace(_trimmed(job, job.trim, facts, resume, say), seconds=time.perf_counter() - start)
        beside = free or whole or job.recipe.shapes or job.trim
        with _between(job, facts, resume) if beside else nullcontext(Path()) as folder:
            if job.trim is not None:
                say("tokens that stay", 0.0)
                made = trimmed_checkpoint(job.checkpoint, job.trim, folder / "trimmed", facts, resume)
                job = replace(job, checkpoint=made, graph=read_graph(made), shapes=(_of_tokens(job, job.trim),))
            for number, step in enumerate(job.recipe.shapes):
                part = _share(say, number, len(job.recipe.shapes) + bool(job.steps))
                setup = Setup(job.data, facts, job.dtype, job.device, job.recipe.seed, resume, part)
                made, done = reshape(job.checkpoint, step, folder / f"shape-{number}", setup)
                job = replace(job, checkpoint=made, graph=read_graph(made), shapes=(*job.shapes, done))
            if job.recipe.shapes:
                say = _share(say, len(job.recipe.shapes), len(job.recipe.shapes) + 1)
            if free:
                say("change of basis", 0.0)
                made = rotate(job.checkpoint, free, job.recipe.seed, folder / "rotated", facts, resume)
                job = replace(job, checkpoint=made, graph=read_graph(made))
            measured = _measured_of_weights(job, say)
            job = replace(job, steps=allocated(job, say))
            if whole:
                encoded = replace(job, out=folder / "encoded", format="tersely")
                if not encoded.out.is_dir():
                    _encode(encoded, facts, measured, resume, pool, None, say)
                result = _tuned(job, encoded.out, facts, whole, resume, say)
            else:
                result = _encode(job, facts, measured, resume, pool, ahead, say)
    say("finished", 1.0)
    return replace(result, seconds=time.perf_counter() - start)


def _trimmed(job: Job, trim: Plan, facts: Mapping[str, Any], resume: bool, say: Progress) -> Report:
    """Write a model of which nothing changes but its vocabulary."""
    writer = Writer(job.out, facts, resume=resume)
    try:
        units = put_trimmed(writer, job.checkpoint, job.graph, trim, say)
        made = replace(job, checkpoint=trim.checkpoint, shapes=(_of_tokens(job, trim),))
        return _finish(made, writer, facts, units, [])
    finally:
        writer.close()


def _of_tokens(job: Job, trim: Plan) -> Reshaping:
    """The trim as a step that left a smaller shape."""
    assert job.recipe.trim is not None
    before, after = job.checkpoint.parameters, trim.checkpoint.parameters
    return Reshaping("tokens", job.recipe.trim.method.name, before, after, {}, told(trim.facts))


@contextmanager
def _between(job: Job, facts: Mapping[str, Any], resume: bool) -> Iterator[Path]:
    """Where folders lie that are only read by what comes after them; gone when the job is done.

    OutputError where those of another job lie there, or of this one without `resume`.
    """
    folder = job.out.with_name(f"{job.out.name}.between")
    record, ours = folder / "job.json", json.dumps(facts, indent=2, sort_keys=True).encode()
    if folder.exists():
        if not resume:
            raise OutputError(f"{folder} holds an unfinished job; continue it with --resume, or remove that folder")
        if not record.is_file() or record.read_bytes() != ours:
            raise OutputError(f"{folder} holds another job; ask for the same job again, or remove that folder")
    else:
        folder.mkdir(parents=True)
        replace_file(record, ours)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _measured_of_weights(job: Job, say: Progress) -> Mapping[str, Tensor]:
    """What methods need of the weights themselves."""
    names = [name for name, step in job.steps.items() if "fisher" in step.needs]
    if not names or job.data is None:
        return {}
    say("gradients of the loss", 0.0)
    return fishers(job.checkpoint, job.graph, job.data.ids, names, job.device)


def _encode(
    job: Job,
    facts: Mapping[str, Any],
    measured: Mapping[str, Tensor],
    resume: bool,
    pool: ThreadPoolExecutor,
    ahead: Ahead | None,
    say: Progress,
) -> Report:
    """Encode every weight that a step selects, and write the folder."""
    writer = Writer(job.out, facts, resume=resume)
    try:
        kept = keep(job, writer, {})
        if job.data is None:
            undone = {file: units for file, units in files_of(job).items() if not writer.done(file)}
            encoded = _unmeasured(job, writer, say, ahead or Ahead(pool, job, undone))
        else:
            encoded = _calibrated(job, writer, measured, say)
        return _finish(job, writer, facts, kept, encoded)
    finally:
        writer.close()


def _finish(
    job: Job,
    writer: Writer,
    facts: Mapping[str, Any],
    kept: Sequence[str],
    encoded: Iterable[str],
    notes: Sequence[str] = (),
) -> Report:
    """Put the folder together when all units are written."""
    # Small tensors come last, to share a shard with the last blocks.
    units = sorted([*kept, *encoded], key=lambda unit: (unit == "small", unit not in kept))
    written = [writer.facts(unit) for unit in units]
    result = report(job, [row for unit in written for row in unit["rows"]], notes)
    outcome = {name: stored for unit in written for name, stored in unit["outcome"].items()}
    for scale in (name for unit in written for name in unit.get("scales", ())):
        outcome[next(name for name in outcome if name.startswith(f"{scale.rpartition('.')[0]}."))].append(scale)
    entries = {n: e for unit in written for n, e in groups_from_plain(unit["groups"], str(job.out)).items()}
    writer.finish(units, files(job, facts, outcome, entries, result))
    return result


def _tuned(
    job: Job, encoded: Path, facts: Mapping[str, Any], tunings: Sequence[Tuning], resume: bool, say: Progress
) -> Report:
    """Tune what lies encoded in a folder, the model as a whole, and write the result."""
    writer = Writer(job.out, facts, resume=resume)
    try:
        stored = open_stored(encoded)
        tuned, vectors, note = tune_whole(job, stored, tunings, say)
        kept = keep(job, writer, vectors)
        source = Source(job.checkpoint)
        source.changed |= vectors
        units = {unit: f"block-{number:05d}" for number, unit in enumerate(units_of(job))}
        for unit, file in units.items():
            if not writer.done(file):
                results = {}
                for weight in job.graph.unit(unit):
                    if weight.name in job.steps:
                        step = job.steps[weight.name]
                        own = tuned[weight.name]
                        # What no step tuned lies on the CPU.
                        value = source.value(weight, step, own.decode().device)
                        nothing = Statistics(weight.columns, value.device)
                        made = result(weight, step, value, own, nothing, job.format)
                        # The static scale of its inputs, if any: no activations are measured here.
                        leaves, held = stored.leaves(weight.name), stored.encoded(weight.name)
                        beside = {leaf_name(weight.name, n): t for n, t in leaves.items() if n not in held.tensors()}
                        results[weight.name] = replace(made, stored={**made.stored, **beside})
                writer.put(file, *unit_of(job, source, unit, results))
        return _finish(job, writer, facts, kept, list(units.values()), [note])
    finally:
        writer.close()


def _unmeasured(job: Job, writer: Writer, say: Progress, ahead: Ahead) -> Iterator[str]:
    groups = files_of(job)
    for number, (file, units) in enumerate(groups.items()):
        if not writer.done(file):
            tensors: dict[str, Tensor] = {}
            facts: dict[str, Any] = {"rows": [], "groups": [], "outcome": {}}
            for place, unit in enumerate(units):
                say(unit or "head", (number + place / len(units)) / len(groups))
                more, own = next(ahead)
                tensors |= more
                facts["rows"] += own["rows"]
                facts["groups"] += own["groups"]
                facts["outcome"] |= own["outcome"]
            writer.put(file, tensors, facts)
        yield file


def _calibrated(job: Job, writer: Writer, measured: Mapping[str, Tensor], say: Progress) -> Iterator[str]:
    """Encode block by block while the calibration text runs through the model, then the head if a step selects it."""
    named = {unit: f"block-{number:05d}" for number, unit in enumerate(units_of(job))}

    def finished(unit: str) -> Mapping[str, Value] | None:
        return as_it_ran(job, writer, named[unit], unit) if writer.done(named[unit]) else None

    for unit, results, source in calibrated(job, named, finished, measured, say):
        writer.put(named[unit], *unit_of(job, source, unit, results))
    for unit, file in named.items():
        if not writer.done(file):
            writer.put(file, *encoded_free(job, unit, measured))
        yield file


def _share(say: Progress, number: int, parts: int) -> Progress:
    """Progress of one of several parts of a job."""
    return lambda what, share: say(what, (number + share) / parts)


def _silent(_what: str, _share: float) -> None:
    pass
