"""A model with fewer tokens: which stay, and the checkpoint with their rows only.

Every weight that has an axis of tokens loses the rows of those that go, embedding, head, biases and tables of blocks
alike; nothing else changes, so that what the model computes for the tokens that stay is what it was.

Shapes: V rows of the embedding, K rows that stay, P points of a curve.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tersely.bases import Index, selected, stored_axes
from tersely.checkpoint import Checkpoint, TensorSpec, open_checkpoint
from tersely.errors import DataError, UsageError
from tersely.graph import Graph, Weight, read_graph
from tersely.methods.trim import Tokens
from tersely.plan.cost import size
from tersely.plan.recipe import Trim
from tersely.results import Trimming
from tersely.rewriting import stored_in
from tersely.vocabulary.closure import Closure
from tersely.vocabulary.counting import Counted
from tersely.vocabulary.pieces import read_pieces
from tersely.vocabulary.selection import choose, curve
from tersely.vocabulary.surgery import Trimmed, trimmed
from tersely.vocabulary.tokenizer import TOKENIZER, Vocabulary
from tersely.writer import Stored, Writer

SPACE = "tokens"
_GROUP_BYTES = 192_000_000
"""Of tensors that go together from file to file, so that they need not be written twice."""
_MOST_UNKNOWN = 0.05
"""Share of unknown tokens from which on a corpus is refused."""
_POINTS = 200
"""Of the curve that is kept."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What stays, and what the checkpoint will have."""

    checkpoint: Checkpoint
    """Its headers."""
    trimmed: Trimmed
    facts: Trimming

    @property
    def sha256(self) -> str:
        """Of the ids that stay."""
        return hashlib.sha256(self.trimmed.kept_old_ids_K.numpy().tobytes()).hexdigest()


def plan_trim(checkpoint: Checkpoint, vocabulary: Vocabulary, step: Trim, corpus: Counted | None) -> Plan:
    """Choose the tokens that stay. corpus: counted with this tokenizer, for methods that need it.

    UsageError: a setting that cannot be met, or a model whose vocabulary cannot be cut; DataError: a corpus that the
    model cannot read.
    """
    graph = read_graph(checkpoint)
    check_tables(graph)
    counts_V = None if corpus is None else counts_of(vocabulary, corpus)
    data = tokens_of(vocabulary) if "data" in step.method.needs else None
    wanted_V = step.method(Tokens(data, counts_V))
    unknown = _unknown_share(vocabulary, counts_V)
    if unknown > _MOST_UNKNOWN:
        raise DataError(
            f"{unknown:.1%} of the tokens of the corpus are {vocabulary.tokens[vocabulary.unknown or 0]!r}: this model "
            "cannot read it; give a text in a language and script that it can"
        )
    asked = {k: v for k in ("rows", "coverage", "minimum_count") if (v := getattr(step, k))}
    keep, drop = step.keep.split(), step.drop.split()
    closure = Closure(vocabulary)
    choice = choose(
        vocabulary,
        wanted_V,
        **(asked or {"minimum_count": 1}),
        multiple=step.multiple,
        keep=keep,
        drop=drop,
        closure=closure,
    )
    told = [f"{unknown:.2%} of the tokens of the corpus are unknown to the model"] if unknown else []
    made = trimmed(vocabulary, choice.kept_old_ids_K)
    specs = {name: _spec(checkpoint.spec(name), graph, name, choice.rows) for name in checkpoint}
    headers = checkpoint.with_headers(dict(made.config), specs)
    curve_P = curve(vocabulary, wanted_V, keep=keep, drop=drop, closure=closure) if counts_V is not None else None
    points = [] if curve_P is None else _spread(len(curve_P.rows_P))
    facts = Trimming(
        rows_before=vocabulary.rows,
        rows_after=choice.rows,
        mandatory=choice.mandatory,
        uncounted=choice.uncounted,
        coverage=choice.coverage if counts_V is not None else None,
        curve_rows=[] if curve_P is None else curve_P.rows_P[points].tolist(),
        curve_coverage=[] if curve_P is None else curve_P.coverage_P[points].tolist(),
        bytes_a_row=(checkpoint.nbytes - headers.nbytes) // max(1, vocabulary.rows - choice.rows),
        unreachable=list(choice.unreachable),
        removed=dict(made.removed),
        notes=[*told, *made.notes],
    )
    return Plan(headers, made, facts)


def _spread(count: int) -> list[int]:
    """Places of so many points, few enough to be kept, the first and the last among them."""
    return sorted({round(n * (count - 1) / min(count, _POINTS)) for n in range(min(count, _POINTS) + 1)})


def check_tables(graph: Graph) -> None:
    """UsageError where the rows of tokens cannot be cut."""
    for weight in tables_of(graph):
        if any(SPACE in axis.spaces and len(axis.spaces) > 1 for axis in stored_axes(weight)):
            raise UsageError(
                f"{weight.name} has tokens and something else in one of its dimensions: they cannot be cut"
            )


def counts_of(vocabulary: Vocabulary, corpus: Counted) -> Tensor:
    """(V,) int64: one for each row of the embedding."""
    counts_V = torch.zeros(vocabulary.rows, dtype=torch.int64)
    counts_V[: len(corpus.tokens_V)] = torch.from_numpy(corpus.tokens_V)
    return counts_V


def tokenizer_of(vocabulary: Vocabulary) -> Tokenizer:
    """As the library loads it."""
    return Tokenizer.from_str(vocabulary.files[TOKENIZER].decode())


