"""A family table and the headers of a checkpoint -> its graph."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from tersely.checkpoint import TensorSpec
from tersely.errors import CheckpointError
from tersely.families import LOOKUPS, Family, Row, Rows, Sizes, choose_family, rows_of, words
from tersely.graph.consistency import check_complete, check_shapes
from tersely.graph.graph import Graph
from tersely.graph.weight import Kind, Weight

_ATTENTION = re.compile(r"(cross_)?(q|k|v|attn|k_rope|k_nope)|(q|kv)_latent(_in)?|heads?")


class Headers(Protocol):
    """What is read of a checkpoint here: its config, and the shapes of its tensors."""

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> dict[str, Any]: ...

    def __iter__(self) -> Iterator[str]: ...

    def spec(self, name: str) -> TensorSpec: ...


def read_graph(checkpoint: Headers) -> Graph:
    """Match every stored tensor to exactly one row of its family's table, from headers alone.

    Raises CheckpointError for an unknown family, a tensor that no row (or more than one) claims, a row
    without its tensor, and a shape or a count that contradicts the config.
    """
    where, config = f"{checkpoint.path}: ", checkpoint.config
    family = choose_family(str(config.get("model_type", "")), config, where)
    sizes = Sizes(family, config, where)
    rows = rows_of(family.name)
    claimed: list[tuple[Row, Weight]] = []
    extra: list[str] = []
    bare = bool(family.prefix) and not any(n.startswith(family.prefix) for n in checkpoint)
    for name in checkpoint:
        if not _beyond(name, family, sizes, where) and (
            claim := _claim((family.prefix + name, name) if bare else (name,), family, rows, where)
        ):
            row, groups = claim
            claimed.append((row, _weight(checkpoint.spec(name), row, groups, family, sizes, where)))
        else:
            extra.append(name)
    named: dict[tuple[str, str], str] = {}
    for _, weight in claimed:
        other = named.setdefault((weight.unit, weight.parameter), weight.name)
        if other != weight.name:
            raise CheckpointError(f"{where}{other} and {weight.name} are stored, two names of one parameter")
    stacks = list(rows.stacks)
    claimed.sort(
        key=lambda pair: (
            stacks.index(pair[1].stack),
            -1 if pair[1].block is None else pair[1].block,
            pair[0].order,
            -1 if pair[1].expert is None else pair[1].expert,
            pair[1].path,
            pair[1].leaf != "weight",
        )
    )
    graph = _assemble(family, str(config["model_type"]), [w for _, w in claimed], rows, sizes, extra)
    check_complete(graph, claimed, rows, sizes, config, where)
    check_shapes(graph, sizes, where)
    return graph


def _beyond(name: str, family: Family, sizes: Sizes, where: str) -> bool:
    """Whether a tensor belongs to a block after the last one that the model runs. Raises for one too many."""
    for stack in (s.removesuffix(".{i}") for s in family.inside):
        match = re.match(
            rf"(?:{re.escape(family.prefix)})?{re.escape(stack.removeprefix(family.prefix))}\.(\d+)\.", name
        )
        if match and int(match[1]) >= (count := sizes.need(stack)):
            extra = sizes.evaluate(family.beyond[stack]) if stack in family.beyond else 0
            if int(match[1]) >= count + (extra or 0):
                raise CheckpointError(
                    f"{where}{name} is stored, but the config says {count} blocks ({sizes.says(stack)})"
                )
            return True
    return False


def _claim(names: Sequence[str], family: Family, rows: Rows, where: str) -> tuple[Row, Mapping[str, str | None]] | None:
    """The row of a tensor (its name, or before it its name with the prefix); None if nothing reads it."""
    for name in names:
        candidates = (
            *rows.by_words.get(words(name), ()),
            *rows.by_words.get(words(name.rpartition(".")[0]), ()),
        )
        found = [(row, match) for row in candidates if (match := row.pattern.fullmatch(name))]
        if len(found) > 1:
            paths = " and ".join(row.path for row, _ in found)
            raise CheckpointError(f"{where}two rows of families/{family.name}.toml claim {name}: {paths}")
        if found:
            return found[0][0], found[0][1].groupdict()
    if any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in family.ignored):
        return None
    raise CheckpointError(
        f"{where}no row of families/{family.name}.toml claims the stored tensor {names[-1]}; this is not the "
        "model that tersely knows under that name"
    )


def _weight(
    spec: TensorSpec, row: Row, groups: Mapping[str, str | None], family: Family, sizes: Sizes, where: str
) -> Weight:
    numbers = {key: int(n) for key, n in groups.items() if key != "leaf" and n is not None}
    block, expert = numbers.get("i"), numbers.get("e")
    path = row.path
    for key, number in numbers.items():
        counted = "experts" if key == "e" else key
        if key != "i" and number >= sizes.need(counted):
            raise CheckpointError(
                f"{where}{spec.name} is stored, but the config says {sizes.need(counted)} {counted} "
                f"({sizes.says(counted)})"
            )
        path = path.replace(f"{{{key}}}", str(number))
    leaf = {"gamma": "weight", "beta": "bias"}.get(groups.get("leaf") or "", groups.get("leaf") or "")
    dimensions = len(spec.shape)
    if dimensions not in ((1, 2) if leaf == "weight" else (1,)):
        raise CheckpointError(f"{where}{spec.name} has shape {list(spec.shape)}; a vector or a matrix is expected")
    lookup = row.reads.spaces[0] in LOOKUPS
    kind: Kind = "bias" if leaf != "weight" else "norm" if dimensions == 1 else "lookup" if lookup else "linear"
    spaces = {*row.reads.spaces, *row.writes.spaces}
    if kind == "norm":
        role = "norm"
    elif lookup:
        role = "embedding" if block is None else "attention"
    elif "tokens" in row.writes.spaces:
        role = "head"
    elif "router" in spaces:
        role = "router"
    elif expert is not None:
        role = "expert"
    elif any(_ATTENTION.fullmatch(s) for s in spaces):
        role = "attention"
    else:
        role = "other" if block is None else "mlp"
    transposed = family.linear_layout == "in_out" and kind == "linear" and block is not None
    stack = row.stack if block is not None else ""
    return Weight(spec.name, path, leaf, stack, block, expert, row.reads, row.writes, kind, role, spec, transposed)


def _assemble(
    family: Family,
    model_type: str,
    weights: Sequence[Weight],
    rows: Rows,
    sizes: Sizes,
    extra: Sequence[str],
) -> Graph:
    norms = {(w.unit, w.path) for w in weights if w.kind == "norm"}
    ordered = [replace(w, role="norm") if w.kind == "bias" and (w.unit, w.path) in norms else w for w in weights]
    by_unit: dict[str, list[Weight]] = {}
    for weight in ordered:
        by_unit.setdefault(weight.unit, []).append(weight)
    tied = not any(w.role == "head" and w.kind == "linear" for w in ordered)
    head_space = next(row.reads.spaces[0] for row in rows.all if row.head)
    return Graph(
        family=family,
        model_type=model_type,
        weights=tuple(ordered),
        units=tuple(u for u in by_unit if u),
        sizes=sizes.known(),
        coordinates=_coordinates(ordered, head_space, tied, family.sizes),
        tied=tied,
        head_space=head_space,
        extra=tuple(extra),
        _by_name={w.name: w for w in ordered},
        _by_unit={unit: tuple(ws) for unit, ws in by_unit.items()},
    )


def _coordinates(weights: Sequence[Weight], head_space: str, tied: bool, sizes: Mapping[str, str]) -> Mapping[str, str]:
    """Spaces that share coordinates: joined by a vector, or by a head that is the embedding."""
    spaces = [s for w in weights for axis in (w.reads, w.writes) for s in axis.spaces if s != "_"]
    joined = {s: {s} for s in (*spaces, head_space)}

    def join(one: str, other: str) -> None:
        union = joined[one] | joined[other]
        joined.update(dict.fromkeys(union, union))

    for weight in weights:
        if weight.kind == "norm":
            join(weight.reads.spaces[0], weight.writes.spaces[0])
        elif tied and weight.role == "embedding" and weight.reads.spaces == ("tokens",):
            join(weight.writes.spaces[0], head_space)
    return {s: next((t for t in sizes if t in group), min(group)) for s, group in joined.items()}
