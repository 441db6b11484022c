"""Rounds of runs: every cell of every model once, then again, as far as a budget of time goes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Literal

from tersely.errors import ResourceError, UsageError
from tersely.evaluation.engines import Ready, Task
from tersely.evaluation.engines.process import LateError, Process, ShortageError
from tersely.plan.cost import duration, size
from tersely.results import Point

Progress = Callable[[str, float], None]
"""Called with what is being done and the share that is done, 0 to 1."""
Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
_SEED = 0
_SETTLE = 0.02
"""Seconds between turns of different processes: threads that have just worked still spin for some milliseconds."""


@dataclass(frozen=True, order=True)
class Cell:
    batch: int
    length: int

    def __str__(self) -> str:
        return f"batch {self.batch}, length {self.length}"


@dataclass(frozen=True)
class Grid:
    """What is to be measured: `cells` cheapest first, the first of them one sequence of the shortest length."""

    cells: tuple[Cell, ...]
    asked: frozenset[Cell]
    tokens: int
    repeats: int
    warmups: int


@dataclass(frozen=True)
class Clock:
    began: float
    budget: float | None

    def left(self) -> float:
        return math.inf if self.budget is None else self.budget - (time.monotonic() - self.began)


class Runner:
    """A model in its process, and what was measured of it."""

    def __init__(self, model: str, engine: str, process: Process, task: Task, clock: Clock) -> None:
        self.model, self.engine = model, engine
        self._process, self._clock = process, clock
        try:
            answer = process.ask({"load": asdict(task), "engine": engine}, "loading", clock.left())
        except LateError:
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
        self.times: dict[Cell, list[tuple[float, float]]] = {}
        self.wanting: dict[Cell, str] = {}
        """Cells that were left out or have too few repeats, and why."""

    def fits(self, cell: Cell, tokens: int) -> bool:
        return self.ready.positions is None or cell.length + tokens <= self.ready.positions

    def run(self, cell: Cell, tokens: int) -> tuple[float, float]:
        """Seconds of prefill and decode. Raises LateError, ShortageError, and what ends the measuring."""
        request = {"batch": cell.batch, "length": cell.length, "tokens": tokens, "seed": _SEED}
        answer = self._process.ask({"run": request}, f"running {cell}", self._clock.left())
        self.peak = max(self.peak, answer["memory"][1])
        return answer["timed"]["prefill"], answer["timed"]["decode"]

    def points(self, grid: Grid) -> tuple[Point, ...]:
        return tuple(
            _point(phase, cell, tokens, [pair[number] for pair in self.times[cell]])
            for number, phase in enumerate(PHASES)
            for cell in sorted(self.times.keys() & grid.asked)
            for tokens in ([cell.length, grid.tokens][number],)
        )


def grid_of(batches: Sequence[int], lengths: Sequence[int], tokens: int, repeats: int, warmups: int) -> Grid:
    for name, numbers in (("batches", batches), ("lengths", lengths), ("tokens", [tokens]), ("repeats", [repeats])):
        if not numbers or any(type(number) is not int or number < 1 for number in numbers):
            shown = numbers[0] if name in ("tokens", "repeats") else list(numbers)
            raise UsageError(f"{name}={shown}: expected whole numbers of 1 or more")
    if type(warmups) is not int or warmups < 0:
        raise UsageError(f"warmups={warmups}: expected a whole number of 0 or more")
    asked = frozenset(Cell(batch, length) for batch in batches for length in lengths)
    first = Cell(1, min(lengths))
    others = sorted(asked - {first}, key=lambda cell: (cell.batch * (cell.length + tokens), cell))
    return Grid((first, *others), asked, tokens, repeats, warmups)


def measure(runners: Sequence[Runner], grid: Grid, clock: Clock, say: Progress) -> None:
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
    taken: dict[Cell, float] = {}
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
                    except ShortageError as error:
                        short.append(runner)
                        runner.times.pop(cell, None)
                        runner.wanting[cell] = f"left out, {error}"
                taken[cell] = time.monotonic() - start
                plan[cell] = [runner for runner in plan[cell] if runner not in short]
                if number >= grid.warmups:
                    for runner, pair in pairs:
                        runner.times.setdefault(cell, []).append(pair)
    except LateError:
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


def _first(runner: Runner, grid: Grid) -> tuple[float, float]:
    """Run the first cell. Raises ResourceError: no memory for it, so there is nothing to measure."""
    try:
        return runner.run(grid.cells[0], grid.tokens)
    except ShortageError as error:
        raise ResourceError(
            f"{runner.model}: {runner.engine}, {grid.cells[0]}: {error}; ask for shorter lengths, or use a machine "
            "with more memory"
        ) from None


def left_out(runner: Runner, grid: Grid) -> tuple[str, ...]:
    """A note for each reason, with the cells that were asked for."""
    reasons: dict[str, list[str]] = {}
    for cell in grid.cells:
        if cell in runner.wanting and cell in grid.asked:
            reasons.setdefault(runner.wanting[cell], []).append(f"{cell}")
    return tuple(f"{reason}: {'; '.join(cells)}" for reason, cells in reasons.items())


def _expected(cell: Cell, taken: Mapping[Cell, float]) -> float:
    """Seconds of a cell, by those of the largest that ran: as many times more as it has prompt tokens."""
    if not taken:
        return 0.0
    known = max(taken, key=lambda c: c.batch * c.length)
    return taken[known] * max(1.0, cell.batch * cell.length / (known.batch * known.length))


def _point(phase: Phase, cell: Cell, tokens: int, seconds: Sequence[float]) -> Point:
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
