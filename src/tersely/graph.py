"""A model as spaces joined by weights, read from a family table and the headers of a checkpoint.

A transformer is a set of *spaces* (residual, attn_in, q, k, v, attn, mlp_in, mlp, tokens ...) joined by
weights. A table in `families/` has one row per stored weight, `"path" = "space it reads -> space it writes"`:

    "self_attn.q_proj"      stands for the tensors self_attn.q_proj.weight and, where stored, .bias
    "pooler.dense+"         both are always stored
    "gate.some_bias!"       the path is the whole tensor name; such a vector is added to what it writes
    "encoder.embed_tokens?" a row that a checkpoint of the family may lack
    "wi_0?ffn=gated"        rows of one option come together; a block holds one option of each choice
                            (none, where the choice has a single option)
    "relative_bias?0"       only block 0 has it
    "experts.{e}.w1"        one weight per expert, each with statistics of its own
    "q_norms.{heads}"       one weight for each of `heads` (a key of `sizes`)
    "attn_in -> q+k+v"      fused along that axis;  heads(q+k+v): interleaved, head by head
    "mlp_in -> act(mlp)"    a non-linearity lies between the weight and the space: no scale passes. Where
                            another weight of the block writes the space too, they multiply (a gate)
    "residual@mlp -> q"     the residual space, at another moment: the same coordinates, other activations
    "_ -> tokens"           reads nothing
    ""                      removes a row that came with `like`

A vector (1-D, a norm) carries coordinates over: what it reads and what it writes are one coordinate system.

Tables also give: `sizes` (space -> expression over config keys; `|` separates fallbacks), `mixes` (spaces
that share coordinates head by head), `memory` (what transformers renames or stacks when it loads: parameter
in the block = stored paths; `{e}` stacks over experts, `a + b` concatenates rows), `class` (the Auto class),
`prefix` (a prefix that checkpoints may leave out), `linear_layout`, `norm` ("rms" or "layer"), `norm_offset`
(the norm multiplies by offset + weight), `tied` (what the config means when it does not say), `ignored`
(stored tensors that nothing reads: carried over as they are), `beyond` (how many blocks may follow the last
one that the model runs), `when` (config values for which this table holds, not the plain one).

No other module knows a family. An unknown one is an error, never "treated as Llama".
"""

from __future__ import annotations

import ast
import difflib
import fnmatch
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from typing import Any, Literal

from tersely.checkpoint import Checkpoint, TensorSpec
from tersely.errors import CheckpointError, UsageError

LOOKUPS = frozenset({"tokens", "positions", "segments", "buckets"})
"""Spaces of ids: a weight that reads one is a table of rows, not a matrix that multiplies."""

_ATTENTION = re.compile(r"(cross_)?(q|k|v|attn|k_rope|k_nope)|(q|kv)_latent(_in)?|heads?")
_ROLES = {"attention": "attention", "mlp": "mlp", "experts": "expert", "router": "router", "head": "head"}

Kind = Literal["linear", "norm", "lookup", "bias"]


@dataclass(frozen=True)
class Part:
    """One space along an axis: `act(space@moment)`."""

    space: str
    moment: str = ""
    act: bool = False


@dataclass(frozen=True)
class Axis:
    """The spaces that one axis of a weight covers, in stored order; `by_head`: interleaved head by head."""

    parts: tuple[Part, ...]
    by_head: bool = False

    @property
    def spaces(self) -> tuple[str, ...]:
        return tuple(part.space for part in self.parts)


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
class Family:
    """One table of `families/`, inheritance resolved."""

    name: str
    model_types: tuple[str, ...]
    auto_class: str
    sizes: Mapping[str, str]
    mixes: Mapping[str, str]
    outside: Mapping[str, str]
    inside: Mapping[str, Mapping[str, str]]
    memory: Mapping[str, Mapping[str, str]]
    when: Mapping[str, Any]
    beyond: Mapping[str, str]
    norm: Literal["rms", "layer"]
    prefix: str = ""
    linear_layout: str = "out_in"
    norm_offset: float = 0.0
    tied: bool = False
    ignored: tuple[str, ...] = ()

    @property
    def heads(self) -> tuple[str, ...]:
        """Paths of the weights that give logits, stored or tied."""
        rows = ((path.rstrip("?!"), *row.split(" -> ")) for path, row in self.outside.items())
        return tuple(path for path, reads, writes in rows if writes == "tokens" and reads not in (*LOOKUPS, "_"))


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
                pattern = re.compile(_numbered(term.strip()))
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


def families() -> Mapping[str, Family]:
    """Every model type that a table covers, with its (plain) table."""
    return {t: f for f in _tables() if not f.when for t in f.model_types}


