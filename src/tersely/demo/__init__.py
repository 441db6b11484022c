"""The demo: compress the model in the package, and measure what it cost. Nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from tersely.compression import compress
from tersely.evaluation import Evaluation, evaluate
from tersely.results import Report
from tersely.runtime import generate
from tersely.verify import Verification, verify

FOLDER = Path(str(resources.files(__name__)))
MODEL, RECIPE = FOLDER / "model", FOLDER / "recipe.toml"
CALIBRATION, EVALUATION = FOLDER / "calibration.txt", FOLDER / "evaluation.txt"
PROMPT = "The old man looked at the sea, and"
TOKENS = 40


@dataclass(frozen=True)
class Demo:
    """What the demo did, and what it measured."""

    report: Report
    evaluation: Evaluation
    prompt: str
    before: str
    """How the original continues the prompt, taking the most likely token each time."""
    after: str
    """How the compressed model does."""
    verification: Verification

    @property
    def matrix_bytes(self) -> tuple[int, int]:
        """Of the weights that were compressed, before and after."""
        rows = self.report.rows
        return sum(row.bytes_before for row in rows), sum(row.bytes_after for row in rows)

    @property
    def matrix_ratio(self) -> float:
        """How many times smaller the compressed weights are."""
        before, after = self.matrix_bytes
        return before / after

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "out": self.report.out,
            "ratio": self.report.ratio,
            "matrix_ratio": self.matrix_ratio,
            "report": self.report.to_dict(),
            "evaluation": json.loads(self.evaluation.to_json()),
            "prompt": self.prompt,
            "before": self.before,
            "after": self.after,
            "verification": asdict(self.verification),
        }


def run_demo(out: str | Path, *, progress: Callable[[str, float], None] | None = None) -> Demo:
    """Compress the demo model into `out`, evaluate it against the original, let both write, and verify it.

    A demo that was stopped is continued. Raises OutputError where `out` exists: nothing is overwritten.
    progress: as for `compress`.
    """
    say = progress or _silent
    report = compress(
        MODEL,
        RECIPE,
        out,
        calibration=CALIBRATION,
        resume=not Path(out).exists(),
        progress=lambda what, share: say(f"compressing {what}", 0.6 * share),
    )
    say("evaluating", 0.6)
    evaluation = evaluate(out, EVALUATION, against=MODEL)
    say("writing", 0.8)
    before, after = (generate(folder, PROMPT, max_new_tokens=TOKENS) for folder in (MODEL, out))
    say("verifying", 0.95)
    verification = verify(out, source=MODEL)
    say("finished", 1.0)
    return Demo(report, evaluation, PROMPT, before, after, verification)


def _silent(_what: str, _share: float) -> None:
    """For callers who want no progress."""
