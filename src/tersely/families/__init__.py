"""The tables of model families, and what they mean.

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
(stored tensors that nothing reads: carried over as they are), `decoded` (transformers has to decode
compressed layers while it loads: modules of the model set up the weights of their children), `beyond` (how many
blocks may follow the last one that the model runs), `when` (config values for which this table holds, not the
plain one), `embedding_power` and `tied_head_power` (embeddings, and what goes into a head that is the
embedding, are multiplied by the size of the residual stream to this power), `numbered_blocks` (config keys that
list numbers of blocks), `every_block` (config keys that say at which blocks something comes again; 1 is at
each), `split` (of a mixture: models whose blocks are its own but for their dense MLP).

No other module knows a family. An unknown one is an error, never "treated as Llama".
"""

from __future__ import annotations

import ast
import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from tersely.errors import CheckpointError

LOOKUPS = frozenset({"tokens", "positions", "segments", "buckets"})
"""Spaces of ids: a weight that reads one is a table of rows, not a matrix that multiplies."""


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
class Dense:
    """Models without experts that become a mixture when their MLPs are split."""

    model_types: tuple[str, ...]
    requires: Mapping[str, Any]
    """What the mixture takes for granted: key of their config = value."""
    config: Mapping[str, Any]
    """What the mixture's config says beside theirs; "{experts}", "{top_k}" and "{width}" stand for numbers."""


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
    decoded: bool = False
    embedding_power: float = 0.0
    tied_head_power: float = 0.0
    numbered_blocks: tuple[str, ...] = ()
    every_block: tuple[str, ...] = ()
    split: Dense | None = None

    @property
    def heads(self) -> tuple[str, ...]:
        """Paths of the weights that give logits, stored or tied."""
        rows = ((path.rstrip("?!"), *row.split(" -> ")) for path, row in self.outside.items())
        return tuple(path for path, reads, writes in rows if writes == "tokens" and reads not in (*LOOKUPS, "_"))


def families() -> Mapping[str, Family]:
    """Every model type that a table covers, with its (plain) table."""
    return {t: f for f in _tables() if not f.when for t in f.model_types}


@dataclass(frozen=True)
class Row:
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
class Rows:
    all: tuple[Row, ...]
    stacks: tuple[str, ...]
    """"" and the block lists, in table order."""
    by_words: Mapping[str, tuple[Row, ...]]
    """Rows by their path with all numbers struck out, so that a name is tried against a few rows only."""


def mixtures() -> Mapping[str, tuple[str, Dense]]:
    """Every model type whose MLPs can be split into experts: the mixture that it becomes, and how."""
    made = ((f.model_types[0], f.split) for f in _tables() if f.split is not None)
    return {dense: (mixture, split) for mixture, split in made for dense in split.model_types}


def choose_family(model_type: str, config: Mapping[str, Any], where: str) -> Family:
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


class Sizes:
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


def words(path: str) -> str:
    return re.sub(r"(?<=\.)(\d+|\{\w+\})(?=\.|$)", "#", path)


def numbered(path: str) -> str:
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
def rows_of(name: str) -> Rows:
    family = next(f for f in _tables() if f.name == name)
    rows: list[Row] = []
    by_words: dict[str, list[Row]] = {}
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
            row = Row(
                path=path,
                whole=leaves == "!",
                biased=leaves == "+",
                pattern=re.compile(numbered(full) + leaf),
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
            by_words.setdefault(words(full), []).append(row)
    return Rows(tuple(rows), tuple(stacks), {words: tuple(group) for words, group in by_words.items()})


def _dense(table: Mapping[str, Any]) -> Dense:
    return Dense(tuple(table["model_types"]), table["requires"], table["config"])


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
            decoded=bool(t.get("decoded", False)),
            embedding_power=float(t.get("embedding_power", 0)),
            tied_head_power=float(t.get("tied_head_power", 0)),
            numbered_blocks=tuple(t.get("numbered_blocks", ())),
            every_block=tuple(t.get("every_block", ())),
            split=_dense(raw[name]["split"]) if "split" in raw[name] else None,
        )
        for name in raw
        for t in (merged(name),)
    )
