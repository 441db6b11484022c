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
import json
import math
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import IO, Any, Literal

import torch

from tersely import errors
from tersely.errors import CheckpointError, ResourceError, TerselyError, UsageError
from tersely.evaluation.engines import ENGINES, PACKAGES, Ready, Task
from tersely.evaluation.subject import setting, subject
from tersely.plan.cost import duration, size
from tersely.results import Point, Speed
from tersely.runtime import find_device, model_kind

Progress = Callable[[str, float], None]
"""Called with what is being done and the share that is done, 0 to 1."""
Phase = Literal["prefill", "decode"]
_PHASES: tuple[Phase, ...] = ("prefill", "decode")
_WORKER = "tersely.evaluation.engines.worker"
_SEED = 0
_SETTLE = 0.02
"""Seconds between turns of different processes: threads that have just worked still spin for some milliseconds."""
_GRACE = 15.0
"""Seconds that a run may go on after the budget has ended, before its process is stopped."""


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


@dataclass(frozen=True, order=True)
class _Cell:
    batch: int
    length: int

    def __str__(self) -> str:
        return f"batch {self.batch}, length {self.length}"


@dataclass(frozen=True)
class _Grid:
    """What is to be measured: `cells` cheapest first, the first of them one sequence of the shortest length."""

    cells: tuple[_Cell, ...]
    asked: frozenset[_Cell]
    tokens: int
    repeats: int
    warmups: int


class _LateError(Exception):
    """An answer did not come in time."""


class _ShortageError(Exception):
    """A cell for which memory does not suffice, in a process that goes on."""


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
    return speeds(
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
    )[0]


def speeds(
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
) -> tuple[Speed, ...]:
    """`speed` of several models, measured in turns: all are loaded at once, and one works at a time. See `race`."""
    return race(
        models,
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
    ).speeds


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
    """`speeds` of several models, and their ratios to the first with the spread over paired runs.

    engine: one for all, or one for each model. All models are in memory at once. Raises as `speed`.
    """
    began = time.monotonic()
    say = progress or (lambda *_: None)
    grid = _grid(batches, lengths, tokens, repeats, warmups)
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
    names = [_engine(model, name, device) for model, name in zip(models, asked, strict=True)]
    kept = _dtype(dtype, names)
    subjects = [subject(model, dtype="") for model in models]
    packages = [package for name in dict.fromkeys(names) for package in PACKAGES[name]]
    where = replace(setting(device, packages=packages), threads=threads)
    clock = _Clock(began, budget)
    with contextlib.ExitStack() as stack:
        runners = []
        for model, name in zip(models, names, strict=True):
            say(f"loading {model}", 0.0)
            task = Task(
                str(Path(model).expanduser()),
                device,
                "auto" if name == "llama.cpp" else kept,
                threads,
                max(cell.batch for cell in grid.cells),
                max(cell.length for cell in grid.cells) + tokens,
            )
            process = stack.enter_context(_process(f"{model}", name))
            runners.append(_Runner(f"{model}", name, process, task, clock))
        _measure(runners, grid, clock, say)
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
            notes=(*_left_out(runner, grid), *runner.notes),
            seconds=seconds,
        )
        for model, what, runner in zip(models, subjects, runners, strict=True)
    )
    say("finished", 1.0)
    return Race(found, tuple(_ratios(runner, runners[0], grid) for runner in runners[1:]))


@dataclass(frozen=True)
class _Clock:
    began: float
    budget: float | None

    def left(self) -> float:
        return math.inf if self.budget is None else self.budget - (time.monotonic() - self.began)


