"""The sections of the page: what is said, tabled and drawn of the facts. Nothing is measured here."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from tersely.report.cells import short, shortened
from tersely.report.dossier import Dossier
from tersely.report.sections.blame import blame_section
from tersely.report.sections.engines import engine_section
from tersely.report.sections.language import text_section
from tersely.report.sections.lead import first_facts, lead
from tersely.report.sections.models import model_section
from tersely.report.sections.record import making_section, measurement_section
from tersely.report.sections.samples import sample_section
from tersely.report.sections.shapes import shape_section
from tersely.report.sections.sites import error_section, site_section
from tersely.report.sections.sizes import size_section
from tersely.report.sections.speed import speed_sections
from tersely.report.sections.tasks import task_section
from tersely.report.sections.verdict import verdict_section
from tersely.report.sections.vocabulary import vocabulary_section

_EVALUATE = "tersely evaluate {out} --against {source} --text FILE"
_TASKS = "tersely evaluate {out} --against {source} --tasks TASKS"
_BLAME = "tersely blame {out} --against {source} --text FILE"
_SPEED = "tersely speed {out} {source}"


def contents(dossiers: Sequence[Dossier]) -> dict[str, Any]:
    main = dossiers[0]
    evaluation = main.evaluation
    out = shlex.quote(short(main.folder, 400)) if main.folder else "OUT"
    source = shlex.quote(short(main.report.source, 400)) if main.report and main.report.source else "MODEL"
    commands = {
        key: text.format(out=out, source=source)
        for key, text in (("evaluate", _EVALUATE), ("tasks", _TASKS), ("blame", _BLAME), ("speed", _SPEED))
    }
    sections = [
        ("verdict", "What was kept"),
        *([("models", "Models compared")] if len(dossiers) > 1 else []),
        ("sizes", "Before and after"),
        ("text", "Text"),
        ("tasks", "Tasks"),
        ("lost", "Where it was lost"),
        ("speed", "Speed"),
        ("samples", "Samples"),
        ("run", "How to run it"),
        ("made", "What was done"),
        *([("sites", "Every weight")] if main.report and main.report.rows else []),
    ]
    return {
        "sections": sections,
        "name": main.name or "(no name)",
        "lead": lead(main),
        "facts": first_facts(main),
        "commands": commands,
        "verdict": verdict_section(evaluation),
        "models": model_section(dossiers) if len(dossiers) > 1 else None,
        "sizes": size_section(main),
        "shapes": shape_section(main.report) if main.report else None,
        "vocabulary": vocabulary_section(main.report) if main.report else None,
        "language": text_section(evaluation.text) if evaluation and evaluation.text else None,
        "tasks": task_section(evaluation) if evaluation and evaluation.tasks else None,
        "errors": error_section(main.report) if main.report and main.report.rows else None,
        "blame": blame_section(main.blame) if main.blame else None,
        "speed": speed_sections(main) if main.speeds else None,
        "samples": sample_section(evaluation.samples) if evaluation and evaluation.samples else None,
        "engines": engine_section(main, out),
        "sites": site_section(main),
        "made": making_section(main) if main.report else None,
        "measured": measurement_section(main),
        "notes": shortened(evaluation.notes if evaluation else ()),
    }
