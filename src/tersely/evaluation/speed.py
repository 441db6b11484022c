"""How fast models run: time to the first token, tokens a second over batch and length, memory, bytes on disk.

A cell is a batch and a length. One run of a cell gives both phases: prefill, from the call to the first token chosen,
and decode, `tokens` steps more with a cache of keys and values, each taking the most likely token of every sequence;
end tokens do not end it. Prompts are random token ids by seed, the same for every engine with that vocabulary: what
a text says does not change how long it takes.

Each model runs in a process of its own, so that its peak memory is its own and a crash of its engine is an error
here. Repeats go round: every cell of every model once, then again, the models in turn and in the other order each
time, so that what else the machine does falls on all of them. Only one works at a time.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from tersely.errors import CheckpointError, UsageError
from tersely.evaluation.engines import ENGINES, EngineFacts, Task
from tersely.evaluation.engines.process import worker
from tersely.evaluation.engines.rounds import PHASES, Clock, Grid, Phase, Progress, Runner, grid_of, left_out, measure
from tersely.evaluation.subject import setting, subject
from tersely.results import Speed
from tersely.runtime import find_device, require_causal


@dataclass(frozen=True)
class Ratio:
    """Tokens a second of a model over those of the first in the same cell: above 1 is faster.

    Each repeat gives one ratio, of two runs right after each other: their median, the smallest and the largest.
    """

    phase: Phase
    batch: int
    length: int
    median: float
    smallest: float
    largest: float
    repeats: int


@dataclass(frozen=True)
class Race:
    """Models that were measured in turns. ratios[i]: of speeds[i + 1] to speeds[0], cells that both have."""

    speeds: tuple[Speed, ...]
    ratios: tuple[tuple[Ratio, ...], ...]


def speed(
    model: str | Path,
    *,
    engine: str | None = None,
    batches: Sequence[int] = (1, 4),
    lengths: Sequence[int] = (128, 512),
    tokens: int = 32,
    repeats: int = 5,
    warmups: int = 1,
    threads: int | None = None,
    device: str = "cpu",
    dtype: str | torch.dtype = "auto",
    budget: float | None = None,
    progress: Progress | None = None,
) -> Speed:
    """Measure how fast a causal language model runs, and what it takes.

    engine: "transformers", "llama.cpp" or "vllm"; None chooses by what the model is: a .gguf file runs in llama.cpp, a
    checkpoint folder in transformers. batches x lengths: the cells; tokens: steps of decoding after each prompt.
    repeats: runs that count, after `warmups` that do not. threads: of the processor, by default PyTorch's number.
    dtype: of the weights in transformers and vLLM; a GGUF file runs as it is stored.

    budget: seconds for everything; cells are then tried from the cheapest on, and those whose runs would not fit are
    left out, as are cells beyond the model's positions; `notes` names them. The first cell always runs once.

    Memory on a CPU is resident memory of the model's process: with the engine's libraries, with the model's file where
    that is mapped, and at its peak with what loading took. On a CUDA device it is what was allocated there.

    Raises UsageError: an unknown engine, one that is not installed or cannot read such a model, no causal language
    model, a bad number, no such device, lengths beyond all positions; CheckpointError: no such model, one that cannot
    be read, or an engine that crashes on it; ResourceError: memory or time do not suffice.
    """
    return race(
        [model],
        engine=engine,
        batches=batches,
        lengths=lengths,
        tokens=tokens,
        repeats=repeats,
        warmups=warmups,
        threads=threads,
        device=device,
        dtype=dtype,
        budget=budget,
        progress=progress,
    ).speeds[0]


def race(
    models: Sequence[str | Path],
    *,
    engine: str | Sequence[str | None] | None = None,
    batches: Sequence[int] = (1, 4),
    lengths: Sequence[int] = (128, 512),
    tokens: int = 32,
    repeats: int = 5,
    warmups: int = 1,
    threads: int | None = None,
    device: str = "cpu",
    dtype: str | torch.dtype = "auto",
    budget: float | None = None,
    progress: Progress | None = None,
) -> Race:
    """`speed` of several models in turns, and their ratios to the first with the spread over paired runs.

    engine: one for all, or one for each model. All models are in memory at once. Raises as `speed`.
    """
    began = time.monotonic()
    say = progress or (lambda *_: None)
    grid = grid_of(batches, lengths, tokens, repeats, warmups)
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise UsageError(f"threads={threads}: expected 1 or more")
    if budget is not None and not budget > 0:
        raise UsageError(f"budget={budget}: expected more than 0 seconds")
    if not models:
        raise UsageError("no model to measure: give at least one")
    find_device(device)
    asked = [engine] * len(models) if engine is None or isinstance(engine, str) else list(engine)
    if len(asked) != len(models):
        raise UsageError(f"{len(asked)} engines for {len(models)} models: give one for all, or one for each")
    engines = [_engine(model, name, device) for model, name in zip(models, asked, strict=True)]
    kept = _dtype(dtype, engines)
    subjects = [subject(model, dtype="") for model in models]
    packages = [package for each in dict.fromkeys(engines) for package in each.packages]
    where = replace(setting(device, packages=packages), threads=threads)
    clock = Clock(began, budget)
    with contextlib.ExitStack() as stack:
        runners = []
        for model, each in zip(models, engines, strict=True):
            say(f"loading {model}", 0.0)
            task = Task(
                str(Path(model).expanduser()),
                device,
                "auto" if each.runs_as_stored else kept,
                threads,
                max(cell.batch for cell in grid.cells),
                max(cell.length for cell in grid.cells) + tokens,
            )
            process = stack.enter_context(worker(f"{model}", each.name))
            runners.append(Runner(f"{model}", each.name, process, task, clock))
        measure(runners, grid, clock, say)
    seconds = time.monotonic() - began
    found = tuple(
        Speed(
            model=replace(what, dtype=runner.ready.dtype),
            setting=where,
            engine=runner.engine,
            format=runner.ready.format,
            points=runner.points(grid),
            first_token=median(prefill for prefill, _ in runner.times[grid.cells[0]]),
            load=runner.load,
            memory_loaded=runner.loaded,
            memory_peak=max(runner.peak, runner.loaded),
            disk=_disk(model, what.bytes),
            notes=(*left_out(runner, grid), *runner.notes),
            seconds=seconds,
        )
        for model, what, runner in zip(models, subjects, runners, strict=True)
    )
    say("finished", 1.0)
    return Race(found, tuple(_ratios(runner, runners[0], grid) for runner in runners[1:]))


def _ratios(runner: Runner, base: Runner, grid: Grid) -> tuple[Ratio, ...]:
    made = []
    for number, phase in enumerate(PHASES):
        for cell in sorted(runner.times.keys() & base.times.keys() & grid.asked):
            pairs = zip(base.times[cell], runner.times[cell], strict=True)
            each = [theirs[number] / own[number] for theirs, own in pairs if own[number] > 0]
            if each:
                made.append(Ratio(phase, cell.batch, cell.length, median(each), min(each), max(each), len(each)))
    return tuple(made)


def _engine(model: str | Path, name: str | None, device: str) -> EngineFacts:
    """The engine for a model, once it is known that it is there and can run such a model."""
    if name is not None and name not in ENGINES:
        near = difflib.get_close_matches(name.lower(), ENGINES, n=1, cutoff=0.5)
        meant = f", did you mean {near[0]}?" if near else ""
        raise UsageError(f"engine {name!r} is unknown{meant}; expected one of {', '.join(ENGINES)}")
    place = Path(model).expanduser()
    if not place.exists():
        raise CheckpointError(f"{model}: no such file or folder; give a checkpoint folder or a .gguf file")
    fitting = next((each for each in ENGINES.values() if each.suffix == _suffix(place)), None)
    if fitting is None:
        raise CheckpointError(f"{model}: expected a checkpoint folder or a .gguf file")
    chosen = fitting if name is None else ENGINES[name]
    if chosen.suffix != fitting.suffix:
        if chosen.suffix:
            raise UsageError(f"{model}: {name} reads {chosen.suffix} files, and this is a folder; give it the file")
        raise UsageError(
            f"{model}: {name} reads checkpoint folders, and this is a {fitting.suffix} file; use {fitting.name} for it"
        )
    if not chosen.suffix:
        require_causal(place, "are timed")
    if find_device(device).type not in chosen.devices:
        only = chosen.devices[0]
        raise UsageError(
            f"--device {device}: {chosen.name} is timed on a {only.upper()} device; "
            f"use --device {only} where there is one"
        )
    if importlib.util.find_spec(chosen.library) is None:
        raise UsageError(
            f"{model}: {chosen.packages[0]} is not installed; install it with pip install {chosen.requirement}"
        )
    return chosen


def _suffix(place: Path) -> str | None:
    """What an engine must read to read this: "" for a folder; None for a file without a suffix, which none reads."""
    return "" if place.is_dir() else place.suffix or None


def _dtype(dtype: str | torch.dtype, engines: Sequence[EngineFacts]) -> str:
    name = str(dtype).removeprefix("torch.")
    known = ("auto", "float32", "bfloat16", "float16")
    if name not in known:
        raise UsageError(f"dtype {name!r} is unknown; expected one of {', '.join(known)}")
    if name != "auto" and all(engine.runs_as_stored for engine in engines):
        raise UsageError(f"dtype {name}: a GGUF file runs as it is stored; leave dtype out")
    return name


def _disk(model: str | Path, weights: int) -> int:
    """Bytes of all files of a folder, hidden ones excepted; of a file, what its parts have together."""
    place = Path(model).expanduser()
    if place.is_file():
        return weights
    files = (f for f in place.rglob("*") if f.is_file())
    return sum(f.stat().st_size for f in files if not any(p.startswith(".") for p in f.relative_to(place).parts))