class _Runner:
    """A model in its process, and what was measured of it."""

    def __init__(self, model: str, engine: str, process: _Process, task: Task, clock: _Clock) -> None:
        self.model, self.engine = model, engine
        self._process, self._clock = process, clock
        try:
            answer = process.ask({"load": asdict(task), "engine": engine}, "loading", clock.left())
        except _LateError:
            raise ResourceError(
                f"{model}: loading it in {engine} took longer than the budget of {duration(clock.budget or 0)}; "
                "give more time"
            ) from None
        self.ready = Ready(**{**answer["ready"], "notes": tuple(answer["ready"]["notes"])})
        self.load: float = answer["seconds"]
        self.loaded, self.peak = answer["memory"]
        self.notes = list(self.ready.notes)
        if task.device == "cpu":
            self.notes.append(
                f"{size(answer['before'])} of the memory are the process and the libraries of {engine}, without a model"
            )
        self.times: dict[_Cell, list[tuple[float, float]]] = {}
        self.wanting: dict[_Cell, str] = {}
        """Cells that were left out or have too few repeats, and why."""

    def fits(self, cell: _Cell, tokens: int) -> bool:
        return self.ready.positions is None or cell.length + tokens <= self.ready.positions

    def run(self, cell: _Cell, tokens: int) -> tuple[float, float]:
        """Seconds of prefill and decode. Raises _LateError, _ShortageError, and what ends the measuring."""
        request = {"batch": cell.batch, "length": cell.length, "tokens": tokens, "seed": _SEED}
        answer = self._process.ask({"run": request}, f"running {cell}", self._clock.left())
        self.peak = max(self.peak, answer["memory"][1])
        return answer["timed"]["prefill"], answer["timed"]["decode"]

    def points(self, grid: _Grid) -> tuple[Point, ...]:
        return tuple(
            _point(phase, cell, tokens, [pair[number] for pair in self.times[cell]])
            for number, phase in enumerate(_PHASES)
            for cell in sorted(self.times.keys() & grid.asked)
            for tokens in ([cell.length, grid.tokens][number],)
        )


def _measure(runners: Sequence[_Runner], grid: _Grid, clock: _Clock, say: Progress) -> None:
    """Fill the runners' times, round by round; the cells of the first round are those for which there is time."""
    rounds = grid.warmups + grid.repeats
    able = {cell: [r for r in runners if r.fits(cell, grid.tokens)] for cell in grid.cells}
    plan = {cell: able[cell] for cell in grid.cells if able[cell]}
    for runner in runners:
        if runner not in able[grid.cells[0]]:
            raise UsageError(
                f"{runner.model}: {grid.cells[0].length} tokens of a prompt and {grid.tokens} new ones exceed its "
                f"{runner.ready.positions} positions; ask for shorter lengths or fewer tokens"
            )
        for cell in grid.cells:
            if runner not in able[cell]:
                runner.wanting[cell] = f"left out, longer than the model's {runner.ready.positions} positions"
    taken: dict[_Cell, float] = {}
    done, everything = 0, rounds * sum(map(len, plan.values()))
    try:
        if grid.warmups and clock.budget is not None:  # a first run sets up libraries, so no other is told from it
            for runner in runners:
                _first(runner, grid)
        for number in range(rounds):
            for cell in list(plan):
                must = cell == grid.cells[0] and number <= grid.warmups
                turn = plan[cell] if number % 2 == 0 else plan[cell][::-1]
                if number == 0 and not must:
                    reserved = sum(taken.values()) * (rounds - 1)
                    if clock.left() < reserved + _expected(cell, taken) * rounds:
                        del plan[cell]
                        continue
                elif not must and clock.left() < taken[cell]:
                    continue
                start = time.monotonic()
                pairs, short = [], []
                for runner in turn:
                    say(f"{runner.model}: {cell}", done / max(1, everything))
                    if len(runners) > 1:
                        time.sleep(_SETTLE)
                    done += 1
                    if cell == grid.cells[0]:
                        pairs.append((runner, _first(runner, grid)))
                        continue
                    try:
                        pairs.append((runner, runner.run(cell, grid.tokens)))
                    except _ShortageError as error:
                        short.append(runner)
                        runner.times.pop(cell, None)
                        runner.wanting[cell] = f"left out, {error}"
                taken[cell] = time.monotonic() - start
                plan[cell] = [runner for runner in plan[cell] if runner not in short]
                if number >= grid.warmups:
                    for runner, pair in pairs:
                        runner.times.setdefault(cell, []).append(pair)
    except _LateError:
        if any(grid.cells[0] not in runner.times for runner in runners):
            raise ResourceError(
                f"the budget of {duration(clock.budget or 0)} does not suffice for one run of {grid.cells[0]}; "
                "give more time"
            ) from None
    for runner in runners:
        for cell in grid.cells:
            counted = len(runner.times.get(cell, ()))
            if counted < grid.repeats and cell not in runner.wanting:
                share = f"{counted} of {grid.repeats} repeats" if counted else "left out"
                runner.wanting[cell] = f"{share}, the budget of {duration(clock.budget or 0)} does not suffice"


