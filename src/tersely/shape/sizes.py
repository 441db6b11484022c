"""How much a cut leaves: sizes of the family's table, from the share that was asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tersely.errors import UsageError
from tersely.families import Sizes as Expressions
from tersely.graph import Graph
from tersely.plan.recipe import Cut
from tersely.shape.config import key_of, resized
from tersely.shape.structures import Place, kinds_of, places_of


@dataclass(frozen=True)
class Sizes:
    """What a cut leaves."""

    kept: Mapping[str, int]
    """Size of the family's table -> its new value."""
    config: dict[str, Any]

    def count(self, place: Place) -> int:
        """Structures that a place keeps."""
        space = {"heads": "kv_heads", "hidden": "residual", "experts": "experts", "neurons": place.read}[place.kind]
        return self.kept[space]


def places_of_step(graph: Graph, step: Cut) -> list[Place]:
    """Everywhere that a step cuts. UsageError: it names structures that the model, or the method, does not have."""
    kinds = kinds_of(step.where)
    for kind in kinds:
        if kind not in step.method.kinds:
            raise UsageError(f"{step.method.name} chooses {', '.join(sorted(step.method.kinds))}, not {kind}")
    return [place for kind in kinds for place in places_of(graph, kind)]


def planned_sizes(graph: Graph, config: Mapping[str, Any], step: Cut) -> Sizes:
    """The sizes that are left, and the config that says them."""
    wanted: dict[str, int] = {}
    places = places_of_step(graph, step)
    for kind in kinds_of(step.where):
        own = [place for place in places if place.kind == kind]
        if kind == "neurons":
            counts = {place.read: place.count for place in own}
            keyed = {s: n for s, n in counts.items() if key_of(graph.family, s, config) is not None}
            wanted |= {s: _kept(n, step, "neurons", step.multiple) for s, n in keyed.items()}
            smaller = resized(graph, config, wanted, "", check=False)
            wanted |= {s: Expressions(graph.family, smaller, "").need(s) for s in counts.keys() - keyed.keys()}
        elif kind == "heads":
            groups = _kept(own[0].count, step, "key/value heads", 1)
            headed = {s for place in own for s in place.spaces} | {"heads", "kv_heads"}
            wanted |= {s: n // own[0].count * groups for s, n in graph.sizes.items() if s in headed}
        elif kind == "experts":
            wanted |= dict.fromkeys(("experts", "router"), _kept_experts(graph, step))
        else:
            wanted["residual"] = _kept(own[0].count, step, "hidden coordinates", step.multiple)
    if _one_number(graph, config) and {"residual", "attn"} & {*wanted}:
        if "residual" not in wanted or "attn" not in wanted:
            key = key_of(graph.family, "residual", config)
            raise UsageError(
                f"where = {step.where!r}: a {graph.model_type} config has one number ({key}) for hidden coordinates "
                "and for all heads together; write `hidden|heads`"
            )
        wanted["residual"] = wanted["attn"]
    return Sizes(wanted, resized(graph, config, wanted, f"where = {step.where!r}"))


def _one_number(graph: Graph, config: Mapping[str, Any]) -> bool:
    """Whether the config has one number for the residual stream and for all heads together."""
    keys = {key_of(graph.family, size, config) for size in ("residual", "attn")}
    return len(keys) == 1 and None not in keys


def _kept(count: int, step: Cut, what: str, multiple: int) -> int:
    """How many of `count` stay: the share that was asked for, to the nearest multiple."""
    exact = count * (1 - step.ratio)
    kept = min(count, round(exact / multiple) * multiple)
    of = f"{count} {what}" + (f", in multiples of {multiple}" if multiple > 1 else "")
    if kept < 1:
        raise UsageError(f"ratio={step.ratio:g} leaves none of {of}; at most {1 - multiple / count:.3g} leaves some")
    if kept == count:
        least = 1 - (max(1, math.ceil(count / multiple) - 0.5) * multiple - 1e-9) / count
        raise UsageError(f"ratio={step.ratio:g} removes none of {of}; from about {max(least, 0):.3g} on it does")
    return kept


def _kept_experts(graph: Graph, step: Cut) -> int:
    count, active = graph.sizes["experts"], graph.sizes.get("active", 1)
    if graph.sizes.get("expert_groups", 1) > 1:
        raise UsageError(
            f"experts: they lie in {graph.sizes['expert_groups']} groups, of which the router chooses first; all must "
            "have the same number, which tersely does not cut"
        )
    kept = _kept(count, step, "experts", 1)
    if kept < active:
        raise UsageError(f"ratio={step.ratio:g} leaves {kept} of {count} experts, and {active} are used for each token")
    return kept
