"""The steps of a job that leave a smaller shape: each reads a folder and writes one, an ordinary checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersely.calibrate import Sequences, micro_batches
from tersely.checkpoint import Checkpoint, open_checkpoint
from tersely.errors import CheckpointError, UsageError
from tersely.graph import Graph, read_graph
from tersely.methods import Work
from tersely.methods.cut.compresso import Compresso
from tersely.methods.cut.slicegpt import principal
from tersely.plan.cost import micro_batch_tokens, streamed
from tersely.plan.recipe import Cut, Drop, Shape
from tersely.rebase import Orthogonal, check_rebase
from tersely.results import Reshaping
from tersely.rotation import turned, untied
from tersely.shape import cut, depth, experts
from tersely.shape.config import Written, check_built
from tersely.shape.gate_training import gates_work
from tersely.shape.gated import gated_checkpoint
from tersely.shape.gates import check_gates
from tersely.shape.scoring import normalized_moments, norms_read
from tersely.stream import SURVEY, stream
from tersely.stream.gradients import gradient_bytes
from tersely.writer import Writer, replace_file

Say = Callable[[str, float], None]


def planned(checkpoint: Checkpoint, step: Shape, asked: str) -> Checkpoint:
    """The headers of what a step will write. UsageError: what it cannot do to this model, and why."""
    graph = read_graph(checkpoint)
    if isinstance(step, Cut):
        if cut.MOMENTS in step.method.needs:
            checkpoint = untied(checkpoint, graph)
            graph = read_graph(checkpoint)
            kept = cut.planned_sizes(graph, checkpoint.config, step).kept["residual"]
            flip_DD = principal(
                torch.ones((graph.sizes["residual"], graph.sizes["residual"])), kept, centred=_centred(graph)
            )
            check_rebase(graph, checkpoint, "residual", Orthogonal(flip_DD))
        if isinstance(step.method, Compresso):
            check_gates(graph, cut.places_of_step(graph, step))
        made = cut.planned(checkpoint, graph, step)
    elif isinstance(step, Drop):
        made = depth.planned(checkpoint, graph, step)
    else:
        made = experts.planned(checkpoint, graph, step.method)
    try:
        check_built(made, read_graph(made))
    except CheckpointError as error:
        raise UsageError(f"{asked}: {error}") from error
    return made


def reshape(
    checkpoint: Checkpoint,
    step: Shape,
    data: Sequences | None,
    folder: Path,
    facts: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    resume: bool,
    say: Say,
) -> tuple[Checkpoint, Reshaping]:
    """Write a checkpoint of another shape to `folder`, and beside it what was done; what lies there whole is taken."""
    record = folder.with_name(f"{folder.name}.json")
    if resume and record.is_file():
        return open_checkpoint(folder), Reshaping(**json.loads(record.read_text("utf-8")))
    before = checkpoint.parameters
    if not isinstance(step, (Cut, Drop)):
        assert data is not None
        graph = read_graph(checkpoint)
        made = experts.split(
            checkpoint,
            graph,
            data,
            step.method,
            folder,
            facts,
            device=device,
            dtype=dtype,
            seed=seed,
            resume=resume,
            say=say,
        )
        done = Reshaping(step.where, step.method.name, before, made.parameters, {}, [])
    else:
        given, notes = None, []
        if isinstance(step, Cut) and cut.MOMENTS in step.method.needs:
            checkpoint = _in_principal_directions(
                checkpoint, step, data, folder.with_name(f"{folder.name}-turned"), facts, dtype, device, resume, say
            )
        elif isinstance(step, Cut) and isinstance(step.method, Compresso):
            assert data is not None
            graph = read_graph(checkpoint)
            sizes = cut.planned_sizes(graph, checkpoint.config, step)
            checkpoint, given, note = gated_checkpoint(
                checkpoint,
                graph,
                {place: sizes.count(place) for place in cut.places_of_step(graph, step)},
                data,
                step.method,
                folder.with_name(f"{folder.name}-gated"),
                facts,
                device=device,
                seed=seed,
                resume=resume,
                say=say,
            )
            notes.append(note)
            # What goes is zero by now: nothing is to be made up for.
            step = replace(step, refit=False)
        written = _written(checkpoint, step, data, folder, facts, dtype, device, seed, resume, say, given)
        made = open_checkpoint(folder)
        told = [*written.notes, *notes]
        done = Reshaping(step.where, step.method.name, before, made.parameters, written.scores, told)
    replace_file(record, (json.dumps(vars(done), indent=2) + "\n").encode())
    return made, done


def _written(
    checkpoint: Checkpoint,
    step: Cut | Drop,
    data: Sequences | None,
    folder: Path,
    facts: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    resume: bool,
    say: Say,
    given: Sequence[Tensor] | None,
) -> Written:
    """Write the folder of a step, unit by unit."""
    if resume and folder.is_dir():
        # Killed before its record was written, which tells what it did: that is found out again.
        shutil.rmtree(folder)
    graph = read_graph(checkpoint)
    writer = Writer(folder, facts, resume=resume)
    try:
        if isinstance(step, Cut):
            written = cut.cut(
                checkpoint, graph, step, data, writer, dtype=dtype, device=device, seed=seed, say=say, given=given
            )
        else:
            written = depth.drop(checkpoint, graph, step, data, writer, dtype=dtype, device=device, say=say)
        companions = {name: checkpoint.path / name for name in checkpoint.companions}
        config = (json.dumps(written.config, indent=2, ensure_ascii=False) + "\n").encode()
        writer.finish(written.units, {**companions, "config.json": config})
    finally:
        writer.close()
    return written


def work(checkpoint: Checkpoint, step: Shape, lengths: Sequence[int], dtype: torch.dtype) -> Work:
    """What a step costs: memory in all, and floating point operations. lengths: tokens of the calibration sequences."""
    graph, tokens = read_graph(checkpoint), sum(lengths)
    if not tokens:
        return Work(memory=max(w.spec.nbytes for w in graph.weights) * 3)
    parameters = sum(w.rows * w.columns for unit in graph.units for w in graph.unit(unit) if w.kind == "linear")
    once = 2.0 * parameters * tokens
    if isinstance(step, Drop):
        stacks = depth.stacks_of(graph, step)
        models = sum(step.method.losses(len(stack.candidates), stack.count) for stack in stacks)
        head = 2.0 * graph.sizes["tokens"] * graph.sizes["residual"] * tokens
        return Work(flops=once + models * (once + head), memory=streamed(graph, 0, tokens, dtype) + (768 << 20))
    if not isinstance(step, Cut):
        # What comes to a block's MLP is held, by the router's side and by the experts'.
        seen = 3 * tokens * graph.sizes["residual"] * dtype.itemsize
        return Work(flops=6 * once, memory=streamed(graph, graph.sizes["mlp"], tokens, dtype) + seen)
    widest = max(w.columns for w in graph.weights if w.kind == "linear")
    memory, flops = streamed(graph, widest if step.refit else 0, tokens, dtype), 2 * once + step.refit * 2 * once
    if isinstance(step.method, Compresso):
        trained = gates_work(graph, cut.places_of_step(graph, step), step.method, context=max(lengths))
        memory, flops = max(memory, trained.memory), flops + trained.flops
    if step.method.needs & {"gradient", "fisher"}:
        wanted = [w.name for w in graph.weights if any(place.made_of(w) for place in cut.places_of_step(graph, step))]
        needs = step.method.needs & {"gradient", "fisher"}
        memory, flops = max(memory, gradient_bytes(graph, wanted, lengths, needs=needs)), flops + 4 * once
    return Work(flops=flops, memory=memory)


def _centred(graph: Graph) -> bool:
    return graph.family.norm == "layer"


def _in_principal_directions(
    checkpoint: Checkpoint,
    step: Cut,
    data: Sequences | None,
    folder: Path,
    facts: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    resume: bool,
    say: Say,
) -> Checkpoint:
    """The same model, its residual stream in its principal directions: an ordinary checkpoint in `folder`."""
    if resume and folder.is_dir():
        return open_checkpoint(folder)
    assert data is not None
    graph = read_graph(checkpoint)
    plain = not graph.has_experts and graph.family.auto_class == "CausalLM"
    batches = micro_batches(data, tokens=micro_batch_tokens(graph, dtype), pad=plain)
    needs = frozenset({"gram", "mean"})
    surveyed = {u: {w.stage: needs for w in norms_read(graph, u).values()} for u in graph.units}
    total_DD = torch.zeros((graph.sizes["residual"],) * 2, dtype=torch.float64)
    for number, stop in enumerate(
        stream(
            checkpoint,
            graph,
            batches,
            measured={"": {graph.head_space: needs}},
            surveyed={unit: stages for unit, stages in surveyed.items() if stages},
            replaced=lambda _: {},
            dtype=dtype,
            device=device,
            suspend=False,
        )
    ):
        say(f"{stop.unit or 'head'}, second moments", number / (2 * len(graph.units) + 1))
        if stop.stage == SURVEY or not stop.unit:
            for name, stats in stop.statistics.items():
                total_DD += normalized_moments(
                    checkpoint, graph, stop.unit, name if stop.unit else graph.head_space, stats
                )
    whole = untied(checkpoint, graph)
    kept = cut.planned_sizes(read_graph(whole), whole.config, step).kept["residual"]
    basis_DD: Tensor = principal(total_DD, kept, centred=_centred(graph))
    return turned(whole, [("residual", Orthogonal(basis_DD))], folder, facts, resume)