def _first(runner: _Runner, grid: _Grid) -> tuple[float, float]:
    """Run the first cell. Raises ResourceError: no memory for it, so there is nothing to measure."""
    try:
        return runner.run(grid.cells[0], grid.tokens)
    except _ShortageError as error:
        raise ResourceError(
            f"{runner.model}: {runner.engine}, {grid.cells[0]}: {error}; ask for shorter lengths, or use a machine "
            "with more memory"
        ) from None


def _left_out(runner: _Runner, grid: _Grid) -> tuple[str, ...]:
    """A note for each reason, with the cells that were asked for."""
    reasons: dict[str, list[str]] = {}
    for cell in grid.cells:
        if cell in runner.wanting and cell in grid.asked:
            reasons.setdefault(runner.wanting[cell], []).append(f"{cell}")
    return tuple(f"{reason}: {'; '.join(cells)}" for reason, cells in reasons.items())


def _expected(cell: _Cell, taken: Mapping[_Cell, float]) -> float:
    """Seconds of a cell, by those of the largest that ran: as many times more as it has prompt tokens."""
    if not taken:
        return 0.0
    known = max(taken, key=lambda c: c.batch * c.length)
    return taken[known] * max(1.0, cell.batch * cell.length / (known.batch * known.length))


def _point(phase: Phase, cell: _Cell, tokens: int, seconds: Sequence[float]) -> Point:
    middle = median(seconds)
    return Point(
        phase=phase,
        batch=cell.batch,
        length=cell.length,
        tokens=tokens,
        seconds=middle,
        fastest=min(seconds),
        slowest=max(seconds),
        repeats=len(seconds),
        tokens_per_second=cell.batch * tokens / middle if middle > 0 else math.inf,
    )


def _ratios(runner: _Runner, base: _Runner, grid: _Grid) -> tuple[Ratio, ...]:
    made = []
    for number, phase in enumerate(_PHASES):
        for cell in sorted(runner.times.keys() & base.times.keys() & grid.asked):
            pairs = zip(base.times[cell], runner.times[cell], strict=True)
            each = [theirs[number] / own[number] for theirs, own in pairs if own[number] > 0]
            if each:
                made.append(Ratio(phase, cell.batch, cell.length, median(each), min(each), max(each), len(each)))
    return tuple(made)


def _grid(batches: Sequence[int], lengths: Sequence[int], tokens: int, repeats: int, warmups: int) -> _Grid:
    for name, numbers in (("batches", batches), ("lengths", lengths), ("tokens", [tokens]), ("repeats", [repeats])):
        if not numbers or any(type(number) is not int or number < 1 for number in numbers):
            shown = numbers[0] if name in ("tokens", "repeats") else list(numbers)
            raise UsageError(f"{name}={shown}: expected whole numbers of 1 or more")
    if type(warmups) is not int or warmups < 0:
        raise UsageError(f"warmups={warmups}: expected a whole number of 0 or more")
    asked = frozenset(_Cell(batch, length) for batch in batches for length in lengths)
    first = _Cell(1, min(lengths))
    others = sorted(asked - {first}, key=lambda cell: (cell.batch * (cell.length + tokens), cell))
    return _Grid((first, *others), asked, tokens, repeats, warmups)


def _engine(model: str | Path, name: str | None, device: str) -> str:
    """The engine for a model, once it is known that it is there and can run such a model."""
    if name is not None and name not in ENGINES:
        near = difflib.get_close_matches(name.lower(), ENGINES, n=1, cutoff=0.5)
        raise UsageError(f"engine {name!r} is unknown{_mean(near)}; expected one of {', '.join(ENGINES)}")
    place = Path(model).expanduser()
    if not place.exists():
        raise CheckpointError(f"{model}: no such file or folder; give a checkpoint folder or a .gguf file")
    if place.is_file() and place.suffix != ".gguf":
        raise CheckpointError(f"{model}: expected a checkpoint folder or a .gguf file")
    chosen = name or ("llama.cpp" if place.is_file() else "transformers")
    if chosen == "llama.cpp":
        if place.is_dir():
            raise UsageError(f"{model}: llama.cpp reads .gguf files, and this is a folder; give it the file")
        if importlib.util.find_spec("llama_cpp") is None:
            raise UsageError(
                f"{model}: llama-cpp-python is not installed; install it with pip install 'tersely[llama-cpp]'"
            )
        return chosen
    if place.is_file():
        raise UsageError(f"{model}: {chosen} reads checkpoint folders, and this is a .gguf file; use llama.cpp for it")
    if (kind := model_kind(place)) != "causal":
        raise UsageError(
            f"{model}: only causal language models are timed, this one is {kind}; "
            "give a checkpoint such as LlamaForCausalLM"
        )
    if chosen == "vllm":
        if find_device(device).type != "cuda":
            raise UsageError(f"--device {device}: vLLM is timed on a CUDA device; use --device cuda where there is one")
        if importlib.util.find_spec("vllm") is None:
            raise UsageError("vllm is not installed; install it with pip install vllm")
    return chosen


