"""What is written of a model together: units, which are its blocks, the head and what lies outside; and their facts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tersely.calibrated import encoded_tables, running
from tersely.encoding import Result, Source, encode, encode_free, require_finite, stored_bytes
from tersely.export import compressed_tensors
from tersely.job import Job
from tersely.manifest import fp8_cache
from tersely.stored import Entry, groups_from_plain, groups_to_plain, leaf_name
from tersely.stream import Value
from tersely.writer import Stored, Writer

GROUP_BYTES = 192_000_000
"""Of a file of several blocks, or of one large tensor, that becomes a shard as it lies."""


def keep(job: Job, writer: Writer, changed: Mapping[str, Tensor]) -> list[str]:
    """What lies outside the blocks and is not encoded: copied from file to file, large tensors one by one."""
    names = [w.name for w in job.graph.unit("") if w.name not in job.steps] + list(job.graph.extra)
    large = [name for name in names if job.checkpoint.spec(name).nbytes >= GROUP_BYTES]
    small = [name for name in names if name not in large]
    groups = {f"large-{n:05d}": [name] for n, name in enumerate(large)} | ({"small": small} if small else {})
    for unit, own in groups.items():
        if not writer.done(unit):
            for name in own:
                for piece in job.checkpoint.pieces(name):
                    require_finite(name, piece)
            specs = {name: job.checkpoint.spec(name) for name in own}
            stored: dict[str, Tensor | Stored] = {
                name: changed[name] if name in changed else Stored(job.checkpoint.path / spec.file, spec)
                for name, spec in specs.items()
            }
            writer.put(unit, stored, {"rows": [], "groups": [], "outcome": {name: [name] for name in own}})
    if not fp8_cache(job):
        return list(groups)
    if not writer.done("cache"):
        scales = compressed_tensors.cache_scales(job.graph)
        writer.put("cache", scales, {"rows": [], "groups": [], "outcome": {}, "scales": list(scales)})
    return [*groups, "cache"]


def units_of(job: Job) -> list[str]:
    """What is encoded, in order: the blocks, and "" for the head if a step selects it."""
    return [*job.graph.units, *([""] if any(w.name in job.steps for w in job.graph.unit("")) else [])]


def files_of(job: Job) -> dict[str, list[str]]:
    """File -> blocks that a data-free job writes together: enough of them for a shard that is not written again."""
    groups: dict[str, list[str]] = {}
    room = 0
    for unit in units_of(job):
        if room <= 0:
            groups[f"blocks-{len(groups):05d}"] = []
            room = GROUP_BYTES
        groups[f"blocks-{len(groups) - 1:05d}"].append(unit)
        room -= sum(
            w.spec.nbytes
            if w.name not in job.steps
            else stored_bytes(w, job.steps[w.name].scheme(w.rows, w.columns), job.format)
            for w in job.graph.unit(unit)
        )
    return groups


def encoded_free(
    job: Job, unit: str, measured: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Encode a unit of which no activations are measured."""
    known = measured or {}
    weights = [w for w in job.graph.unit(unit) if w.name in job.steps and w.kind == "linear"]
    source = Source(job.checkpoint)
    results = {
        w.name: encode_free(source, w, job.steps[w.name], job.format, job.device)
        for w in weights
        if w.name not in known
    }
    measured_ones = [w for w in weights if w.name in known]
    for weight, _, own in encode(source, measured_ones, job.steps, {}, job.format, job.device, known):
        results[weight.name] = own
    if not unit:
        results |= {weight.name: own for weight, _, own in encoded_tables(job, source)}
    return unit_of(job, source, unit, results)


def unit_of(
    job: Job, source: Source, unit: str, results: Mapping[str, Result]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is written of one unit: encoded weights, and all others of a block as they are; and the facts of it."""
    tensors: dict[str, Tensor] = {}
    outcome: dict[str, list[str]] = {}
    for weight in job.graph.unit(unit):
        if weight.name in results:
            stored = results[weight.name].stored
        elif unit:
            stored = {weight.name: require_finite(weight.name, source[weight.name])}
        else:
            continue
        tensors.update(stored)
        outcome[weight.name] = sorted(stored)
    encoded = [w for w in job.graph.unit(unit) if w.name in results]
    rows = [vars(results[w.name].row) for w in encoded]
    entries = {
        w.name: Entry(results[w.name].scheme, w.rows, w.columns, w.spec.dtype, w.transposed)
        for w in encoded
        if job.format != "compressed-tensors" or not results[w.name].scheme.unquantized
    }
    return tensors, {"rows": rows, "groups": groups_to_plain(entries), "outcome": outcome}


def as_it_ran(job: Job, writer: Writer, file: str, unit: str) -> dict[str, Value]:
    """The tensors of a finished unit as they ran when it was made."""
    tensors = writer.tensors(file)
    entries = groups_from_plain(writer.facts(file)["groups"], str(job.out))
    values: dict[str, Value] = {}
    for weight in job.graph.unit(unit):
        if job.format == "dense" or weight.name not in entries:
            value = tensors[weight.name] if weight.name in tensors else job.checkpoint[weight.name]
            values[weight.name] = Value(value.t() if weight.transposed and weight.kind == "linear" else value)
            continue
        prefix, entry = leaf_name(weight.name, ""), entries[weight.name]
        leaves = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        values[weight.name] = running(entry.read(leaves, weight.name), entry.entrance(leaves))
    return values
