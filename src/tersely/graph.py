"""A model as spaces joined by weights, read from a family table and the headers of a checkpoint.

What methods need is a query here: weights that share an input, the pairs across which a scale folds, the
coordinates that a pruning may drop, what fills a parameter in memory. The tables are in `families/`.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from tersely.checkpoint import TensorSpec
from tersely.errors import CheckpointError, UsageError
from tersely.families import LOOKUPS, Axis, Family, Row, Rows, Sizes, choose_family, numbered, rows_of, words

_ATTENTION = re.compile(r"(cross_)?(q|k|v|attn|k_rope|k_nope)|(q|kv)_latent(_in)?|heads?")
_ROLES = {"attention": "attention", "mlp": "mlp", "experts": "expert", "router": "router", "head": "head"}

Kind = Literal["linear", "norm", "lookup", "bias"]


class Headers(Protocol):
    """What is read of a checkpoint here: its config, and the shapes of its tensors."""

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> dict[str, Any]: ...

    def __iter__(self) -> Iterator[str]: ...

    def spec(self, name: str) -> TensorSpec: ...


@dataclass(frozen=True)
class Weight:
    """A stored tensor and its place in the model."""

    name: str
    """As stored; may lack the family's prefix, which `path`, `stack` and `unit` always have."""
    path: str
    """Path inside the block (or the whole path, outside), expert number filled in, without the leaf."""
    leaf: str
    """"weight", "bias", or "" where the path is the whole name."""
    stack: str
    """The block list it belongs to ("model.layers"), or "" outside the blocks."""
    block: int | None
    expert: int | None
    reads: Axis
    writes: Axis
    kind: Kind
    role: str
    """attention, mlp, expert, router, head, embedding, norm or other."""
    spec: TensorSpec
    transposed: bool
    """Stored as (inputs, outputs)."""

    @property
    def unit(self) -> str:
        """What is paged in as a whole: "model.layers.3", or "" outside the blocks."""
        return "" if self.block is None else f"{self.stack}.{self.block}"

    @property
    def parameter(self) -> str:
        """Name inside the block (or whole, outside), under which transformers knows it unless it renames."""
        return f"{self.path}.{self.leaf}" if self.leaf else self.path

    @property
    def statistics(self) -> str:
        """Name of the activations that it multiplies; two weights of a block share them iff it is equal."""
        part = self.reads.parts[0]
        moment = f"@{part.moment}" if part.moment else ""
        return f"{part.space}{moment}" + ("" if self.expert is None else f" of expert {self.expert}")

    @property
    def stage(self) -> str:
        """Name of the step in a block at which it is compressed (experts go together)."""
        return self.statistics.partition(" of expert ")[0]

    @property
    def rows(self) -> int:
        """Outputs of a linear weight."""
        return self.spec.shape[1 if self.transposed else 0]

    @property
    def columns(self) -> int:
        """Inputs of a linear weight."""
        return self.spec.shape[0 if self.transposed else 1]


@dataclass(frozen=True)
class Piece:
    """What a stored tensor fills of a parameter in memory: rows [start, start + rows) of slot `index`."""

    weight: Weight
    index: int | None
    """Slot along the parameter's first axis, or None where the parameter has no expert axis."""
    start: int
    rows: int