def _mean(near: Sequence[str]) -> str:
    return f", did you mean {near[0]}?" if near else ""


def _dtype(dtype: str | torch.dtype, engines: Sequence[str]) -> str:
    name = str(dtype).removeprefix("torch.")
    known = ("auto", "float32", "bfloat16", "float16")
    if name not in known:
        raise UsageError(f"dtype {name!r} is unknown; expected one of {', '.join(known)}")
    if name != "auto" and all(engine == "llama.cpp" for engine in engines):
        raise UsageError(f"dtype {name}: a GGUF file runs as it is stored; leave dtype out")
    return name


def _disk(model: str | Path, weights: int) -> int:
    """Bytes of all files of a folder, hidden ones excepted; of a file, what its parts have together."""
    place = Path(model).expanduser()
    if place.is_file():
        return weights
    files = (f for f in place.rglob("*") if f.is_file())
    return sum(f.stat().st_size for f in files if not any(p.startswith(".") for p in f.relative_to(place).parts))


class _Process:
    """A worker (`engines.worker`): asked in lines of JSON."""

    def __init__(self, model: str, engine: str, process: subprocess.Popen[str], trouble: IO[bytes]) -> None:
        self._model, self._engine = model, engine
        self._process, self._trouble = process, trouble
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def ask(self, request: Mapping[str, Any], doing: str, seconds: float) -> dict[str, Any]:
        """The answer. Raises _LateError where none comes in this time and some more, _ShortageError where a run wants
        memory, and as a TerselyError what the worker says or that it died.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # a worker that is gone is noticed below
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        try:
            line = self._answers.get(timeout=None if math.isinf(seconds) else max(0.0, seconds) + _GRACE)
        except queue.Empty:
            self._process.kill()
            raise _LateError from None
        if line is None:
            raise self._death(doing)
        answer: dict[str, Any] = json.loads(line)
        if "error" not in answer:
            return answer
        kind: type[TerselyError] = getattr(errors, answer["error"])
        if kind is ResourceError and "run" in request:
            raise _ShortageError(answer["message"])
        named = self._model in answer["message"]
        raise kind(answer["message"] if named else f"{self._model}: {self._engine}, {doing}: {answer['message']}")

    def close(self) -> None:
        """End the worker, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what was not yet written is of no use to anyone
                assert pipe is not None
                pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def _death(self, doing: str) -> TerselyError:
        code = self._process.wait()
        self._trouble.seek(0)
        lines = self._trouble.read().decode("utf-8", "replace").strip().splitlines()
        said = f": {lines[-1].strip()[:300]}" if lines else ""
        if code == -signal.SIGKILL:
            return ResourceError(
                f"{self._model}: {self._engine} was killed while {doing}, most likely for want of memory; "
                "ask for smaller batches or lengths, or use a machine with more"
            )
        how = f"crashed ({_signal(-code)})" if code < 0 else f"ended with status {code}"
        return CheckpointError(f"{self._model}: {self._engine} {how} while {doing}{said}")


@contextlib.contextmanager
def _process(model: str, engine: str) -> Iterator[_Process]:
    """A worker that ends with the block."""
    with tempfile.TemporaryFile() as trouble:
        process = _Process(
            model,
            engine,
            subprocess.Popen(
                [sys.executable, "-P", "-m", _WORKER],  # -P: no module of the user's folder stands in for one of ours
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=trouble,
                encoding="utf-8",
            ),
            trouble,
        )
        try:
            yield process
        finally:
            process.close()


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
