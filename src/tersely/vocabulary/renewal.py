"""A checkpoint with another vocabulary than it was trained with: more tokens, or another tokenizer's.

Shapes: V rows before, M after, D coordinates.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from tersely import __version__
from tersely.checkpoint import Checkpoint, open_checkpoint
from tersely.errors import CheckpointError, UsageError
from tersely.graph import Graph, Weight, read_graph
from tersely.results.renewal import Renewal
from tersely.vocabulary.companions import VOCABULARIES
from tersely.vocabulary.corpus import open_texts
from tersely.vocabulary.extension import extend
from tersely.vocabulary.initialise import Gap, Initialiser, Tables
from tersely.vocabulary.injection import ElChat, inject
from tersely.vocabulary.pieces import Pieces, read_pieces, special_roles
from tersely.vocabulary.references import NAMED, replaced_config
from tersely.vocabulary.surgery import resized
from tersely.vocabulary.tokenizer import TOKENIZER, Vocabulary, read_tokenizer, read_tokenizer_folder
from tersely.vocabulary.transplant import Transplant, find_gap, transplant
from tersely.vocabulary.trim import SPACE, check_tables, put, tables_of, tokenizer_of
from tersely.writer import FileContent, Writer, refuse_existing

Say = Callable[[str, float], None]
REPORT = "vocabulary-report.json"
_MULTIPLE = 8
"""Rows are a multiple of this, which kernels like."""
_STALE = "it holds the old vocabulary, and tokenizer.json says all that it did"


def extend_model(
    source: str | Path,
    out: str | Path,
    texts: Sequence[str | Path],
    count: int,
    initialiser: Initialiser,
    *,
    least: int = 2,
    vectors: Path | None = None,
    seed: int = 0,
    say: Say = lambda *_: None,
) -> Renewal:
    """A model with at most `count` more tokens, learnt from texts; the ids that it has stay.

    Raises the errors of `extend`, `find_gap` and `transplant`, and OutputError.
    """
    checkpoint, folder = open_checkpoint(source), Path(out)
    refuse_existing(folder.absolute())
    vocabulary = read_tokenizer(checkpoint)
    content = list(open_texts(texts))
    found = extend(vocabulary.plain[TOKENIZER], content, count, least=least, say=_share(say, 0.0, 0.4))
    old = _pieces(vocabulary)
    loaded = Tokenizer.from_str(json.dumps(found.plain))
    ids = loaded.get_vocab(with_added_tokens=True)
    roles = special_roles(vocabulary.plain.get("tokenizer_config.json", {}), ids)
    gap = find_gap(
        old,
        read_pieces(loaded, roles),
        initialiser.needs,
        texts=content,
        vectors=vectors,
        seed=seed,
        say=_share(say, 0.4, 0.7),
    )
    removed = {name: _STALE for name in vocabulary.files if VOCABULARIES.fullmatch(name) and name != TOKENIZER}
    files = {TOKENIZER: (json.dumps(found.plain, ensure_ascii=False, indent=2) + "\n").encode()}
    return _renewed(
        checkpoint,
        folder,
        gap,
        initialiser,
        None,
        rows=max(vocabulary.rows, gap.new.rows),
        config=dict(vocabulary.config),
        files=files,
        removed=removed,
        told=list(found.notes),
        counts=(found.tokens_before, found.tokens_after),
        seed=seed,
        say=_share(say, 0.7, 1.0),
    )


def transplant_model(
    source: str | Path,
    tokenizer: str | Path,
    out: str | Path,
    initialiser: Initialiser,
    *,
    texts: Sequence[str | Path] = (),
    vectors: Path | None = None,
    seed: int = 0,
    say: Say = lambda *_: None,
) -> Renewal:
    """A model with the tokenizer that lies in a folder; that of a model, for methods that look at a donor.

    Raises the errors of `find_gap` and `transplant`, and OutputError.
    """
    checkpoint, folder = open_checkpoint(source), Path(out)
    refuse_existing(folder.absolute())
    vocabulary, theirs = read_tokenizer(checkpoint), read_tokenizer_folder(Path(tokenizer))
    donor = _tables(open_checkpoint(tokenizer)) if "donor" in initialiser.needs else None
    content = list(open_texts(texts)) if texts else []
    old, new = _pieces(vocabulary), _pieces(theirs)
    gap = find_gap(old, new, initialiser.needs, texts=content, vectors=vectors, seed=seed, say=_share(say, 0.0, 0.7))
    to_new = {i: j for j, i in sorted(gap.match.items(), reverse=True)}
    told: list[str] = []

    def replaced(where: str, i: int) -> int | None:
        role = next((r for r in new.roles if where.endswith(f": {r}_token_id")), None)
        if role is not None and i < vocabulary.rows:
            return new.roles[role]
        if i not in to_new:
            told.append(f"{where} named {_named(vocabulary, i)}, which the new tokenizer lacks: it was taken out")
        return to_new.get(i)

    configs = {
        name: replaced_config(plain, replaced, name)
        for name, plain in {"config.json": vocabulary.config, **vocabulary.plain}.items()
        if name in ("config.json", "generation_config.json")
    }
    own = {name for name in vocabulary.files if name not in configs}
    files = {name: data for name, data in theirs.files.items() if name not in ("config.json", "generation_config.json")}
    if any("chat_template" in name for name in own) and not any("chat_template" in name for name in files):
        told.append("the chat template went with its tokenizer, and the new one has none")
    if "generation_config.json" in configs:
        files["generation_config.json"] = (json.dumps(configs["generation_config.json"], indent=2) + "\n").encode()
    counts = tuple(
        sum(len(each.ids) for each in tokenizer_of(one).encode_batch(content, add_special_tokens=False))
        for one in (vocabulary, theirs)
    )
    return _renewed(
        checkpoint,
        folder,
        gap,
        initialiser,
        donor,
        rows=new.rows,
        config=configs["config.json"],
        files=files,
        removed=dict.fromkeys(own - files.keys(), "it belonged to the tokenizer that went"),
        told=told,
        counts=(counts[0], counts[1]),
        seed=seed,
        say=_share(say, 0.7, 1.0),
    )


def inject_model(
    chat: str | Path, adapted: str | Path, out: str | Path, settings: ElChat, *, say: Say = lambda *_: None
) -> Path:
    """An adapted model with what a chat model knows of conversations (ElChat), its chat template included.

    Raises the errors of `inject`, and OutputError.
    """
    theirs, own, folder = open_checkpoint(chat), open_checkpoint(adapted), Path(out)
    refuse_existing(folder.absolute())
    ours, before = read_tokenizer(own), read_tokenizer(theirs)
    for i in sorted(before.added_ids):
        if i >= ours.rows or ours.tokens[i] != before.tokens[i]:
            raise CheckpointError(
                f"the special token {before.tokens[i]!r} is {i} in {chat}, but not in {adapted}; that must come of the "
                "chat model, with new tokens behind the old ones"
            )
    writer = Writer(folder, {"tersely": __version__, "inject": dataclasses.asdict(settings)}, resume=False)
    try:
        units = []
        count = len(read_graph(own).units) + 1
        for number, (unit, tensors) in enumerate(inject(theirs, own, before.added_ids, settings)):
            say(unit or "embedding and head", number / count)
            units.append(f"unit-{number:05d}")
            writer.put(units[-1], tensors, {})
        files: dict[str, FileContent] = {name: own.path / name for name in own.companions}
        templates = {name: theirs.path / name for name in theirs.companions if name.endswith(".jinja")}
        config = before.plain.get("tokenizer_config.json", {})
        if "chat_template" in config and "tokenizer_config.json" in ours.plain:
            merged = {**ours.plain["tokenizer_config.json"], "chat_template": config["chat_template"]}
            files["tokenizer_config.json"] = (json.dumps(merged, indent=2, ensure_ascii=False) + "\n").encode()
        said = (json.dumps(own.config, indent=2, ensure_ascii=False) + "\n").encode()
        return writer.finish(units, {**files, **templates, "config.json": said})
    finally:
        writer.close()


def _renewed(
    checkpoint: Checkpoint,
    folder: Path,
    gap: Gap,
    initialiser: Initialiser,
    donor: Tables | None,
    *,
    rows: int,
    config: dict[str, Any],
    files: Mapping[str, bytes],
    removed: Mapping[str, str],
    told: Sequence[str],
    counts: tuple[int, int],
    seed: int,
    say: Say,
) -> Renewal:
    """Give every token a row, and write the folder."""
    graph = read_graph(checkpoint)
    check_tables(graph)
    rows = -(-rows // _MULTIPLE) * _MULTIPLE
    say("rows of new tokens", 0.0)
    bias = _bias(graph)
    made = transplant(
        gap,
        _tables(checkpoint),
        initialiser,
        bias_V=None if bias is None else checkpoint[bias.name].flatten(),
        donor=donor,
        rows=rows,
        seed=seed,
    )
    result = Renewal(
        method=initialiser.name,
        rows_before=graph.sizes[SPACE],
        rows_after=rows,
        copied=made.copied,
        initialised=made.initialised,
        fallen=len(made.fallen),
        empty=made.empty,
        tokens_before=counts[0],
        tokens_after=counts[1],
        removed=dict(removed),
        notes=list(told),
    )
    settings = {"tersely": __version__, "method": initialiser.name, **dataclasses.asdict(initialiser)}  # type: ignore[call-overload]
    writer = Writer(folder, settings, resume=False)
    try:
        changed = {w.name: _maker(w, made, checkpoint) for w in tables_of(graph)}
        units = put(writer, checkpoint, changed, say)
        kept: dict[str, FileContent] = {n: checkpoint.path / n for n in checkpoint.companions if n not in removed}
        said = json.dumps(resized(config, graph.sizes[SPACE], rows), indent=2, ensure_ascii=False) + "\n"
        report = (json.dumps(dataclasses.asdict(result), indent=2) + "\n").encode()
        writer.finish(units, {**kept, **files, REPORT: report, "config.json": said.encode()})
    finally:
        writer.close()
    return result


def _maker(weight: Weight, made: Transplant, checkpoint: Checkpoint) -> Callable[[], Tensor]:
    """The table that takes the place of a weight."""
    if weight.kind == "lookup":
        return lambda: made.embedding_MD
    if weight.kind == "bias":
        assert made.bias_M is not None
        bias_M, shape = made.bias_M, checkpoint.spec(weight.name).shape
        return lambda: bias_M.reshape((*shape[:-1], len(bias_M)))
    head_MD = made.embedding_MD if made.head_MD is None else made.head_MD
    return lambda: head_MD.t().contiguous() if weight.transposed else head_MD


def _tables(checkpoint: Checkpoint) -> Tables:
    """The embedding and, where it is another, the head. UsageError: a model with several embeddings of tokens."""
    graph = read_graph(checkpoint)
    lookups = [w for w in tables_of(graph) if w.kind == "lookup"]
    heads = [w for w in tables_of(graph) if w.kind == "linear"]
    if not lookups or any(w.spec.shape != lookups[0].spec.shape for w in lookups) or len(heads) > 1:
        names = ", ".join(w.name for w in tables_of(graph))
        raise UsageError(f"{checkpoint.source} has more than an embedding and a head by token: {names}")
    head = checkpoint[heads[0].name] if heads else None
    if head is not None and heads[0].transposed:
        head = head.t()
    return Tables(checkpoint[lookups[0].name], head)


def _bias(graph: Graph) -> Weight | None:
    return next((w for w in tables_of(graph) if w.kind == "bias"), None)


def _pieces(vocabulary: Vocabulary) -> Pieces:
    roles = special_roles(vocabulary.plain.get("tokenizer_config.json", {}), vocabulary.ids)
    if not roles and not any(name in vocabulary.plain for name in NAMED):
        roles = {r: i for r in ("bos", "eos", "pad") if isinstance(i := vocabulary.config.get(f"{r}_token_id"), int)}
    return read_pieces(tokenizer_of(vocabulary), roles)


def _named(vocabulary: Vocabulary, i: int) -> str:
    return repr(vocabulary.tokens[i]) if i < vocabulary.rows else str(i)


def _share(say: Say, begin: float, end: float) -> Say:
    return lambda what, share: say(what, begin + share * (end - begin))
