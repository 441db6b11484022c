"""The verbs on vocabularies."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar

from tersely.cli.console import console, progress, show
from tersely.errors import DataError, UsageError

if TYPE_CHECKING:
    from tersely.plan.recipe import Recipe
    from tersely.results.renewal import Renewal
    from tersely.vocabulary.counting import Counted

_SAMPLE = 2_000_000
"""Characters of a corpus by which its language is told."""
_FOREIGN = 0.5
"""Share of foreign letters from which on a corpus is refused."""
_PRIOR = (
    "for models that are trained from random weights with their vocabulary; for one that is trained already, a prior "
    "and no rule"
)
_NEXT = "next: tersely vocab trim {model} OUT --corpus FILE --coverage 0.999, or --rows N"


class _Named(Protocol):
    name: ClassVar[str]


_M = TypeVar("_M", bound=_Named)


def trim(options: argparse.Namespace) -> None:
    from tersely.cli.models import run_job
    from tersely.job import prepare
    from tersely.report.terminal import cost_lines
    from tersely.report.vocabulary_tables import trim_table
    from tersely.writer import refuse_existing

    out = Path(options.out).absolute()
    if not options.resume:
        refuse_existing(out)
    recipe = _recipe(options)
    state = None if options.dry_run else out.with_name(f"{out.name}.counts.npz")
    counted = None
    if options.corpus:
        counted = _counts(_tokenizer_file(options.model), {"corpus": options.corpus}, options.processes, state)[
            "corpus"
        ]
    job = prepare(options.model, recipe, options.out, corpus=counted)
    console(sys.stderr).print(cost_lines(job.cost))
    if options.dry_run:
        assert job.trim is not None
        job.cost.check(job.out)
        facts = job.trim.facts
        show(options, dataclasses.asdict(facts), lambda: trim_table(facts))
        return
    run_job(job, options)
    if state is not None:
        state.unlink(missing_ok=True)


def train(options: argparse.Namespace) -> None:
    from tersely.plan.cost import duration
    from tersely.plan.reading import with_settings
    from tersely.vocabulary.training import TRAININGS
    from tersely.vocabulary.training.folder import train_tokenizer

    method = with_settings(_named(TRAININGS, options.method), options.set)
    start = time.monotonic()
    with progress() as say:
        made = train_tokenizer(
            method, options.corpus, options.size, options.out, special=options.special, like=options.like, say=say
        )
    plain = {"out": options.out, "method": options.method, "tokens": made, "seconds": time.monotonic() - start}
    show(options, plain, lambda: f"{made:,} tokens by {options.method}, in {options.out}/tokenizer.json")
    told = f"\nwrote {options.out} in {duration(time.monotonic() - start)}; next: tersely vocab measure {options.out} "
    console(sys.stderr).print(told + "--corpus FILE", soft_wrap=True)


def extend(options: argparse.Namespace) -> None:
    from tersely.vocabulary.renewal import extend_model

    texts, count = options.corpus, options.tokens
    _renew(options, partial(extend_model, options.model, options.out, texts, count, least=options.least))


def transplant(options: argparse.Namespace) -> None:
    from tersely.vocabulary.renewal import transplant_model

    _renew(options, partial(transplant_model, options.model, options.tokenizer, options.out, texts=options.corpus))


def _renew(options: argparse.Namespace, make: Callable[..., Renewal]) -> None:
    """Give a model other tokens and say what came out."""
    from tersely.plan.reading import with_settings
    from tersely.report.vocabulary_tables import renewal_table
    from tersely.vocabulary.initialise import INITIALISERS

    method = with_settings(_named(INITIALISERS, options.method), options.set)
    with progress() as say:
        vectors = None if options.vectors is None else Path(options.vectors)
        found = make(initialiser=method, vectors=vectors, seed=options.seed or 0, say=say)
    show(options, dataclasses.asdict(found), lambda: renewal_table(found))
    console(sys.stderr).print(
        f"\nwrote {options.out}; new rows are guesses until they are trained; next: tersely evaluate {options.out} "
        "--text FILE (bits per byte can be compared across tokenizers)",
        soft_wrap=True,
    )


def inject(options: argparse.Namespace) -> None:
    from tersely.plan.reading import with_settings
    from tersely.vocabulary.injection import ElChat
    from tersely.vocabulary.renewal import inject_model

    settings = with_settings(ElChat, options.set)
    with progress() as say:
        inject_model(options.chat, options.adapted, options.out, settings, say=say)
    show(options, {"out": options.out, **dataclasses.asdict(settings)}, lambda: f"wrote {options.out}")


def _named(methods: Sequence[type[_M]], name: str) -> type[_M]:
    """UsageError: none has this name."""
    known = {method.name: method for method in methods}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"no method named {name!r}; {hint}methods are {', '.join(known)}")
    return known[name]


def measure(options: argparse.Namespace) -> None:
    from tersely.report.vocabulary_tables import use_table
    from tersely.vocabulary.counting import load
    from tersely.vocabulary.fertility import measure as measure_use

    groups = _groups(options.corpus)
    uses = []
    for model in (options.model, *options.others):
        path = _tokenizer_file(model)
        uses.append(measure_use(model, load(str(path)), _counts(path, groups, options.processes)))
    show(options, [dataclasses.asdict(use) for use in uses], lambda: use_table(uses))


def suggest(options: argparse.Namespace) -> None:
    from rich.console import Group

    from tersely.checkpoint import open_checkpoint
    from tersely.graph import read_graph
    from tersely.methods.trim import Frequency
    from tersely.plan.recipe import Trim
    from tersely.report.terminal import table
    from tersely.report.vocabulary_tables import curve_table
    from tersely.vocabulary.scaling import suggest_size
    from tersely.vocabulary.tokenizer import read_tokenizer
    from tersely.vocabulary.trim import plan_trim, tables_of

    checkpoint = open_checkpoint(options.model)
    graph = read_graph(checkpoint)
    outside = checkpoint.parameters - sum(w.rows * w.columns for w in tables_of(graph))
    rows, width = graph.sizes["tokens"], graph.sizes["residual"]
    found = suggest_size(outside, width=width, flops=options.flops)
    plain: dict[str, object] = {"rows": rows, "scaling": dataclasses.asdict(found)}
    lines = [
        ("power laws of compute", f"{found.isoflops:,.0f}"),
        ("growth of the cheapest size", f"{found.derivative:,.0f}"),
        ("fitted loss", f"{found.loss:,.0f}"),
        ("this model", f"{rows:,}"),
    ]
    told = f"for {outside / 1e6:,.1f} M parameters outside the vocabulary, width {width}, {found.flops:.3g} FLOPs"
    parts: list[object] = [table((told, "tokens"), lines), _PRIOR]
    if options.corpus:
        counted = _counts(checkpoint.path / "tokenizer.json", {"corpus": options.corpus}, options.processes)["corpus"]
        vocabulary = read_tokenizer(checkpoint)
        everything = Trim("tokens", Frequency(), minimum_count=1, multiple=1)
        facts = plan_trim(checkpoint, vocabulary, everything, counted).facts
        plain["trim"] = dataclasses.asdict(facts)
        parts += ["", curve_table(facts), _NEXT.format(model=options.model)]
    show(options, plain, lambda: Group(*parts))  # type: ignore[arg-type]


def _groups(given: Sequence[str]) -> dict[str, list[str]]:
    """name=FILE,FILE ... -> name -> files; without a name, the file's own."""
    groups: dict[str, list[str]] = {}
    for text in given:
        name, equals, files = text.partition("=")
        own = files.split(",") if equals else [text]
        groups.setdefault(name if equals else Path(text).name, []).extend(own)
    return groups


