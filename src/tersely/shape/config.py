"""The config of a smaller model, and whether it can say what is wanted."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from typing import Any

import torch

from tersely.checkpoint import Checkpoint
from tersely.errors import UsageError
from tersely.families import Family, Sizes
from tersely.graph import Graph


def key_of(family: Family, size: str, config: Mapping[str, Any]) -> str | None:
    """The config key that gives a size by itself; None where it is computed from others."""
    names = []
    for alternative in family.sizes.get(size, "").split("|"):
        node = ast.parse(alternative.strip() or "0", mode="eval").body
        if not isinstance(node, ast.Name):
            break
        if node.id in family.sizes:
            return key_of(family, node.id, config)
        names.append(node.id)
    return next((name for name in names[1:] if name in config and names[0] not in config), names[0] if names else None)


def resized(
    graph: Graph, config: Mapping[str, Any], wanted: Mapping[str, int], asked: str, *, check: bool = True
) -> dict[str, Any]:
    """The config with other sizes; sizes that would follow and should not are written out.

    wanted: size -> its new value; with `check`, those that follow from others included. asked: what the user wrote, for
    errors. UsageError: the config of this family cannot say it, and why.
    """
    family, new = graph.family, dict(config)
    for size, value in wanted.items():
        if (key := key_of(family, size, config)) is not None:
            new[key] = value
    keys = {key_of(family, size, config) for size in wanted}
    # A size that no weight of this model has may share its key with one that changes.
    unused = {s for s in graph.sizes if s not in {*graph.coordinates, *wanted} and key_of(family, s, config) in keys}
    expected = {size: count for size, count in {**graph.sizes, **wanted}.items() if size not in unused}

    def now(size: str) -> int | None:
        return Sizes(family, new, "").value(size)

    for size, count in expected.items():
        if now(size) != count and size not in wanted and (key := key_of(family, size, config)) is not None:
            new[key] = count
    for size, count in expected.items() if check else ():
        if now(size) != count:
            raise UsageError(
                f"{asked}: a {graph.model_type} config says that {size} is {family.sizes[size]} = {now(size)}, and "
                f"{count} would be needed; this family cannot have that shape"
            )
    return new


def check_built(headers: Checkpoint, graph: Graph) -> None:
    """UsageError where transformers does not take this config, or builds other shapes from it than will be stored.

    graph: of the headers. The model is built without memory for its weights.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    config = dict(headers.config)
    try:
        built_from = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    except (StrictDataclassError, ValueError) as error:
        heads = graph.sizes.get("heads", 1)
        reason = f"transformers does not take a {graph.model_type} config of this shape ({error.__cause__ or error})"
        raise UsageError(
            f"{reason}; cut to another size: with {heads} heads, hidden sizes are best multiples of "
            f"{math.lcm(8, heads)} (set `multiple`)"
        ) from error
    auto = getattr(transformers, f"AutoModelFor{graph.family.auto_class}")
    with torch.device("meta"):
        model = auto.from_config(built_from)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for unit in ("", *graph.units):
        for name, pieces in graph.parameters(unit).items():
            full = f"{unit}.{name}" if unit else name
            if full not in shapes:
                continue
            rows = max(piece.start + piece.rows for piece in pieces)
            slots = {piece.index for piece in pieces}
            shape = (rows, *pieces[0].weight.spec.shape[1:])
            shape = shape if slots == {None} else (len(slots), *shape)
            if shapes[full] != shape:
                raise UsageError(
                    f"transformers builds {full} as {list(shapes[full])} from a {graph.model_type} config of this "
                    f"shape, and {list(shape)} would be stored: this family cannot be cut so"
                )
