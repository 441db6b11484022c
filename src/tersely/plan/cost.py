"""What a job will use: memory, disk and time, said before it starts.

The model of the peak is: the interpreter with its libraries, one block, the hidden states of all calibration
sequences, one micro-batch inside a block, the largest Gram matrix with the copy that is factorized, and the
weights that are encoded together. Times come from counts of floating point operations and a short measurement
of this machine.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from tersely.calibrate import MicroBatch, Sequences, micro_batches
from tersely.errors import ResourceError, UsageError
from tersely.graph import Graph, Weight
from tersely.methods import TuneModel, Work
from tersely.methods.tune import rounding_work, tuning_work
from tersely.plan.recipe import Step, Tuning

SUSPEND_BYTES = 512 << 20
"""Up to this size, intermediate activations of all micro-batches are held so that each block runs once."""
_MICRO_BYTES = 16 << 20
_LIBRARIES = 280 << 20
_LIBRARIES_MEASURED = 520 << 20
_KERNEL_BYTES = 700 << 10
_EXPERT_TOKENS = 320
"""Different numbers of tokens that reach an expert: seldom more."""
_IMPORT_SECONDS = (1.5, 4.5)
_DISK_RATE = 600e6


@dataclass(frozen=True)
class Cost:
    """Bytes and seconds that a job is expected to use at most, and what the machine has."""

    memory: int
    disk: int
    seconds: float
    memory_available: int
    disk_available: int
    output: int
    """Bytes of the finished weights."""
    device_memory: int = 0
    """Of `memory`'s parts, those that lie on the accelerator instead."""

    def check(self, out: Path) -> None:
        """ResourceError where the job cannot fit."""
        if self.memory > self.memory_available:
            raise ResourceError(
                f"the job needs about {size(self.memory)} of memory, and {size(self.memory_available)} are free; "
                "lower --set calibration.samples or --set calibration.context, or use a machine with more"
            )
        if self.disk > self.disk_available:
            raise ResourceError(
                f"the job needs about {size(self.disk)} of disk at {out.parent}, and "
                f"{size(self.disk_available)} are free; make room or choose another folder"
            )


