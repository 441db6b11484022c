"""The paged forward: a whole model runs with the weights of one block in memory at a time.

The model is transformers' own, built on the meta device. Every micro-batch runs through its forward once, as a
*flow*: a greenlet, which runs when it is told to and pauses at the entrance of each block, inside it where a
statistic is complete, and at its exit. So all flows stand at the same place, the block's weights are read from
the checkpoint, statistics are gathered, weights are replaced by their compressed form, and the next block sees
what the compressed one gives. There is no copy of any model's forward here, no tracing, and no knowledge of a
family but what its table says.

What multiplies an activation is recognised by the address of its weight, so that linear layers, GPT-2's Conv1D and
single experts inside a stacked parameter are one case.

Two ways through a block, bit-equal in their results:
- suspended: flows wait inside the block with their intermediate activations; the block runs once;
- repeated: flows run from the block's entrance up to each statistic; only the block's input is held.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tersely.calibrate import MicroBatch
from tersely.checkpoint import Checkpoint
from tersely.graph import Graph, Weight
from tersely.stream.flow import Flow
from tersely.stream.model import build
from tersely.stream.paged import PARENT, Paged
from tersely.stream.stops import SURVEY, TUNE, Measured, Recorded, Stop, Value

__all__ = ["SURVEY", "TUNE", "Measured", "Recorded", "Stop", "Value", "build", "stream"]


def stream(
    checkpoint: Checkpoint,
    graph: Graph,
    batches: Sequence[MicroBatch],
    *,
    measured: Mapping[str, Measured],
    replaced: Callable[[str], Mapping[str, Value]],
    dtype: torch.dtype,
    device: torch.device,
    suspend: bool,
    surveyed: Mapping[str, Measured] | None = None,
    transformed: Callable[[Weight, Tensor], Tensor] | None = None,
    tables: Mapping[str, Value] | None = None,
    recorded: Collection[str] = (),
    skipped: Sequence[frozenset[str]] | None = None,
    logits: Callable[[Tensor], None] | None = None,
) -> Iterator[Stop]:
    """Run all micro-batches through the model, block by block.

    `measured`: unit -> stages before which to stop with complete statistics, and what they are ("" -> "head_in" for
    the head). `surveyed`: the same of blocks that run once beforehand, with nothing in them changed; then there is one
    stop at the stage SURVEY. `recorded`: blocks that may be tuned when all their weights are replaced: a stop at the
    stage TUNE, with what comes in and what should come out. `transformed`: what the inputs of a weight always go
    through; statistics are of what has gone through it. `replaced`: called when a block is paged in: stored name ->
    what to use instead of the stored tensor. `tables`: the same of embeddings that are two factors. `suspend`: wait
    inside the blocks (not with experts, whose statistics are complete only at the end of a block), or repeat them.
    `skipped`: of each micro-batch, blocks that it passes by. `logits`: what receives the logits of each micro-batch in
    turn; without it the run ends behind the last block (or the head's statistics).

    Yields a Stop before each measured stage and behind each block. CheckpointError where the model has a
    parameter that the checkpoint does not give.
    """
    paged = Paged(checkpoint, graph, measured, surveyed or {}, recorded, transformed, dtype, device, suspend)
    paged.watch.tables = tables or {}
    passed_by = skipped or [frozenset[str]()] * len(batches)
    flows = [Flow(batch, paged.run, own) for batch, own in zip(batches, passed_by, strict=True)]
    try:
        for unit in graph.units:
            paged.meet(flows, unit, "enter")
            values = replaced(unit)
            if unit in paged.followed:
                paged.page_in(unit, {})
                paged.meet(flows, unit, PARENT)
                for name, value in values.items():
                    paged.replace(graph.weight(name), value)
            else:
                paged.page_in(unit, values)
            if unit in paged.surveyed:
                paged.meet(flows, unit, SURVEY)
                yield Stop(unit, SURVEY, paged.take(), paged.replace)
            for stage in measured.get(unit, ()):
                paged.meet(flows, unit, stage)
                yield Stop(unit, stage, paged.take(), paged.replace)
            if unit in recorded:
                paged.meet(flows, unit, TUNE)
                yield Stop(unit, TUNE, {}, paged.replace, paged.record(unit, flows))
            paged.meet(flows, unit, "exit")
            yield Stop(unit, None, {}, paged.replace, passed=[flow.passed for flow in flows if flow.passed])
            for flow in flows:
                flow.passed = None
            paged.page_out(unit)
        for stage in measured.get("", ()):
            paged.meet(flows, "", stage)
            yield Stop("", stage, paged.take(), paged.replace)
        if logits is not None:
            paged.watch.with_head = True
            for flow in flows:
                paged.advance(flow)
                logits(flow.result.logits)
                flow.result = None
    finally:
        with paged.watch:
            for flow in flows:
                flow.cancel()
