"""What is done to a model before it is cut: turned into another basis, or trained with gates.

Shapes: D coordinates of the residual stream, G structures of a place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tersely.bases import Orthogonal
from tersely.checkpoint import Checkpoint, open_checkpoint
from tersely.graph import Graph, read_graph
from tersely.methods.cut import Gating, Turning
from tersely.plan.recipe import Cut
from tersely.rebase import check_rebase
from tersely.rewriting import finish
from tersely.rotation import turned, untied
from tersely.runtime import load_model, load_tokenizer
from tersely.shape.gate_training import train_gates
from tersely.shape.gates import check_gates, masked
from tersely.shape.scoring import measured, normalized_moments, norms_read
from tersely.shape.setup import Setup
from tersely.shape.sizes import places_of_step, planned_sizes
from tersely.shape.structures import Place
from tersely.writer import Writer, replace_file


@dataclass(frozen=True)
class Prepared:
    """What is cut, and how."""

    checkpoint: Checkpoint
    step: Cut
    scores: Sequence[Tensor] | None
    """Of all places, (G,) each, where they are known by now."""
    notes: Sequence[str]


def preparable(checkpoint: Checkpoint, graph: Graph, step: Cut) -> Checkpoint:
    """The headers of what will be cut. UsageError: what cannot be done to this model, and why."""
    if isinstance(step.method, Gating):
        check_gates(graph, places_of_step(graph, step))
    if not isinstance(step.method, Turning):
        return checkpoint
    whole = untied(checkpoint, graph)
    graph = read_graph(whole)
    size = graph.sizes["residual"]
    basis_DD = _basis(whole, graph, step, step.method, torch.ones((size, size)))
    check_rebase(graph, whole, "residual", Orthogonal(basis_DD))
    return whole


def prepared(checkpoint: Checkpoint, step: Cut, folder: Path, setup: Setup) -> Prepared:
    """Do it, beside `folder`."""
    graph = read_graph(checkpoint)
    if isinstance(step.method, Turning):
        aside = folder.with_name(f"{folder.name}-turned")
        return Prepared(_turned(checkpoint, graph, step, step.method, aside, setup), step, None, ())
    if isinstance(step.method, Gating):
        sizes = planned_sizes(graph, checkpoint.config, step)
        keep = {place: sizes.count(place) for place in places_of_step(graph, step)}
        aside = folder.with_name(f"{folder.name}-gated")
        made, scores, note = gated_checkpoint(checkpoint, graph, keep, step.method, aside, setup)
        # What goes is zero by now: nothing is to be made up for.
        return Prepared(made, replace(step, refit=False), scores, (note,))
    return Prepared(checkpoint, step, None, ())


def _basis(checkpoint: Checkpoint, graph: Graph, step: Cut, method: Turning, moments_DD: Tensor) -> Tensor:
    kept = planned_sizes(graph, checkpoint.config, step).kept["residual"]
    return method.basis(moments_DD, kept, centred=graph.family.norm == "layer")


def _turned(checkpoint: Checkpoint, graph: Graph, step: Cut, method: Turning, folder: Path, setup: Setup) -> Checkpoint:
    """The same model, its residual stream in the method's basis: an ordinary checkpoint in `folder`."""
    if setup.resume and folder.is_dir():
        return open_checkpoint(folder)
    needs = frozenset({"gram", "mean"})
    asked = {unit: {w.stage: needs for w in norms_read(graph, unit).values()} for unit in graph.units}
    asked[""] = {graph.head_space: needs}
    moments_DD = torch.zeros((graph.sizes["residual"],) * 2, dtype=torch.float64)
    for (unit, name), stats in measured(checkpoint, graph, asked, setup, "second moments"):
        moments_DD += normalized_moments(checkpoint, graph, unit, name, stats)
    whole = untied(checkpoint, graph)
    basis_DD = _basis(whole, read_graph(whole), step, method, moments_DD)
    return turned(whole, [("residual", Orthogonal(basis_DD))], folder, setup.facts, setup.resume)


def gated_checkpoint(
    checkpoint: Checkpoint, graph: Graph, keep: Mapping[Place, int], settings: Gating, folder: Path, setup: Setup
) -> tuple[Checkpoint, tuple[Tensor, ...], str]:
    """Train gates and adapters, and write the checkpoint with them to `folder`; what lies there whole is taken.

    keep: structures that are left of each place; all others are zero in what is written, so that a cut removes nothing
    that counts. Returns the checkpoint, the scores (log alpha) of each place in the order of `keep`, and what was
    gained. Raises as `train_gates` does.
    """
    record = folder.with_name(f"{folder.name}.json")
    if not (setup.resume and folder.is_dir()):
        prompt = load_tokenizer(checkpoint.path)(settings.prompt)["input_ids"] if settings.prompt else ()
        network = load_model(checkpoint.path, device=str(setup.device), dtype=torch.float32)
        found = train_gates(
            network, graph, keep, setup.ids, settings, prompt=prompt, seed=setup.seed, progress=setup.say
        )
        del network
        note = (
            f"{settings.name}: {found.losses[0]:.4g} nats a token in the first step, {found.losses[-1]:.4g} in the last"
        )
        record.parent.mkdir(parents=True, exist_ok=True)
        plain = {"scores": [found.scores[place].tolist() for place in keep], "note": note}
        replace_file(record, (json.dumps(plain) + "\n").encode())
        writer = Writer(folder, setup.facts, resume=setup.resume)
        try:
            units = {"outside": "", **{f"block-{n:05d}": unit for n, unit in enumerate(graph.units)}}
            for name, unit in units.items():
                own = {w.name: found.weights.get(w.name, checkpoint[w.name]) for w in graph.unit(unit)}
                own |= masked(graph, own, found.values)
                kinds = {n: checkpoint.spec(n).dtype for n in own}
                writer.put(name, {n: own[n].to(kinds[n]).contiguous() for n in own}, {})
            finish(writer, checkpoint, graph, list(units), checkpoint.config)
        finally:
            writer.close()
    read = json.loads(record.read_text("utf-8"))
    return open_checkpoint(folder), tuple(torch.tensor(own) for own in read["scores"]), read["note"]