def read_graph(checkpoint: Checkpoint) -> Graph:
    """Match every stored tensor to exactly one row of its family's table, from headers alone.

    Raises CheckpointError for an unknown family, a tensor that no row (or more than one) claims, a row
    without its tensor, and a shape or a count that contradicts the config.
    """
    where, config = f"{checkpoint.path}: ", checkpoint.config
    family = _choose(str(config.get("model_type", "")), config, where)
    sizes = _Sizes(family, config, where)
    rows = _rows_of(family.name)
    claimed: list[tuple[_Row, Weight]] = []
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


@dataclass(frozen=True)
class _Row:
    path: str
    whole: bool
    """The path is the whole tensor name."""
    biased: bool
    pattern: re.Pattern[str]
    stack: str
    reads: Axis
    writes: Axis
    optional: bool
    first: bool
    """Block 0 has it, no other."""
    choice: str
    option: str
    order: int

    @property
    def head(self) -> bool:
        return not self.whole and self.writes.spaces == ("tokens",) and self.reads.spaces[0] not in LOOKUPS


@dataclass(frozen=True)
class _Rows:
    all: tuple[_Row, ...]
    stacks: tuple[str, ...]
    """"" and the block lists, in table order."""
    by_words: Mapping[str, tuple[_Row, ...]]
    """Rows by their path with all numbers struck out, so that a name is tried against a few rows only."""


def _choose(model_type: str, config: Mapping[str, Any], where: str) -> Family:
    tables = [f for f in _tables() if model_type in f.model_types]
    if not tables:
        known = sorted(families())
        near = difflib.get_close_matches(model_type, known, n=2)
        hint = f" (nearest: {', '.join(near)})" if near else ""
        raise CheckpointError(
            f"{where}no family table for model_type {model_type!r}{hint}; known: {', '.join(known)}. Reading "
            "a model with the wrong table breaks it silently, so tersely does not guess"
        )
    special = [f for f in tables if f.when and all(config.get(k) == v for k, v in f.when.items())]
    return special[0] if special else next(f for f in tables if not f.when)


def _beyond(name: str, family: Family, sizes: _Sizes, where: str) -> bool:
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


def _claim(
    names: Sequence[str], family: Family, rows: _Rows, where: str
) -> tuple[_Row, Mapping[str, str | None]] | None:
    """The row of a tensor (its name, or before it its name with the prefix); None if nothing reads it."""
    for name in names:
        candidates = (
            *rows.by_words.get(_words(name), ()),
            *rows.by_words.get(_words(name.rpartition(".")[0]), ()),
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
    spec: TensorSpec, row: _Row, groups: Mapping[str, str | None], family: Family, sizes: _Sizes, where: str
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
    rows: _Rows,
    sizes: _Sizes,
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
    claimed: Sequence[tuple[_Row, Weight]],
    rows: _Rows,
    sizes: _Sizes,
    config: Mapping[str, Any],
    where: str,
) -> None:
    """Every row that the config calls for has its tensors, in every block."""
    present = {(w.unit, w.parameter) for w in graph.weights}

    def missing(unit: str, path: str, reason: str) -> CheckpointError:
        full = f"{unit}.{path}" if unit else path
        return CheckpointError(f"{where}{full} is missing: {reason}. Is a shard or an index entry lost?")

    def parameters(row: _Row) -> dict[str, str]:
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


def _check_shapes(graph: Graph, sizes: _Sizes, where: str) -> None:
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


class _Sizes:
    """Sizes of spaces, from expressions over config keys."""

    def __init__(self, family: Family, config: Mapping[str, Any], where: str) -> None:
        self._expressions, self._config, self._where = family.sizes, config, where

    def need(self, name: str) -> int:
        """A size without which the checkpoint cannot be read."""
        size = self.value(name)
        if size is None:
            raise CheckpointError(
                f"{self._where}config.json lacks what gives the size of {name} "
                f"({self._expressions.get(name, 'its table has no expression for it')})"
            )
        return size

    def value(self, name: str) -> int | None:
        expression = self._expressions.get(name)
        return None if expression is None else self.evaluate(expression)

    def known(self) -> dict[str, int]:
        return {s: n for s in self._expressions if (n := self.value(s)) is not None}

    def says(self, name: str) -> str:
        """The config keys behind a size and their values, for an error message."""
        keys: dict[str, None] = {}

        def collect(name: str) -> None:
            for key in re.findall(r"[A-Za-z_]\w*", self._expressions.get(name, "")):
                if key in self._expressions and key != name:
                    collect(key)
                elif self._config.get(key) is not None:
                    keys[key] = None

        collect(name)
        return ", ".join(f"{key} = {self._config[key]}" for key in keys)

    def evaluate(self, expression: str) -> int | None:
        """Value of the first alternative whose config keys are all there."""
        values = (self._evaluate(ast.parse(a.strip(), mode="eval").body) for a in expression.split("|"))
        return next((value for value in values if value is not None), None)

    def _evaluate(self, node: ast.expr) -> int | None:
        match node:
            case ast.Constant(value=int() as number):
                return number
            case ast.Name(id=key) if key in self._expressions:
                return self.value(key)
            case ast.Name(id=key):
                value = self._config.get(key)
                if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                    raise CheckpointError(f"{self._where}config.json has {key} = {value!r}; a whole number is expected")
                return value
            case ast.BinOp(left=left, op=operator, right=right):
                a, b = self._evaluate(left), self._evaluate(right)
                if a is None or b is None:
                    return None
                if isinstance(operator, ast.FloorDiv) and b == 0:
                    raise CheckpointError(f"{self._where}config.json has a zero in {ast.unparse(node)}")
                return {ast.Mult: a * b, ast.FloorDiv: a // (b or 1), ast.Add: a + b}[type(operator)]
        raise ValueError(f"not a size expression: {ast.unparse(node)}")


def _paths(linear: Collection[Weight]) -> str:
    paths = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", w.path) for w in linear))
    return ", ".join(paths[:12]) + (" ..." if len(paths) > 12 else "")


def _words(path: str) -> str:
    return re.sub(r"(?<=\.)(\d+|\{\w+\})(?=\.|$)", "#", path)


def _numbered(path: str) -> str:
    """Regular expression of a path with {placeholders} for numbers."""
    return re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(path))


