"""Kills jobs at chosen moments and continues them: run as a script, so that it can fork before PyTorch works.

    python tests/killing.py JOB.json

JOB.json: {"source", "recipe" (TOML), "calibration" or null, "format", "folder", "stride"}. Every file that a job
makes durable and every name that it changes is a moment. One job runs undisturbed, to `folder`/whole, and the
number of moments is counted. Then, for every `stride`-th moment, a job is killed right before it and a second
process continues it, to `folder`/killed-N. Prints {"moments": n, "killed": [...], "failed": [...]}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(path: str) -> None:
    plan = json.loads(Path(path).read_text("utf-8"))
    import torch
    from transformers import AutoTokenizer  # noqa: F401

    import tersely.compression  # noqa: F401
    from tersely.checkpoint import open_checkpoint
    from tersely.graph import read_graph
    from tersely.stream import build

    # What takes long to import is imported once, before the processes part.
    checkpoint = open_checkpoint(plan["source"])
    build(checkpoint, read_graph(checkpoint), torch.float32, torch.device("cpu"))
    folder = Path(plan["folder"])
    moments = folder / "moments"
    failed = []
    if in_process(lambda: job(plan, folder / "whole", counting=moments)):
        failed.append("whole")
    count = len(moments.read_text("utf-8")) if moments.exists() else 0
    killed = list(range(1, count + 1, plan["stride"]))
    for number in killed:
        out = folder / f"killed-{number}"
        if in_process(lambda out=out, number=number: job(plan, out, kill_at=number)) != -signal.SIGKILL:  # type: ignore[misc]
            failed.append(f"{number} was not killed")
        if out.exists() and number < count:
            failed.append(f"{number} was there before it was whole")
        if in_process(lambda out=out: job(plan, out, resume=True)):  # type: ignore[misc]
            failed.append(f"{number} did not continue")
    print(json.dumps({"moments": count, "killed": killed, "failed": failed}))


def in_process(work: Callable[[], None]) -> int:
    """Exit code of a child that does the work; negative: the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def job(
    plan: dict[str, Any], out: Path, *, kill_at: int = 0, resume: bool = False, counting: Path | None = None
) -> None:
    from tersely.compression import compress
    from tersely.plan.reading import recipe_from_toml

    seen = 0

    def watched(own: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if counting is not None:
                counting.write_text("." * seen, "utf-8")
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return own(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "replace", "link"):
        setattr(os, name, watched(getattr(os, name)))
    recipe = recipe_from_toml(plan["recipe"])
    compress(plan["source"], recipe, out, calibration=plan["calibration"], format=plan["format"], resume=resume)


if __name__ == "__main__":
    main(sys.argv[1])
