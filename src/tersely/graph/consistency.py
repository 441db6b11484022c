"""Whether the weights of a graph are all that its config calls for, in the sizes that it gives."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tersely.errors import CheckpointError
from tersely.families import Row, Rows, Sizes
from tersely.graph.graph import Graph
from tersely.graph.weight import Weight


def check_complete(
    graph: Graph,
    claimed: Sequence[tuple[Row, Weight]],
    rows: Rows,
    sizes: Sizes,
    config: Mapping[str, Any],
    where: str,
) -> None:
    """Every row that the config calls for has its tensors, in every block."""
    present = {(w.unit, w.parameter) for w in graph.weights}

    def missing(unit: str, path: str, reason: str) -> CheckpointError:
        full = f"{unit}.{path}" if unit else path
        return CheckpointError(f"{where}{full} is missing: {reason}. Is a shard or an index entry lost?")

    def parameters(row: Row) -> dict[str, str]:
        """Every tensor of a row, and what the config says of how many there are."""
        paths = [row.path] if row.whole else [f"{row.path}.{x}" for x in ("weight", "bias")[: 1 + row.biased]]
        says = f" ({sizes.says(row.stack)})" if row.stack else ""
        for key in re.findall(r"\{(\w+)\}", row.path):
            counted = "experts" if key == "e" else key
            paths = [p.replace(f"{{{key}}}", str(n)) for p in paths for n in range(sizes.need(counted))]
            says = f" ({sizes.says(counted)})"
        return dict.fromkeys(paths, says)

    for stack in rows.stacks:
        table = [(row, parameters(row)) for row in rows.all if row.stack == stack]
        for block in range(sizes.need(stack) if stack else 1):
            unit = f"{stack}.{block}" if stack else ""
            options: dict[str, dict[str, dict[str, str]]] = {}
            for row, paths in table:
                if row.choice:
                    options.setdefault(row.choice, {}).setdefault(row.option, {}).update(paths)
                elif row.head and graph.tied:
                    if not config.get("tie_word_embeddings", graph.family.tied):
                        raise missing(unit, next(iter(paths)), "the config says that the head is not the embedding")
                elif not row.head and not row.optional and (not row.first or block == 0):
                    for path, says in paths.items():
                        if (unit, path) not in present:
                            raise missing(unit, path, f"the config calls for it{says}")
            for choice in options.values():
                begun = [paths for paths in choice.values() if any((unit, p) in present for p in paths)]
                if len(begun) > 1:
                    both = " and ".join(next(p for p in paths if (unit, p) in present) for paths in begun)
                    raise CheckpointError(f"{where}{unit or 'the model'} has both {both}; one was expected")
                if not begun and len(choice) > 1:
                    firsts = {next(iter(paths.items())): None for paths in choice.values()}
                    raise missing(
                        unit, " or ".join(p for p, _ in firsts), f"it has one of these{next(iter(firsts))[1]}"
                    )
                for path, says in begun[0].items() if begun else ():
                    if (unit, path) not in present:
                        raise missing(unit, path, f"what goes with it is stored{says}")
    by_row: dict[int, list[Weight]] = {}
    for row, weight in claimed:
        by_row.setdefault(row.order, []).append(weight)
    plain_norms = [
        w
        for row, w in claimed
        if w.kind == "norm" and not re.search(r"\{(?!i\})", row.path) and graph.family.norm == "layer"
    ]
    for alike in (*by_row.values(), plain_norms):
        have = {(w.unit, f"{w.path}.bias") in present for w in alike if w.kind != "bias"}
        if have == {True, False}:
            lacks = next(w for w in alike if w.kind != "bias" and (w.unit, f"{w.path}.bias") not in present)
            raise missing(lacks.unit, f"{lacks.path}.bias", "the like of it is stored elsewhere in the model")


def check_shapes(graph: Graph, sizes: Sizes, where: str) -> None:
    for w in graph.weights:
        if w.kind in ("norm", "bias"):
            wanted = [w.writes]
        else:
            wanted = [w.reads, w.writes] if w.transposed or w.kind == "lookup" else [w.writes, w.reads]
        for size, axis in zip(w.spec.shape, wanted, strict=True):
            parts = [graph.size(space) for space in axis.spaces]
            known = [n for n in parts if n is not None]
            if len(known) == len(parts) and size != sum(known):
                keys = ", ".join(sizes.says(graph.coordinates.get(s, s)) for s in axis.spaces)
                raise CheckpointError(
                    f"{where}{w.name} has shape {list(w.spec.shape)}, but the config says {sum(known)} for "
                    f"{' + '.join(axis.spaces)} ({keys})"
                )