def _axis(text: str) -> Axis:
    by_head = re.fullmatch(r"heads\((.*)\)", text)
    parts = []
    for term in (by_head[1] if by_head else text).split("+"):
        match = re.fullmatch(r"(act\()?(\w+)(?:@(\w+))?(\))?", term.strip())
        if match is None or bool(match[1]) != bool(match[4]):
            raise ValueError(f"not an axis: {text!r}")
        parts.append(Part(match[2], match[3] or "", bool(match[1])))
    return Axis(tuple(parts), bool(by_head))


@cache
def _rows_of(name: str) -> _Rows:
    family = next(f for f in _tables() if f.name == name)
    rows: list[_Row] = []
    by_words: dict[str, list[_Row]] = {}
    stacks = {"": family.outside, **{s.removesuffix(".{i}"): table for s, table in family.inside.items()}}
    for stack, table in stacks.items():
        for key, text in table.items():
            match = re.fullmatch(r"([\w.{}]+)([!+])?(\?(?:(0)|(\w+)=(\w+))?)?", key)
            if match is None:
                raise ValueError(f"families/{name}.toml: not a path: {key!r}")
            path, leaves, optional, first, choice, option = match.groups()
            reads, writes = (_axis(t) for t in text.split(" -> "))
            full = f"{stack}.{{i}}.{path}" if stack else path
            leaf = "" if leaves == "!" else r"\.(?P<leaf>weight|bias|gamma|beta)"
            row = _Row(
                path=path,
                whole=leaves == "!",
                biased=leaves == "+",
                pattern=re.compile(_numbered(full) + leaf),
                stack=stack,
                reads=reads,
                writes=writes,
                optional=optional == "?",
                first=bool(first),
                choice=choice or "",
                option=option or "",
                order=len(rows),
            )
            rows.append(row)
            by_words.setdefault(_words(full), []).append(row)
    return _Rows(tuple(rows), tuple(stacks), {words: tuple(group) for words, group in by_words.items()})


@cache
def _tables() -> tuple[Family, ...]:
    folder = resources.files("tersely") / "families"
    raw = {
        f.name.removesuffix(".toml"): tomllib.loads(f.read_text("utf-8"))
        for f in sorted(folder.iterdir(), key=lambda f: f.name)
        if f.name.endswith(".toml")
    }

    def merged(name: str) -> dict[str, Any]:
        table = raw[name]
        if "like" not in table:
            return table
        parent = merged(table["like"])
        result = {**parent, **table}
        for section in ("sizes", "mixes", "outside"):
            result[section] = {**parent.get(section, {}), **table.get(section, {})}
        for section in ("inside", "memory"):
            old, new = parent.get(section, {}), table.get(section, {})
            result[section] = {s: {**old.get(s, {}), **new.get(s, {})} for s in dict.fromkeys([*old, *new])}
        return result

    def kept(rows: Mapping[str, str]) -> Mapping[str, str]:
        return {path: text for path, text in rows.items() if text}

    return tuple(
        Family(
            name=name,
            model_types=tuple(t["model_types"]),
            auto_class=t["class"],
            sizes=t["sizes"],
            mixes=t.get("mixes", {}),
            outside=kept(t["outside"]),
            inside={stack: kept(rows) for stack, rows in t["inside"].items()},
            memory={stack: kept(rows) for stack, rows in t.get("memory", {}).items()},
            when=raw[name].get("when", {}),
            beyond=t.get("beyond", {}),
            norm=t["norm"],
            prefix=t.get("prefix", ""),
            linear_layout=t.get("linear_layout", "out_in"),
            norm_offset=float(t.get("norm_offset", 0)),
            tied=bool(t.get("tied", False)),
            ignored=tuple(t.get("ignored", ())),
        )
        for name in raw
        for t in (merged(name),)
    )