def micro_batch_tokens(graph: Graph, dtype: torch.dtype) -> int:
    """Tokens of a micro-batch: as many as keep its widest activations within 16 MB, 512 to 8192."""
    widest = max(w.columns for w in graph.weights if w.kind == "linear")
    return max(512, min(8192, _MICRO_BYTES // (4 * widest * dtype.itemsize)))


def calibration_batches(
    data: Sequences, graph: Graph, dtype: torch.dtype, most: int | None = None
) -> tuple[MicroBatch, ...]:
    """The calibration text in micro-batches of at most `most` tokens; padded where no expert and no encoder sees it."""
    tokens = micro_batch_tokens(graph, dtype)
    pad = not graph.has_experts and graph.family.auto_class == "CausalLM"
    return micro_batches(data, tokens=tokens if most is None else min(tokens, most), pad=pad)


def waits_inside(graph: Graph, batches: Sequence[MicroBatch], dtype: torch.dtype) -> bool:
    """Whether micro-batches wait inside a block with what they have computed, so that it runs once."""
    padded = sum(batch.ids_BL.numel() for batch in batches)
    return not graph.has_experts and suspended_bytes(graph, padded, dtype) <= SUSPEND_BYTES


def suspended_bytes(graph: Graph, tokens: int, dtype: torch.dtype) -> int:
    """Intermediate activations of all micro-batches while they wait inside a block."""
    first = graph.unit(graph.units[0])
    inner = max(w.columns for w in first if w.kind == "linear")
    return tokens * (4 * graph.sizes["residual"] + inner) * dtype.itemsize


def streamed(graph: Graph, columns: int, tokens: int, dtype: torch.dtype) -> int:
    """Memory of a paged forward over so many tokens: a block, hidden states, what waits inside a block, and a Gram
    matrix of `columns` inputs with a copy (0: none)."""
    block = max(sum(_numel(w) for w in graph.unit(unit)) for unit in graph.units) * dtype.itemsize
    hidden = 2 * tokens * graph.sizes["residual"] * dtype.itemsize
    suspended = suspended_bytes(graph, tokens, dtype)
    held = suspended if suspended <= SUSPEND_BYTES and not graph.has_experts else 0
    return block + hidden + max(held, 8 * _MICRO_BYTES) + 8 * columns * columns


def estimate(
    graph: Graph,
    steps: Mapping[str, Step],
    *,
    sequences: Sequence[int],
    tunings: Sequence[Tuning],
    gradients: int,
    shapes: Sequence[Work],
    output: int,
    between: int,
    out: Path,
    dtype: torch.dtype,
    device: torch.device,
) -> Cost:
    """Expected peak and duration of a job.

    sequences: tokens of each sequence of calibration text. gradients: memory that measuring those of the loss needs;
    0: they are not measured. shapes: what steps that leave a smaller shape cost. output: bytes of the finished weights;
    between: of folders that only a later step reads.
    """
    tokens = sum(sequences)
    blocks = [graph.unit(u) for u in graph.units]
    numel = {u: sum(_numel(w) for w in graph.unit(u)) for u in graph.units}
    copied = max((w.spec.nbytes for w in graph.weights if w.name not in steps), default=0)
    stages = [
        [w for w in block if w.name in steps and w.stage == s]
        for u, block in zip(graph.units, blocks, strict=True)
        for s in graph.stages(u)
    ]
    encoded = max((_stage_bytes(ws) for ws in stages if ws), default=0)
    work = {n: step.work(graph.weight(n).rows, graph.weight(n).columns) for n, step in steps.items()}
    passes = sum(_numel(graph.weight(n)) * w.passes for n, w in work.items())
    flops = sum(w.flops for w in work.values())
    encoded += max((w.memory for w in work.values()), default=0)
    seconds = _IMPORT_SECONDS[0] + passes * 4e-9 + output / _DISK_RATE + flops / _flops_per_second(device)
    seconds += 40e-6 * sum(work[ws[0].name].loops for ws in _stacks(graph, steps))
    memory, on_device = _LIBRARIES + max(encoded, copied), 0
    if tokens:
        measured = [w for w in graph.weights if w.name in steps and "gram" in steps[w.name].needs]
        columns = max((w.columns for w in measured), default=0)
        held = suspended_bytes(graph, tokens, dtype) <= SUSPEND_BYTES and not graph.has_experts
        experts = max(_expert_grams(graph, steps) - 8 * columns * columns, 0)
        working = streamed(graph, columns, tokens, dtype) + experts + encoded
        working = max(working, gradients)
        if gradients:
            seconds += 8 * tokens * sum(numel.values()) / _flops_per_second(device)
        lookup = tokens * graph.sizes["residual"] * 8
        kernels = _expert_kernels(graph, _largest(graph, sequences, dtype), dtype, device)
        memory = _LIBRARIES_MEASURED + kernels + max(working, lookup, copied)
        on_device = working if device.type != "cpu" else 0
        forward = sum(2 * tokens * n for n in numel.values()) * (1.1 if held else 2.3)
        gram_flops = sum(
            1.3 * tokens * c * c
            for block in blocks
            for c in {w.statistics: w.columns for w in block if w in measured}.values()
        )
        seconds += (
            _IMPORT_SECONDS[1]
            - _IMPORT_SECONDS[0]
            + 1.4 * (forward / _flops_per_second(device, dtype) + gram_flops / _flops_per_second(device))
        )
        for tuning in tunings:
            own = [graph.weight(name) for name in {w.name for w in graph.select(tuning.where)}]
            if isinstance(tuning.method, TuneModel):
                needed = tuning_work(graph, own, tuning.method, context=max(sequences), texts=len(sequences))
            else:
                micro = _largest(graph, sequences, dtype, tuning.method.batch)
                needed = rounding_work(graph, own, tuning.method, sequences=sequences, micro=micro, dtype=dtype)
                # Kernels for two products more on the way back; what measuring used is not given back before.
                needed = replace(needed, memory=working + needed.memory + 3 * kernels)
            memory = max(memory, _LIBRARIES_MEASURED + needed.memory)
            seconds += 2 * needed.flops / _flops_per_second(device)
    for shape in shapes:
        memory = max(memory, _LIBRARIES_MEASURED + shape.memory)
        seconds += 1.4 * shape.flops / _flops_per_second(device, dtype)
    # Units lie beside the folder that is put together from them until it is whole.
    disk = 2 * output + between
    return Cost(memory, disk, seconds, psutil.virtual_memory().available, _free(out), output, on_device)


def size(count: float) -> str:
    """Bytes for people: 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def parse_size(text: str) -> int:
    """The inverse, as people write it: "500MB", "1.2 GB", "900kB", "4096". Raises UsageError: anything else, or 0."""
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "mib": 1 << 20, "gib": 1 << 30}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    count = round(float(found[1]) * units[found[2].lower()]) if found and found[2].lower() in units else 0
    if not count:
        raise UsageError(f"{text!r} is no number of bytes; write it as 500MB, 1.2GB or 900kB")
    return count


def duration(seconds: float) -> str:
    """Seconds for people: 2 min 05 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def parse_duration(text: str) -> float:
    """The inverse, as people write it: "90", "90s", "10min", "1h30min". Raises UsageError: anything else, or 0."""
    units = {"h": 3600.0, "min": 60.0, "m": 60.0, "s": 1.0, "": 1.0}
    pieces = re.fullmatch(r"(?:\d+(?:\.\d+)?(?:h|min|m|s|)(?!\d))+", compact := text.replace(" ", "").lower())
    total = sum(float(n) * units[u] for n, u in re.findall(r"(\d+(?:\.\d+)?)(h|min|m|s|)", compact)) if pieces else 0
    if not total:
        raise UsageError(f"{text!r} is no length of time; write it as 90s, 10min or 1h30min")
    return total


def _numel(weight: Weight) -> int:
    return weight.spec.nbytes // weight.spec.dtype.itemsize


def _stage_bytes(weights: list[Weight]) -> int:
    """The weights that are stacked, in float32 with two working copies, and their codes."""
    return max(sum(_numel(w) for w in weights if w.statistics == s) for s in {w.statistics for w in weights}) * 13


def _stacks(graph: Graph, steps: Mapping[str, Step]) -> list[list[Weight]]:
    """Weights that are encoded together, since they share their inputs."""
    together: dict[tuple[str, ...], list[Weight]] = {}
    for name, step in steps.items():
        weight = graph.weight(name)
        shares = step.row_wise and step.needs
        together.setdefault((weight.unit, weight.statistics, repr(step), "" if shares else name), []).append(weight)
    return list(together.values())


def _expert_grams(graph: Graph, steps: Mapping[str, Step]) -> int:
    largest = 0
    for unit in graph.units:
        per_stage: dict[str, dict[str, int]] = {}
        for w in graph.unit(unit):
            if w.expert is not None and w.name in steps and "gram" in steps[w.name].needs:
                per_stage.setdefault(w.stage, {})[w.statistics] = 4 * w.columns * w.columns
        largest = max([largest, *(sum(s.values()) + max(s.values()) for s in per_stage.values())])
    return largest


def _largest(graph: Graph, sequences: Sequence[int], dtype: torch.dtype, most: int | None = None) -> int:
    """Tokens of the largest micro-batch, of at most so many sequences; with experts, all of one length."""
    limit, longest = micro_batch_tokens(graph, dtype), max(sequences)
    limit = limit if most is None else min(limit, most * longest)
    if not graph.has_experts:
        return max(longest, min(limit, sum(sequences)))
    return max(length * max(1, min(count, limit // length)) for length, count in Counter(sequences).items())


def _expert_kernels(graph: Graph, tokens: int, dtype: torch.dtype, device: torch.device) -> int:
    """Memory of what multiplies experts' weights by their inputs, in micro-batches of so many tokens.

    For 16 bits on CPUs, PyTorch's library makes a kernel for every number of tokens, and keeps it.
    """
    if device.type != "cpu" or dtype.itemsize != 2:
        return 0
    stages = {w.stage for w in graph.weights if w.expert is not None}
    return len(stages) * min(tokens, _EXPERT_TOKENS) * _KERNEL_BYTES


def _flops_per_second(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """The best of a few products, since a busy machine slows single ones down."""
    a = torch.randn(768, 768, device=device).to(dtype)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        float((a @ a)[0, 0])
        seconds.append(time.perf_counter() - start)
    return 2 * 768**3 / min(seconds)


def _free(out: Path) -> int:
    folder = out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free if os.access(folder, os.R_OK) else 0
