"""A whole checkpoint written anew, unit by unit, as an ordinary checkpoint beside the output of a job."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tersely.checkpoint import Checkpoint
from tersely.graph import Graph, Weight
from tersely.writer import Stored, Writer

EXTRA = "extra"
"""The unit of what the model does not read."""


def units_of(graph: Graph) -> dict[str, tuple[Weight, ...]]:
    """What is read and written together: blocks, and each tensor outside them, the largest of all, by itself; writer's
    unit -> weights."""
    outside = {f"outside-{n:05d}": (weight,) for n, weight in enumerate(graph.unit(""))}
    return outside | {f"block-{n:05d}": graph.unit(unit) for n, unit in enumerate(graph.units)}


def stored_in(checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, Tensor | Stored]:
    """Tensors that go from file to file as they lie: new name -> the name that they have."""
    specs = {new: checkpoint.spec(old) for new, old in names.items()}
    return {new: Stored(checkpoint.path / spec.file, spec) for new, spec in specs.items()}


def finish(writer: Writer, source: Checkpoint, graph: Graph, units: Sequence[str], config: Mapping[str, Any]) -> None:
    """Put the checkpoint together of finished units, what the model does not read, and the source's other files."""
    if graph.extra and not writer.done(EXTRA):
        writer.put(EXTRA, stored_in(source, {name: name for name in graph.extra}), {})
    companions = {name: source.path / name for name in source.companions}
    said = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    writer.finish([*units, *([EXTRA] if graph.extra else [])], {**companions, "config.json": said})