@dataclass(frozen=True)
class Graph:
    """The weights of one checkpoint, in table order, with the sizes of their spaces."""

    family: Family
    model_type: str
    weights: tuple[Weight, ...]
    units: tuple[str, ...]
    """Blocks in the order in which they run: "model.layers.0", ... (module names, prefix included)."""
    sizes: Mapping[str, int]
    """What the config gives: spaces, head counts, lengths of the block lists."""
    coordinates: Mapping[str, str]
    """Space -> the space whose coordinates it has ("attn_in" -> "residual"); every space is a key."""
    tied: bool
    """The head is not stored: it is the embedding. A stored head counts, whatever the config says."""
    head_space: str
    """What the head reads, stored or tied."""
    extra: tuple[str, ...]
    """Stored tensors that the model does not read (ignored buffers, blocks beyond the config's count)."""
    _by_name: Mapping[str, Weight] = field(repr=False, compare=False)
    _by_unit: Mapping[str, tuple[Weight, ...]] = field(repr=False, compare=False)

    def weight(self, name: str) -> Weight:
        return self._by_name[name]

    def unit(self, unit: str) -> tuple[Weight, ...]:
        """Weights of one block, or with "" those outside the blocks."""
        return self._by_unit.get(unit, ())

    def readers(self, space: str) -> tuple[Weight, ...]:
        return tuple(w for w in self.weights if w.kind != "bias" and space in w.reads.spaces)

    def writers(self, space: str) -> tuple[Weight, ...]:
        """Weights and biases that write a space."""
        return tuple(w for w in self.weights if space in w.writes.spaces)

    def size(self, space: str) -> int | None:
        """Number of coordinates of a space; None where no config key gives it."""
        return self.sizes.get(self.coordinates.get(space, space))

    @property
    def head(self) -> Weight | None:
        """The stored weight that gives the logits; None where it is tied to the embedding."""
        return next((w for w in self.weights if w.role == "head" and w.kind == "linear"), None)

    @property
    def has_experts(self) -> bool:
        return any(w.expert is not None for w in self.weights)

    def stages(self, unit: str) -> tuple[str, ...]:
        """Steps of a block in the order in which its weights run (q/k/v, then o, then gate/up, then down)."""
        return tuple(dict.fromkeys(w.stage for w in self.unit(unit) if w.kind == "linear"))

    def parameters(self, unit: str) -> Mapping[str, tuple[Piece, ...]]:
        """What fills each parameter and buffer that transformers has in memory for a block.

        Names are those inside the block ("mlp.experts.gate_up_proj"); for unit "" whole names of what is
        outside the blocks ("transformer.wte.weight", prefix included even where it is not stored).
        """
        weights = self.unit(unit)
        table = self.family.memory.get(f"{weights[0].stack}.{{i}}" if unit and weights else "", {})
        parameters: dict[str, tuple[Piece, ...]] = {}
        moved: set[str] = set()
        for parameter, text in table.items():
            pieces: list[Piece] = []
            filled: dict[int | None, int] = {}
            for term in text.split("+"):
                pattern = re.compile(numbered(term.strip()))
                for weight in weights:
                    if weight.leaf == "weight" and pattern.fullmatch(weight.path):
                        start, rows = filled.get(weight.expert, 0), weight.spec.shape[0]
                        pieces.append(Piece(weight, weight.expert, start, rows))
                        filled[weight.expert] = start + rows
            if pieces:
                parameters[parameter] = tuple(pieces)
                moved |= {piece.weight.name for piece in pieces}
        for weight in weights:
            if weight.name not in moved:
                rows = weight.spec.shape[0] if weight.spec.shape else 1
                parameters[weight.parameter] = (Piece(weight, None, 0, rows),)
        return parameters

    def select(self, where: str) -> tuple[Weight, ...]:
        """Linear weights that a `where` pattern selects; the patterns are explained in docs/recipes.md.

        `|` joins alternatives, white space narrows, `!` negates. A term is `linear` (all linear weights of
        the blocks but routers), `attention`, `mlp`, `experts`, `router`, `head`, `blocks N` or
        `blocks A-B` (both ends included, counted over the whole model), or a glob on the path in the block
        or on the whole name (`mlp.*`, `*.down_proj`, `model.layers.0.*`).

        Routers and whatever lies outside the blocks (the head above all) are seldom meant. They are selected
        only by a term that can mean nothing else: `router`, `head`, or a glob that matches no other weight
        (`mlp.gate`, `lm_head`); so `mlp.*` and `!attention` leave the router of a mixture out.

        Raises UsageError where a term matches nothing in the model, or an alternative selects nothing.
        """
        linear = {w.name: w for w in self.weights if w.kind == "linear"}
        seldom = {w.name for w in linear.values() if w.block is None or w.role == "router"}
        chosen: set[str] = set()
        for alternative in where.split("|"):
            terms = re.findall(r"!?blocks\s+\S+|\S+", alternative)
            if not terms:
                raise UsageError(f"where = {where!r} has an empty alternative; write `linear` for all weights")
            narrowed = set(linear)
            meant = set(linear) - seldom
            for term in terms:
                found = self._term(term.removeprefix("!"), linear.values(), seldom, where)
                if term.startswith("!"):
                    narrowed -= found
                else:
                    narrowed &= found
                    meant |= found if found <= seldom else set()
            narrowed &= meant
            if not narrowed:
                raise UsageError(
                    f"where = {where!r}: `{alternative.strip()}` selects no weight of this model (its terms "
                    f"exclude one another); paths are {_paths(linear.values())}"
                )
            chosen |= narrowed
        return tuple(w for name, w in linear.items() if name in chosen)

    def _term(self, term: str, linear: Collection[Weight], seldom: set[str], where: str) -> set[str]:
        if term == "linear":
            return {w.name for w in linear} - seldom
        if match := re.fullmatch(r"blocks\s+(\d+)(?:-(\d+))?", term):
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first or last >= len(self.units):
                raise UsageError(f"where = {where!r}: `{term}`, but the model has blocks 0 to {len(self.units) - 1}")
            units = set(self.units[first : last + 1])
            return {w.name for w in linear if w.unit in units}
        if term.split(maxsplit=1)[:1] == ["blocks"]:
            raise UsageError(f"where = {where!r}: `{term}` is not a block range; write `blocks 3` or `blocks 0-3`")
        if term in _ROLES:
            found = {w.name for w in linear if w.role == _ROLES[term]}
        else:
            found = {w.name for w in linear if any(fnmatch.fnmatchcase(n, term) for n in (w.path, w.name))}
        if not found:
            known = [*_ROLES, "linear", *dict.fromkeys(w.path for w in linear)]
            near = difflib.get_close_matches(term, known, n=3)
            reason = f"did you mean {' or '.join(near)}?" if near else f"paths are {_paths(linear)}"
            if term == "head" and self.tied:
                reason = "its head is tied to the embedding"
            raise UsageError(f"where = {where!r}: `{term}` matches no linear weight of this model; {reason}")
        return found


