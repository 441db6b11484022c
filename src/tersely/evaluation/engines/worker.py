"""The process in which one engine runs one model: a line of JSON asks, a line answers, the end of input ends it.

    {"load": {Task}, "engine": NAME}        -> {"ready": {Ready}, "seconds", "before", "memory"}
    {"run": {"batch", "length", "tokens", "seed"}} -> {"timed": {Timed}, "memory"}
    anything that fails                     -> {"error": class of tersely.errors, "message"}

memory is [now, at most so far]; before: resident bytes of the process with the engine's library, no model loaded.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import sys
import time
from dataclasses import asdict
from typing import Any

from tersely import errors
from tersely.evaluation.engines import ENGINES, Engine, Task
from tersely.evaluation.engines.memory import resident


def prompts(vocabulary: int, *, batch: int, length: int, seed: int) -> list[list[int]]:
    """Random token ids: the same for every engine, since what a text says does not change how long it takes."""
    draw = random.Random(f"{seed} {batch} {length}")
    return [draw.choices(range(vocabulary), k=length) for _ in range(batch)]


def main() -> None:
    """Answer until the input ends. What the libraries print goes to stderr, apart from the answers."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    engine: Engine | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "load" in request:
                engine, answer = _load(request["engine"], Task(**request["load"]))
            else:
                assert engine is not None
                answer = _run(engine, **request["run"])
        except Exception as error:
            answer = _failure(error)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _load(name: str, task: Task) -> tuple[Engine, dict[str, Any]]:
    module = importlib.import_module(ENGINES[name].module)
    before = resident()[0]
    start = time.perf_counter()
    engine: Engine = module.load(task)
    seconds = time.perf_counter() - start
    gc.collect()
    gc.freeze()
    return engine, {"ready": asdict(engine.ready), "seconds": seconds, "before": before, "memory": engine.memory()}


def _run(engine: Engine, batch: int, length: int, tokens: int, seed: int) -> dict[str, Any]:
    ids = prompts(engine.ready.vocabulary, batch=batch, length=length, seed=seed)
    gc.collect()
    gc.disable()
    try:
        timed = engine.run(ids, tokens)
    finally:
        gc.enable()
    return {"timed": asdict(timed), "memory": engine.memory()}


def _failure(error: BaseException) -> dict[str, str]:
    message = f"{error}"
    if _is_shortage(error):
        return {"error": "ResourceError", "message": f"out of memory ({_line(message)})"}
    if isinstance(error, errors.TerselyError):
        return {"error": type(error).__name__, "message": message}
    return {"error": "CheckpointError", "message": f"{type(error).__name__}: {_line(message)}"}


def _is_shortage(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that memory was refused: PyTorch has no class for that on a CPU."""
    while error is not None:
        refused = any(words in str(error) for words in ("not enough memory", "can't allocate memory", "out of memory"))
        if isinstance(error, MemoryError) or refused:
            return True
        error = error.__cause__ or error.__context__
    return False


def _line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")[:300]


if __name__ == "__main__":
    main()
