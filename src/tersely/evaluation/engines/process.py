"""The process in which a model is timed, as the one that asks sees it. What runs in it: `worker`."""

from __future__ import annotations

import contextlib
import json
import math
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from typing import IO, Any

from tersely import errors
from tersely.errors import CheckpointError, ResourceError, TerselyError

_WORKER = "tersely.evaluation.engines.worker"
_GRACE = 15.0
"""Seconds that a run may go on after the budget has ended, before its process is stopped."""


class LateError(Exception):
    """An answer did not come in time."""


class ShortageError(Exception):
    """A cell for which memory does not suffice, in a process that goes on."""


class Process:
    """A worker (`engines.worker`): asked in lines of JSON."""

    def __init__(self, model: str, engine: str, process: subprocess.Popen[str], trouble: IO[bytes]) -> None:
        self._model, self._engine = model, engine
        self._process, self._trouble = process, trouble
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def ask(self, request: Mapping[str, Any], doing: str, seconds: float) -> dict[str, Any]:
        """The answer. Raises LateError where none comes in this time and some more, ShortageError where a run wants
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
            raise LateError from None
        if line is None:
            raise self._death(doing)
        answer: dict[str, Any] = json.loads(line)
        if "error" not in answer:
            return answer
        kind: type[TerselyError] = getattr(errors, answer["error"])
        if kind is ResourceError and "run" in request:
            raise ShortageError(answer["message"])
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
def worker(model: str, engine: str) -> Iterator[Process]:
    """A worker that ends with the block."""
    with tempfile.TemporaryFile() as trouble:
        process = Process(
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
