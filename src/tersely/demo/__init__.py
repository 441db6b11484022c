"""The demo: compress the model in the package, measure what it cost, and write the page. Nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from tersely.compression import compress
from tersely.errors import OutputError
from tersely.evaluation.blame import blame
from tersely.evaluation.dossiers import dossier, write_dossiers
from tersely.evaluation.evaluator import evaluate
from tersely.results import Blame, Evaluation, Report, Sample
from tersely.verify import Verification, verify

FOLDER = Path(str(resources.files(__name__)))
MODEL, RECIPE = FOLDER / "model", FOLDER / "recipe.toml"
CALIBRATION, EVALUATION = FOLDER / "calibration.txt", FOLDER / "evaluation.txt"
WEIGHTS = 6
"""Single weights that are swapped, after the blocks."""


@dataclass(frozen=True)
class Demo:
    """What the demo did, and what it measured."""

    report: Report
    evaluation: Evaluation
    blame: Blame
    verification: Verification
    page: str
    """The report, as HTML."""

    @property
    def sample(self) -> Sample:
        """How the original and the compressed model continue a text that neither has seen."""
        return self.evaluation.samples[0]

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
            "blame": json.loads(self.blame.to_json()),
            "page": self.page,
            "verification": asdict(self.verification),
        }


def run_demo(out: str | Path, *, progress: Callable[[str, float], None] | None = None) -> Demo:
    """Compress the demo model into `out`, evaluate it against the original, find where it lost, verify it, report.

    A demo that was stopped is continued. Raises OutputError where `out` or the page exists: nothing is overwritten.
    progress: as for `compress`.
    """
    say = progress or _silent
    page = Path(f"{str(out).rstrip('/')}-report.html")
    if page.exists():
        raise OutputError(f"{page} exists; move it away, or give the demo another folder with --out")
    report = compress(
        MODEL,
        RECIPE,
        out,
        calibration=CALIBRATION,
        resume=not Path(out).exists(),
        progress=lambda what, share: say(f"compressing {what}", 0.5 * share),
    )
    evaluation = evaluate(out, EVALUATION, against=MODEL, progress=lambda what, share: say(what, 0.5 + 0.2 * share))
    found = blame(
        out, EVALUATION, against=MODEL, weights=WEIGHTS, progress=lambda what, share: say(what, 0.7 + 0.2 * share)
    )
    say("verifying", 0.9)
    verification = verify(out, source=MODEL)
    write_dossiers([replace(dossier(out, None), evaluation=evaluation, blame=found)], page)
    say("finished", 1.0)
    return Demo(report, evaluation, found, verification, str(page))


def _silent(_what: str, _share: float) -> None:
    """For callers who want no progress."""
