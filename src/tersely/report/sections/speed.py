"""Speed and memory, beside the base that was measured alike."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from tersely.plan.cost import size
from tersely.report.cells import MOST_BARS, MOST_PICTURES, Cell, Figure, Table, ratio, short, shortened, time_taken
from tersely.report.charts import Line, Mark, number, rows
from tersely.report.dossier import Dossier
from tersely.results import Point, Setting, Speed


def speed_sections(dossier: Dossier) -> list[dict[str, Any]]:
    made = []
    for place, (speed, base) in enumerate(pairs(dossier)):
        figures = []
        for phase, title in (
            ("decode", "Decoding, new tokens a second"),
            ("prefill", "Reading a prompt, tokens a second"),
        ):
            points = sorted((p for p in speed.points if p.phase == phase), key=lambda p: (p.batch, p.length, p.tokens))
            drawn = []
            for p in points[:MOST_BARS]:
                other = same_point(base, p)
                marks = [_rate(p, "model")] + ([_rate(other, "base")] if other else [])
                drawn.append(Line(f"batch {p.batch}, prompt {p.length:,}", tuple(marks)))
            if drawn and place < MOST_PICTURES:
                svg = rows(f"{phase}-{place}", title, drawn, unit="tokens a second", bars=True)
                text = "Blue: model; grey: base. " if base else ""
                figures.append(
                    Figure(title, f"{text}Medians; whiskers from the slowest to the fastest repeat.", Markup(svg))
                )
        body = []
        for p in speed.points:
            other = same_point(base, p)
            body.append(
                (
                    Cell(p.phase),
                    Cell(str(p.batch)),
                    Cell(f"{p.length:,}"),
                    Cell(f"{p.tokens:,}"),
                    Cell(number(p.tokens_per_second, 4)),
                    Cell(number(other.tokens_per_second, 4) if other else ""),
                    Cell(ratio(p.tokens_per_second, other.tokens_per_second) if other else ""),
                    Cell(
                        f"{time_taken(p.seconds)}",
                        f"{time_taken(p.fastest)} to {time_taken(p.slowest)}, {p.repeats} times",
                    ),
                )
            )
        headers = ("phase", "batch", "prompt", "new", "tokens/s", "base", "ratio", "seconds")
        rest = [
            (Cell("first token"), speed.first_token, base.first_token if base else None, time_taken),
            (Cell("loading"), speed.load, base.load if base else None, time_taken),
            (Cell("memory, loaded"), speed.memory_loaded, base.memory_loaded if base else None, size),
            (Cell("memory, peak"), speed.memory_peak, base.memory_peak if base else None, size),
            (Cell("all files on disk"), speed.disk, base.disk if base else None, size),
        ]
        memory = tuple(
            (label, Cell(write(own)), Cell(write(other) if other is not None else ""), Cell(ratio(own, other)))
            for label, own, other, write in rest
        )
        made.append(
            {
                "title": f"{speed.engine}, {short(speed.format, 60)}",
                "where": _where(speed.setting, speed.format, speed.engine),
                "base": f"Base: {short(base.format, 60)}." if base and base.format != speed.format else "",
                "unmatched": bool(dossier.base_speeds) and base is None,
                "figures": figures,
                "grid": Table("Grid", headers, tuple(body)) if body else None,
                "memory": Table("Start and memory", ("", "model", "base", "model / base"), memory),
                "notes": shortened(speed.notes),
            }
        )
    return made


def _rate(point: Point, tone: str) -> Mark:
    tokens = point.tokens_per_second * point.seconds
    fast, slow = (tokens / s if s > 0 else point.tokens_per_second for s in (point.fastest, point.slowest))
    rate = number(point.tokens_per_second, 4)
    return Mark(point.tokens_per_second, slow, fast, f"{rate}", tone, tone)


def _where(setting: Setting, dtype: str, engine: str = "") -> str:
    version = setting.versions.get(engine, "") if engine else ""
    parts = [
        f"{engine} {version}".strip(),
        short(dtype, 60),
        f"{short(setting.hardware, 80)} ({setting.device})" if setting.hardware else setting.device,
        threads(setting),
        f"{size(setting.memory)} of memory",
        setting.created[:10],
    ]
    return ", ".join(p for p in parts if p)


def threads(setting: Setting) -> str:
    return f"{setting.threads} thread{'' if setting.threads == 1 else 's'}"


def pairs(dossier: Dossier) -> list[tuple[Speed, Speed | None]]:
    """Every speed of the model with the base's that was measured alike."""

    def alike(one: Speed) -> tuple[Any, ...]:
        return one.engine, one.setting.device, one.setting.hardware, one.setting.threads

    return [(s, next((b for b in dossier.base_speeds if alike(b) == alike(s)), None)) for s in dossier.speeds]


def same_point(speed: Speed | None, point: Point) -> Point | None:
    wanted = (point.phase, point.batch, point.length, point.tokens)
    found = (p for p in (speed.points if speed else ()) if (p.phase, p.batch, p.length, p.tokens) == wanted)
    return next(found, None)
