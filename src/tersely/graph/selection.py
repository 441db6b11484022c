"""Weights by pattern: the `where` of a step."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Collection, Sequence

from tersely.errors import UsageError
from tersely.graph.weight import Weight

_ROLES = {"attention": "attention", "mlp": "mlp", "experts": "expert", "router": "router", "head": "head"}


def select(where: str, weights: Sequence[Weight], units: Sequence[str], tied: bool) -> tuple[Weight, ...]:
    """What `Graph.select` gives. units: the blocks, in order; tied: there is no stored head."""
    linear = {w.name: w for w in weights if w.kind == "linear"}
    tables = {w.name for w in weights if w.kind == "lookup" and w.role == "embedding" and w.reads.spaces == ("tokens",)}
    seldom = {w.name for w in linear.values() if w.block is None or w.role == "router"}
    chosen: set[str] = set()
    for alternative in where.split("|"):
        terms = re.findall(r"!?blocks\s+\S+|\S+", alternative)
        if not terms:
            raise UsageError(f"where = {where!r} has an empty alternative; write `linear` for all weights")
        if terms == ["embedding"] and tables:
            chosen |= tables
            continue
        narrowed = set(linear)
        meant = set(linear) - seldom
        for term in terms:
            found = _matching(term.removeprefix("!"), linear.values(), seldom, units, tied, where)
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
    return tuple(w for w in weights if w.name in chosen)


def _matching(
    term: str, linear: Collection[Weight], seldom: set[str], units: Sequence[str], tied: bool, where: str
) -> set[str]:
    if term == "linear":
        return {w.name for w in linear} - seldom
    if match := re.fullmatch(r"blocks\s+(\d+)(?:-(\d+))?", term):
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last >= len(units):
            raise UsageError(f"where = {where!r}: `{term}`, but the model has blocks 0 to {len(units) - 1}")
        chosen = set(units[first : last + 1])
        return {w.name for w in linear if w.unit in chosen}
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
        if term == "head" and tied:
            reason = "its head is tied to the embedding"
        raise UsageError(f"where = {where!r}: `{term}` matches no linear weight of this model; {reason}")
    return found


def _paths(linear: Collection[Weight]) -> str:
    paths = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", w.path) for w in linear))
    return ", ".join(paths[:12]) + (" ..." if len(paths) > 12 else "")