def filled(parameter: Tensor, pieces: Sequence[Piece], values: Mapping[str, Tensor]) -> Tensor:
    """A parameter as transformers holds it, out of the weights that fill it.

    values: by stored name, linear ones as (outputs, inputs); what is not among them stays. The result has the dtype of
    the parameter, and gradients flow to the values.
    """

    def piece_of(piece: Piece) -> Tensor:
        slot = parameter if piece.index is None else parameter[piece.index]
        value = values.get(piece.weight.name)
        if value is None:
            return slot[piece.start : piece.start + piece.rows]
        return (value.t() if piece.weight.transposed else value).to(parameter.dtype)

    ordered = sorted(pieces, key=lambda piece: (piece.index or 0, piece.start))
    if len(ordered) == 1 and ordered[0].index is None:
        return piece_of(ordered[0])
    slots: dict[int | None, list[Tensor]] = {}
    for piece in ordered:
        slots.setdefault(piece.index, []).append(piece_of(piece))
    rows = [torch.cat(own) if len(own) > 1 else own[0] for own in slots.values()]
    return rows[0] if None in slots else torch.stack(rows)


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
    _check_complete(graph, claimed, rows, sizes, config, where)
    _check_shapes(graph, sizes, where)
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


def _check_complete(
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


def _check_shapes(graph: Graph, sizes: Sizes, where: str) -> None:
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


def _paths(linear: Collection[Weight]) -> str:
    paths = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", w.path) for w in linear))
    return ", ".join(paths[:12]) + (" ..." if len(paths) > 12 else "")
