"""What was done to the model, and where, when and on what each measurement was made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tersely.plan.cost import duration, size
from tersely.report.cells import Cell, Table, counted, setting, short, shortened
from tersely.report.dossier import Dossier
from tersely.report.sections.speed import pairs, threads
from tersely.results import Report, Setting, Subject


def making_section(dossier: Dossier) -> dict[str, Any]:
    report = dossier.report
    assert report is not None
    steps = []
    for step in steps_of(report):
        settings = ", ".join(f"{k} = {setting(v)}" for k, v in step.items() if k not in ("where", "method"))
        steps.append(
            (Cell(short(str(step.get("where", "")), 80)), Cell(short(str(step.get("method", "")), 60)), Cell(settings))
        )
    facts: list[tuple[str, str]] = [("source", report.source), ("format", report.format)]
    recipe = report.recipe
    facts += [
        (
            key,
            setting(value)
            if not isinstance(value, Mapping)
            else ", ".join(f"{k} = {setting(v)}" for k, v in value.items()),
        )
        for key, value in recipe.items()
        if key != "steps"
    ]
    data = report.calibration
    if data is None:
        facts.append(("data", "none: this recipe measures nothing"))
    else:
        count = f"{data.get('sequences', '?')} {data.get('kind', 'sequences')}, {data.get('tokens', '?')} tokens"
        facts += [("data", f"{data.get('name', '?')}: {count}"), ("SHA-256 of the data", str(data.get("sha256", "")))]
    facts += [("versions", ", ".join(f"{k} {v}" for k, v in dossier.versions.items()))]
    return {
        "steps": Table("Steps", ("where", "method", "settings"), tuple(steps), left=3) if steps else None,
        "facts": [(k, short(v, 400)) for k, v in facts if v],
        "notes": shortened(report.notes),
    }


def measurement_section(dossier: Dossier) -> list[dict[str, Any]]:
    """Where, when and on what each measurement was made."""
    made = []

    def add(what: str, subjects: Iterable[Subject | None], setting: Setting, more: Mapping[str, str]) -> None:
        facts = {
            who: f"{short(s.name, 160)}: {counted(s.parameters)} parameters, {size(s.bytes)}, {short(s.dtype, 60)}"
            + (f", fingerprint {s.fingerprint[:16]}" if s.fingerprint else "")
            for who, s in zip(("model", "base"), subjects, strict=False)
            if s is not None
        }
        facts |= {
            "began": setting.created,
            "on": f"{short(setting.hardware, 120)}, {setting.device}, {threads(setting)}, {size(setting.memory)}",
            **more,
            "versions": ", ".join(f"{k} {v}" for k, v in setting.versions.items()),
        }
        made.append({"what": what, "facts": [(k, short(v, 400)) for k, v in facts.items() if v]})

    e, b = dossier.evaluation, dossier.blame
    if e:
        text = (
            {"text": f"{e.text.text}: {e.text.tokens:,} tokens", "SHA-256 of the text": e.text.sha256} if e.text else {}
        )
        items = {"items": "; ".join(f"{t.name}: {t.items} ({t.sha256[:12]})" for t in e.tasks)} if e.tasks else {}
        more = {**text, **items, "seed": str(e.seed), "time": _time(e.seconds, e.budget)}
        add("Evaluation", (e.model, e.base), e.setting, more)
    if b:
        more = {
            "text": f"{b.text}: {b.tokens:,} tokens",
            "SHA-256 of the text": b.sha256,
            "time": _time(b.seconds, b.budget),
        }
        add("Blame", (b.model, b.base), b.setting, more)
    for speed, _ in pairs(dossier):
        add(f"Speed in {speed.engine}", (speed.model,), speed.setting, {"in memory as": speed.format})
    return made


def _time(seconds: float, budget: float | None) -> str:
    asked = f"; sample sizes chosen for {duration(budget)}" if budget is not None else ""
    return f"{duration(seconds)}{asked}" if seconds > 0 else asked.removeprefix("; ")


def steps_of(report: Report) -> list[Mapping[str, Any]]:
    steps = report.recipe.get("steps", [])
    return [s for s in steps if isinstance(s, Mapping)] if isinstance(steps, list | tuple) else []
