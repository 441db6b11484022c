"""The steps of a job that leave a smaller shape: each reads a folder and writes one, an ordinary checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from tersely.checkpoint import Checkpoint, open_checkpoint
from tersely.errors import CheckpointError, UsageError
from tersely.graph import read_graph
from tersely.methods import Work
from tersely.methods.cut import Gating
from tersely.plan.cost import streamed
from tersely.plan.recipe import Cut, Drop, Shape
from tersely.results import Reshaping
from tersely.rewriting import finish
from tersely.shape import cut, depth, experts
from tersely.shape.config import check_built
from tersely.shape.gate_training import gates_work
from tersely.shape.prepared import Prepared, preparable, prepared
from tersely.shape.setup import Setup, Written
from tersely.shape.sizes import places_of_step
from tersely.stream.gradients import gradient_bytes
from tersely.writer import Writer, replace_file


def planned(checkpoint: Checkpoint, step: Shape, asked: str) -> Checkpoint:
    """The headers of what a step will write. UsageError: what it cannot do to this model, and why."""
    graph = read_graph(checkpoint)
    if isinstance(step, Cut):
        whole = preparable(checkpoint, graph, step)
        made = cut.planned(whole, read_graph(whole), step)
    elif isinstance(step, Drop):
        made = depth.planned(checkpoint, graph, step)
    else:
        made = experts.planned(checkpoint, graph, step.method)
    try:
        check_built(made, read_graph(made))
    except CheckpointError as error:
        raise UsageError(f"{asked}: {error}") from error
    return made


def reshape(checkpoint: Checkpoint, step: Shape, folder: Path, setup: Setup) -> tuple[Checkpoint, Reshaping]:
    """Write a checkpoint of another shape to `folder`, and beside it what was done; what lies there whole is taken."""
    record = folder.with_name(f"{folder.name}.json")
    if setup.resume and record.is_file():
        return open_checkpoint(folder), Reshaping(**json.loads(record.read_text("utf-8")))
    ready = prepared(checkpoint, step, folder, setup) if isinstance(step, Cut) else None
    written = _written(checkpoint, step, ready, folder, setup)
    made = open_checkpoint(folder)
    told = [*written.notes, *(ready.notes if ready else ())]
    done = Reshaping(step.where, step.method.name, checkpoint.parameters, made.parameters, written.scores, told)
    replace_file(record, (json.dumps(vars(done), indent=2) + "\n").encode())
    return made, done


def _written(checkpoint: Checkpoint, step: Shape, ready: Prepared | None, folder: Path, setup: Setup) -> Written:
    """Write the folder of a step, unit by unit."""
    if setup.resume and folder.is_dir():
        # Killed before its record was written, which tells what it did: that is found out again.
        shutil.rmtree(folder)
    checkpoint = checkpoint if ready is None else ready.checkpoint
    graph = read_graph(checkpoint)
    writer = Writer(folder, setup.facts, resume=setup.resume)
    try:
        if ready is not None:
            written = cut.cut(checkpoint, graph, ready.step, writer, setup, ready.scores)
        elif isinstance(step, Drop):
            written = depth.drop(checkpoint, graph, step, writer, setup)
        else:
            assert not isinstance(step, Cut)
            written = experts.split(checkpoint, graph, step.method, writer, setup)
        finish(writer, checkpoint, graph, written.units, written.config)
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
    if isinstance(step.method, Gating):
        trained = gates_work(graph, places_of_step(graph, step), step.method, context=max(lengths))
        memory, flops = max(memory, trained.memory), flops + trained.flops
    if step.method.needs & {"gradient", "fisher"}:
        wanted = [w.name for w in graph.weights if any(place.made_of(w) for place in places_of_step(graph, step))]
        needs = step.method.needs & {"gradient", "fisher"}
        memory, flops = max(memory, gradient_bytes(graph, wanted, lengths, needs=needs)), flops + 4 * once
    return Work(flops=flops, memory=memory)
