"""The same model in another folder: compressed-tensors, an ordinary checkpoint, or a checkpoint and an adapter."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from tersely import __version__
from tersely.codecs import Encoded, Scheme
from tersely.codecs.activations import layout
from tersely.codecs.low_rank import LowRank, LowRankForm
from tersely.errors import CheckpointError, UsageError
from tersely.export import compressed_tensors
from tersely.export.adapter import write_adapter
from tersely.graph import Graph, read_graph
from tersely.stored import Entry, Stored, groups_to_plain, leaf_name, open_stored
from tersely.writer import FileContent, Writer, refuse_existing

Target = Literal["compressed-tensors", "hf", "adapter"]


def export_folder(source: str | Path, out: str | Path, to: Target) -> None:
    """Write what `compress` wrote to `source` in another form.

    "compressed-tensors": for transformers and vLLM as they are. "hf": an ordinary checkpoint with the compressed
    values. "adapter": compressed-tensors without the low-rank parts, which lie in its folder adapter/ for PEFT. No
    value changes. Raises UsageError where the form cannot say what was done, before anything is written.
    """
    out = Path(out)
    refuse_existing(out.absolute())
    stored = open_stored(source)
    if not stored.entries:
        raise CheckpointError(f"{stored.path}: nothing in it is encoded; give a folder that `tersely compress` wrote")
    graph = read_graph(stored)
    entries = _entries(stored, to)
    if to == "hf":
        _check_dense(stored)
    else:
        compressed_tensors.check(graph, {name: entry.scheme for name, entry in entries.items()})
    facts = {"tersely": __version__, "export": to, "source": stored.written.sha256()}
    writer = Writer(out, facts, resume=False)
    with ExitStack() as stack:
        stack.callback(writer.close)
        outcome: dict[str, list[str]] = {}
        units = ["outside", *(f"block-{number:05d}" for number in range(len(graph.units)))]
        for unit, file in zip(("", *graph.units), units, strict=True):
            tensors: dict[str, Tensor] = {}
            for name in (*(w.name for w in graph.unit(unit)), *(() if unit else graph.extra)):
                own = _tensors(stored, name, entries)
                tensors |= own
                outcome[name] = sorted(own)
            writer.put(file, tensors, {})
        files = _files(stored, graph, entries, outcome, to)
        if to == "adapter":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "adapter"
            write_adapter(folder, graph, _low_rank(stored), str(out))
            files = {f"adapter/{path.name}": path for path in sorted(folder.iterdir())} | files
        writer.finish(units, files)


def _entries(stored: Stored, to: Target) -> dict[str, Entry]:
    """How each weight will be stored: as it is, but for what goes into the adapter."""
    if to == "hf":
        return {}
    if to == "compressed-tensors":
        entries = {name: entry for name, entry in stored.entries.items() if not entry.scheme.ordinary}
        return {name: replace(entry, scheme=layout(entry.scheme)) for name, entry in entries.items()}
    kept = {}
    for name, entry in stored.entries.items():
        forms = tuple(form for form in entry.scheme.parts if not isinstance(form, LowRankForm))
        branch = [form for form in entry.scheme.parts if isinstance(form, LowRankForm)]
        if entry.scheme.activations and not all(form.full_inputs for form in branch):
            raise UsageError(
                f"{name}: its low-rank part multiplies rounded inputs, and PEFT multiplies them as they come; compress "
                'with inputs = "full", or leave activations out'
            )
        if not forms:
            raise UsageError(
                f"{name} is two factors and nothing else, and an adapter is added to a checkpoint that holds the rest "
                "of a weight; use --to hf, which writes the product, or the folder as it is"
            )
        kept[name] = replace(entry, scheme=layout(replace(entry.scheme, parts=forms)))
    if all(len(kept[name].scheme.parts) == len(entry.scheme.parts) for name, entry in stored.entries.items()):
        raise UsageError(f"{stored.path}: no weight has a low-rank part; an adapter is for aser and lqer")
    return kept


def _check_dense(stored: Stored) -> None:
    for name, entry in stored.entries.items():
        if entry.scheme.activations or entry.scheme.hadamard:
            what = "inputs are rounded" if entry.scheme.activations else "inputs go through a Hadamard product"
            raise UsageError(f"{name}: its {what} when the model runs, which an ordinary checkpoint cannot say")


def _tensors(stored: Stored, name: str, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """What stands for a tensor of the source."""
    if name not in entries:
        return {name: stored[name]}
    encoded, forms = stored.encoded(name), entries[name].scheme.parts
    parts = [part for part in encoded.parts if part.form.kind in {form.kind for form in forms}]
    laid_out = [replace(part, form=form) for part, form in zip(parts, forms, strict=True)]  # type: ignore[type-var]
    beside = {leaf: t for leaf, t in stored.leaves(name).items() if leaf not in encoded.tensors()}
    leaves = beside | Encoded(tuple(laid_out)).tensors()
    return {leaf_name(name, leaf): tensor for leaf, tensor in leaves.items()}


def _split(encoded: Encoded) -> list[LowRank]:
    return [part for part in encoded.parts if isinstance(part, LowRank)]


def _low_rank(stored: Stored) -> dict[str, LowRank]:
    return {name: parts[0] for name in stored.entries if (parts := _split(stored.encoded(name)))}


def _files(
    stored: Stored, graph: Graph, entries: Mapping[str, Entry], outcome: Mapping[str, list[str]], to: Target
) -> dict[str, FileContent]:
    config = dict(stored.config)
    groups: dict[str, Any] = {}
    if entries:
        schemes: dict[str, Scheme] = {name: entry.scheme for name, entry in entries.items()}
        config["quantization_config"] = compressed_tensors.quantization_config(graph, schemes)
        groups = {"groups": groups_to_plain(entries)}
    before = _manifest(stored.path)
    manifest = {
        **{key: value for key, value in before.items() if key not in ("files", "tensors", "groups")},
        "export": {"to": to, "source": stored.written.sha256()},
        "tensors": dict(outcome),
        **groups,
    }

    def seal(hashes: Mapping[str, str]) -> bytes:
        return _json({**manifest, "files": dict(sorted(hashes.items()))})

    carried = {name: stored.path / name for name in stored.written.companions if name != "manifest.json"}
    return {**carried, "config.json": _json(config), "manifest.json": seal}


def _manifest(path: Path) -> dict[str, Any]:
    try:
        plain: Any = json.loads((path / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} has no manifest.json that can be read: {error}") from error
    return dict(plain)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