def rows_for(checkpoint: Checkpoint, graph: Graph, nbytes: int) -> int:
    """How many rows leave a model of at most so many bytes. UsageError: even without any it would be larger."""
    check_tables(graph)
    tables = sum(w.spec.nbytes for w in tables_of(graph))
    rest, row = checkpoint.nbytes - tables, tables // graph.sizes["tokens"]
    if nbytes < rest + row:
        raise UsageError(
            f"{size(nbytes)} are too few: what is no vocabulary takes {size(rest)}, which a trim leaves as it is; ask "
            "for more, or compress the rest too"
        )
    return min((nbytes - rest) // row, graph.sizes["tokens"])


def _unknown_share(vocabulary: Vocabulary, counts_V: Tensor | None) -> float:
    """Of the counted tokens."""
    if counts_V is None or vocabulary.unknown is None:
        return 0.0
    return float(counts_V[vocabulary.unknown]) / max(1, int(counts_V.sum()))


def tokens_of(vocabulary: Vocabulary) -> list[bytes | None]:
    """By id, the text that each token stands for; None for added ones and for rows without."""
    pieces = read_pieces(tokenizer_of(vocabulary))
    found: list[bytes | None] = [None] * vocabulary.rows
    for i, piece in pieces.by_id.items():
        if i not in vocabulary.added_ids and not piece.special:
            found[i] = piece.data
    return found


def _spec(spec: TensorSpec, graph: Graph, name: str, rows: int) -> TensorSpec:
    if name in graph.extra:
        return spec
    axes = stored_axes(graph.weight(name))
    shape = tuple(rows if SPACE in axis.spaces else old for old, axis in zip(spec.shape, axes, strict=True))
    return replace(spec, shape=shape, nbytes=math.prod(shape) * spec.dtype.itemsize)


def told(facts: Trimming) -> list[str]:
    """What the user should know."""
    rows = f"{facts.rows_after:,} of {facts.rows_before:,} rows stay"
    found = [f"{rows}, {facts.mandatory:,} of them whatever is counted"]
    if facts.coverage is not None:
        found.append(f"they hold {facts.coverage:.4%} of the counted tokens; {facts.uncounted:,} rows were not counted")
    if facts.unreachable:
        some = ", ".join(map(repr, facts.unreachable[:5]))
        found.append(f"{len(facts.unreachable):,} tokens went that the tokenizer never gives: {some}")
    return found + [f"{name} went: {reason}" for name, reason in facts.removed.items()] + facts.notes


def trimmed_checkpoint(
    checkpoint: Checkpoint, plan: Plan, folder: Path, job: Mapping[str, Any], resume: bool
) -> Checkpoint:
    """Write it to `folder` as an ordinary checkpoint; one that lies there whole is taken."""
    if not (resume and folder.is_dir()):
        writer = Writer(folder, job, resume=resume)
        try:
            units = put_trimmed(writer, checkpoint, read_graph(checkpoint), plan, lambda *_: None)
            writer.finish(units, companions_of(checkpoint, plan.trimmed))
        finally:
            writer.close()
    return open_checkpoint(folder)


def put_trimmed(
    writer: Writer, checkpoint: Checkpoint, graph: Graph, plan: Plan, say: Callable[[str, float], None]
) -> list[str]:
    """Write the tensors, one cut one at a time; the writer's units, in order."""
    kept_K = plan.trimmed.kept_old_ids_K
    cut = {w.name: partial(_rows, checkpoint, graph, w, kept_K) for w in tables_of(graph)}
    return put(writer, checkpoint, cut, say)


def tables_of(graph: Graph) -> list[Weight]:
    """The weights that have something of each token."""
    return [w for w in graph.weights if SPACE in (*w.reads.spaces, *w.writes.spaces)]


def put(
    writer: Writer,
    checkpoint: Checkpoint,
    changed: Mapping[str, Callable[[], Tensor]],
    say: Callable[[str, float], None],
) -> list[str]:
    """Write a checkpoint anew of which some tensors change, each made when its turn comes; the writer's units."""
    units: dict[str, list[str]] = {f"tokens-{n:05d}": [name] for n, name in enumerate(changed)}
    groups: list[list[str]] = [[]]
    for name in checkpoint:
        if name not in changed:
            if sum(checkpoint.spec(own).nbytes for own in groups[-1]) >= _GROUP_BYTES:
                groups.append([])
            groups[-1].append(name)
    units |= {f"kept-{n:05d}": names for n, names in enumerate(groups) if names}
    for number, (unit, names) in enumerate(units.items()):
        say(names[0] if names[0] in changed else "all other weights", number / len(units))
        if not writer.done(unit):
            tensors: Mapping[str, Tensor | Stored] = (
                stored_in(checkpoint, {name: name for name in names})
                if names[0] not in changed
                else {names[0]: changed[names[0]]()}
            )
            facts: dict[str, Any] = {"rows": [], "groups": [], "outcome": {name: [name] for name in names}}
            writer.put(unit, tensors, facts)
    return list(units)


def companions_of(checkpoint: Checkpoint, trimmed: Trimmed) -> dict[str, bytes | Path]:
    """Name -> content of every file beside the weights."""
    kept: dict[str, bytes | Path] = {
        name: checkpoint.path / name for name in checkpoint.companions if name not in trimmed.removed
    }
    config = (json.dumps(trimmed.config, indent=2, ensure_ascii=False) + "\n").encode()
    return {**kept, **trimmed.files, "config.json": config}


def _rows(checkpoint: Checkpoint, graph: Graph, weight: Weight, kept_K: Tensor) -> Tensor:
    """A weight with the rows that stay; only these are read, where they are rows as it is stored."""
    if len(weight.spec.shape) == 2 and SPACE in stored_axes(weight)[0].spaces:
        return checkpoint.rows(weight.name, kept_K)
    return selected(graph, weight, checkpoint[weight.name], {SPACE: Index(kept_K)}, graph.sizes.get("heads", 1))
