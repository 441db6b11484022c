"""Which weights and spaces of a model the steps of a recipe take, and whether they can."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping
from dataclasses import replace

from tersely.codecs.activations import ACTIVATIONS
from tersely.codecs.low_rank import is_product
from tersely.errors import UsageError
from tersely.graph import Graph, Weight
from tersely.hadamard import check_order
from tersely.plan.recipe import INPUTS, Change, Recipe, Step, zero_keepers


def assign(recipe: Recipe, graph: Graph) -> dict[str, Step]:
    """Stored name -> step, for every weight that one selects; checked against the weights' shapes.

    A step that leaves a weight in its dtype, with zeros, is done before a later one that stores it in fewer bits; of
    all others, the last counts.

    UsageError for a pattern that selects nothing, a step of which nothing is left, and a width that a method
    cannot take, with the weight named.
    """
    chosen: dict[str, Step] = {}
    taken: dict[str, list[int]] = {}
    for number, step in enumerate(recipe.steps):
        if isinstance(step, Step):
            for weight in graph.select(step.where):
                before = chosen.get(weight.name)
                if before is not None and _leaves_zeros(before, weight) and not _leaves_zeros(step, weight):
                    chosen[weight.name] = _chained(before, step)
                    taken[weight.name].append(number)
                else:
                    chosen[weight.name], taken[weight.name] = step, [number]
    effective = {number for numbers in taken.values() for number in numbers}
    for number, each in enumerate(recipe.steps):
        if isinstance(each, Step) and number not in effective:
            raise UsageError(
                f"step {number + 1} (where = {each.where!r}) has no effect: later steps select all of its "
                "weights; remove it, or put it after them"
            )
    for name, step in chosen.items():
        weight = graph.weight(name)
        try:
            if step.sparsity is not None:
                step.sparsity.check(weight.columns)
            step.method.check(weight.columns)
            check_order(step.hadamard, weight.columns)
            if weight.kind == "lookup":
                _check_table(step, weight, recipe)
            if step.activations and weight.columns % (group := ACTIVATIONS[step.activations].group):
                asked = f"activations={step.activations!r}"
                raise UsageError(f"{asked}: {weight.columns} inputs are no multiple of {group}")
        except UsageError as error:
            place = f"{weight.path}, block {weight.block}" if weight.block is not None else weight.path
            raise UsageError(f"{error} ({place})") from error
    _check_inputs(graph, chosen)
    for name, step in chosen.items():
        if "fisher" in step.needs and (step.hadamard or any(change.needs for change in recipe.changes)):
            raise UsageError(
                f"{step.method.name} measures gradients in the basis of the source: leave out hadamard, smooth and awq "
                f"({name}; rotate may stay)"
            )
    for tuning in recipe.tunings:
        if missing := [w.name for w in graph.select(tuning.where) if w.name not in chosen]:
            raise UsageError(
                f"{tuning.method.name} (where = {tuning.where!r}) tunes what is encoded, and {missing[0]} is not; "
                "select only weights that an earlier step encodes"
            )
        for weight in graph.select(tuning.where):
            step = chosen[weight.name]
            try:
                tuning.method.check(weight.columns, step.scheme(weight.rows, weight.columns).parts)
            except UsageError as error:
                raise UsageError(f"{error} ({weight.path})") from error
        if filled := [w.name for w in graph.select(tuning.where) if chosen[w.name].sparse]:
            raise UsageError(
                f"{tuning.method.name} (where = {tuning.where!r}) would fill the zeros of {filled[0]}; select only "
                "weights that no step keeps at zero"
            )
        if any(step.hadamard for step in chosen.values()) or any(change.needs for change in recipe.changes):
            raise UsageError(
                f"{tuning.method.name} tunes weights in the basis of the source: leave out hadamard, smooth and awq "
                "before it (rotate may stay)"
            )
    return chosen


def _leaves_zeros(step: Step, weight: Weight) -> bool:
    """Whether the step leaves a weight in its dtype, for another to encode."""
    return step.scheme(weight.rows, weight.columns).unquantized


def _chained(before: Step, step: Step) -> Step:
    """A step that encodes what an earlier one has set to zero."""
    for name in INPUTS:
        if getattr(before, name):
            raise UsageError(f"{before.method.name}: {name} belongs to the step that encodes the same weights later")
    if step.keep_zeros:
        raise UsageError(f"keep_zeros=true has no effect after {before.method.name}, whose zeros are kept anyway")
    if not step.method.keeps_zeros:
        raise UsageError(
            f"{step.method.name} cannot keep the zeros of {before.method.name} (where = {step.where!r}); "
            f"{zero_keepers()} can"
        )
    return replace(step, sparsity=before.method)


def _check_table(step: Step, weight: Weight, recipe: Recipe) -> None:
    """UsageError where a table of embeddings would not be stored so that a few rows of it can be read alone."""
    thin = is_product(step.scheme(weight.rows, weight.columns).parts)
    if not thin or step.activations or step.hadamard or recipe.changes or recipe.tunings:
        raise UsageError(
            "embeddings are looked up: they can be two factors (svd_llm, asvd), without activations and hadamard, and "
            "without steps that change the basis or tune"
        )


def _check_inputs(graph: Graph, chosen: Mapping[str, Step]) -> None:
    """UsageError where weights that meet the same inputs ask for different things to happen to them."""
    nothing = ("", 0)
    for unit in graph.units:
        asked = {
            w.name: (step.activations, step.hadamard) if (step := chosen.get(w.name)) else nothing
            for w in graph.unit(unit)
            if w.kind == "linear"
        }
        shared: dict[str, list[str]] = {}
        for weight in graph.unit(unit):
            if weight.kind == "linear":
                shared.setdefault(weight.statistics, []).append(weight.name)
        fused: dict[tuple[str, int | None], list[str]] = {}
        for parameter, pieces in graph.parameters(unit).items():
            for piece in pieces:
                if piece.weight.kind == "linear":
                    fused.setdefault((parameter, piece.index), []).append(piece.weight.name)
        for names in shared.values():
            if len({asked[name][1] for name in names}) > 1:
                raise UsageError(f"hadamard differs among {', '.join(names)}, which share their inputs; set it for all")
        for names in fused.values():
            if len({asked[name] for name in names}) > 1:
                raise UsageError(
                    f"activations or hadamard differ among {', '.join(names)}, which transformers holds as one; set "
                    "them for all"
                )


def spaces(change: Change, graph: Graph) -> tuple[str, ...]:
    """The spaces that a change of basis is applied to, in the order of the model.

    `|` joins names and globs of spaces; `normed` is every space of a block that a norm writes. UsageError for a term
    that matches none.
    """
    known = list(dict.fromkeys(s for w in graph.weights if w.kind == "linear" for s in w.reads.spaces))
    normed = {w.writes.spaces[0] for w in graph.weights if w.kind == "norm" and w.block is not None} & set(known)
    known += [s for s in graph.coordinates if s not in known]
    chosen: set[str] = set()
    for term in change.where.split("|"):
        name = term.strip()
        found = normed if name == "normed" else {s for s in known if fnmatch.fnmatchcase(s, name)}
        if not found:
            near = difflib.get_close_matches(name, known, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"its spaces are {', '.join(known)}, or `normed`"
            raise UsageError(f"where = {change.where!r}: no space of this model is named {name!r}; {hint}")
        chosen |= found
    return tuple(s for s in known if s in chosen)