def _tokenizer_file(model: str) -> Path:
    """tokenizer.json of a checkpoint, or of a folder that has nothing else, or the file itself."""
    from tersely.checkpoint import open_checkpoint
    from tersely.vocabulary.tokenizer import read_tokenizer

    path = Path(model)
    if path.is_file():
        return path
    if path.is_dir() and (path / "tokenizer.json").is_file():
        return path / "tokenizer.json"
    checkpoint = open_checkpoint(model)
    file = checkpoint.path / "tokenizer.json"
    if not file.is_file():
        read_tokenizer(checkpoint)  # says how to get one
    return file


def _recipe(options: argparse.Namespace) -> Recipe:
    """One step, that trims."""
    from tersely.methods.trim import Frequency, Languages
    from tersely.plan.cost import parse_size
    from tersely.plan.recipe import Recipe, Trim

    if not options.corpus and not options.languages:
        raise UsageError(
            "nothing says which tokens are wanted: give texts with --corpus FILE ..., or languages with --languages "
            "en,de"
        )
    if options.corpus and options.languages:
        _check_language(options.corpus, options.languages)
    rows = options.rows or 0
    if options.size:
        if rows or options.coverage or options.minimum_count:
            raise UsageError("--size says how many tokens stay, and so does another option; leave one out")
        rows = _rows_of(options.model, parse_size(options.size))
    step = Trim(
        "tokens",
        Frequency() if options.corpus else Languages(options.languages),
        rows=rows,
        coverage=options.coverage or 0.0,
        minimum_count=options.minimum_count or 0,
        multiple=options.multiple,
        keep=" ".join(options.keep),
        drop=" ".join(options.drop),
    )
    return Recipe((step,))


def _rows_of(model: str, nbytes: int) -> int:
    from tersely.checkpoint import open_checkpoint
    from tersely.graph import read_graph
    from tersely.vocabulary.trim import rows_for

    checkpoint = open_checkpoint(model)
    return rows_for(checkpoint, read_graph(checkpoint), nbytes)


def _check_language(files: Sequence[str], codes: str) -> None:
    """DataError: a corpus that is not in the languages that were asked for."""
    from tersely.methods.trim.languages import foreign_share, languages_of, read_as
    from tersely.vocabulary.corpus import open_texts

    languages = languages_of(codes)
    names = " or ".join(language.name for language in languages)
    sample, held = [], 0
    for text in open_texts(files):
        sample.append(text)
        held += len(text)
        if held > _SAMPLE:
            break
    text = "\n".join(sample)
    if (share := foreign_share(text, languages)) > _FOREIGN:
        raise DataError(f"{share:.0%} of the letters of the corpus are not of {names}; give a text in it")
    told = read_as(text)
    if told is not None and told not in languages and all(language.words for language in languages):
        raise DataError(
            f"the corpus reads as {told.name}, not as {names}; give --languages {told.code}, or a text in {names}"
        )


def _counts(
    tokenizer: Path, groups: Mapping[str, Sequence[str]], processes: int | None, state: Path | None = None
) -> dict[str, Counted]:
    """The tokens of texts, as a tokenizer cuts them."""
    from tersely.vocabulary.counting import count_tokens

    paths = {group: [Path(file) for file in files] for group, files in groups.items()}
    if state is not None:
        state.parent.mkdir(parents=True, exist_ok=True)
    with progress() as say:
        return count_tokens(tokenizer, paths, state=state, processes=processes or os.cpu_count() or 1, say=say)
