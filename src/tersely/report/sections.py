"""The sections of the page: what is said, tabled and drawn of the facts. Nothing is measured here."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from markupsafe import Markup

from tersely.plan.cost import duration, size
from tersely.report.cells import (
    LONGEST_NOTE,
    TIMES,
    Cell,
    Figure,
    Table,
    bin_name,
    bits_a_weight,
    counted,
    exponential,
    long_text,
    measured,
    of_base,
    percent,
    percentile,
    probability,
    ratio,
    setting,
    share_of,
    short,
    shortened,
    time_taken,
    times_smaller,
    unit_words,
)
from tersely.report.charts import Dot, Heat, Line, Mark, Series, heatmap, lines, number, rows, scatter, stacks
from tersely.report.dossier import Dossier
from tersely.results import (
    Bin,
    Blame,
    Comparison,
    Divergence,
    Estimate,
    Evaluation,
    Part,
    Point,
    Report,
    Row,
    Sample,
    Setting,
    Speed,
    Subject,
    TaskResult,
    TextResult,
)

_MOST_ROWS, _MOST_SITES, _MOST_BARS, _MOST_PICTURES = 1500, 3000, 12, 6
_TONES = {"attention": "c0", "mlp": "c1", "expert": "c2", "router": "c3", "embedding": "c4", "head": "c5"}

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
        "lead": _lead(main),
        "facts": _facts(main),
        "commands": commands,
        "verdict": _verdict(evaluation),
        "models": _models(dossiers) if len(dossiers) > 1 else None,
        "sizes": _sizes(main),
        "language": _language(evaluation.text) if evaluation and evaluation.text else None,
        "tasks": _tasks(evaluation) if evaluation and evaluation.tasks else None,
        "errors": _errors(main.report) if main.report and main.report.rows else None,
        "blame": _blame(main.blame) if main.blame else None,
        "speed": _speed(main) if main.speeds else None,
        "samples": _samples(evaluation.samples) if evaluation and evaluation.samples else None,
        "engines": _engines(main, out),
        "sites": _sites(main),
        "made": _made(main) if main.report else None,
        "measured": _settings(main),
        "notes": shortened(evaluation.notes if evaluation else ()),
    }


# What stands first: in words, and in a few numbers.


def _lead(dossier: Dossier) -> str:
    report = dossier.report
    if report is None:
        return "This folder was not written by tersely, or its report.json is missing: only what was measured is known."
    parts = []
    for step in _steps(report):
        bits = f" {step['bits']} bits" if "bits" in step else ""
        group = step.get("group")
        grouped = f", groups of {group}" if group else ", one scale a row" if group == 0 else ""
        parts.append(f"{step.get('method', '?')}{bits}{grouped} ({step.get('where', '?')})")
    what = "; ".join(parts[:4]) + ("; …" if len(parts) > 4 else "")
    return f"{report.source or 'a model without a name'}, compressed: {what or 'no steps'}."


def _steps(report: Report) -> list[Mapping[str, Any]]:
    steps = report.recipe.get("steps", [])
    return [s for s in steps if isinstance(s, Mapping)] if isinstance(steps, list | tuple) else []


def _facts(dossier: Dossier) -> list[tuple[str, str, str]]:
    """(what, number, smaller text) of what a person looks for first."""
    report, evaluation = dossier.report, dossier.evaluation
    made: list[tuple[str, str, str]] = []
    if report:
        made.append(("weights", size(report.bytes_after), f"of {size(report.bytes_before)}: {times_smaller(report)}"))
        packed = bits_a_weight(report.rows)
        inner = f"{packed:.2f} in the compressed matrices" if packed else "no matrix was compressed"
        if report.parameters:
            made.append(("bits a weight", f"{report.bits:.2f}", inner))
        if report.rows and evaluation is None:
            largest = max(report.rows, key=lambda r: r.error)
            where = short(largest.name.removesuffix(".weight"), 60)
            middle = percent(median(r.error for r in report.rows))
            made.append(("median error of a weight", middle, f"at most {percent(largest.error)}: {where}"))
    elif evaluation:
        made.append(("weights", size(evaluation.model.bytes), f"{counted(evaluation.model.parameters)} parameters"))
    text = evaluation.text if evaluation else None
    if text and text.divergence:
        d = text.divergence
        for label, estimate, factor, unit, sign in (
            ("KL divergence, nats a token", d.kl, 1, "", False),
            ("loss against the base, nats", d.loss_difference, 1, "", True),
            ("same top token", d.top1_agreement, 100, " %", False),
        ):
            shown = measured(estimate, factor, unit, sign=sign)
            made.append((label, shown.text, shown.below))
    elif text:
        shown = measured(text.loss)
        made.append(("loss, nats a token", shown.text, shown.below))
        made.append(("perplexity", number(text.perplexity), f"on {short(text.text, 60)}"))
    for speed, base in _pairs(dossier)[:1]:
        points = [p for p in speed.points if p.phase == "decode"] or list(speed.points)
        if points:
            p = min(points, key=lambda p: (p.batch, p.length))
            other = _same_point(base, p)
            against = f"{of_base(p.tokens_per_second, other.tokens_per_second)}; " if other else ""
            what = f"{against}batch {p.batch}, {speed.engine}, {_threads(speed.setting)}, {speed.format}"
            made.append((f"{p.phase}, tokens a second", number(p.tokens_per_second), what))
        beside = f"of {size(base.memory_peak)}; {speed.engine}" if base else speed.engine
        made.append(("peak memory", size(speed.memory_peak), beside))
    return made


def _verdict(evaluation: Evaluation | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    comparisons = evaluation.comparisons
    base = short(evaluation.base.name, 60) if evaluation.base else ""
    head = short(evaluation.verdict, LONGEST_NOTE) or ("" if base else "Nothing was compared: no base was given.")
    figures = []
    for unit in ("points", "nats", "score"):
        own = [c for c in comparisons if c.unit == unit]
        if own:
            factor = 100 if unit == "points" else 1
            made = [Line(short(c.name, 80), (_difference(c, factor),), c.detectable * factor) for c in own]
            sides = {c.higher_is_better for c in own}
            hints = ("", "") if len(sides) > 1 else ("worse", "better") if sides == {True} else ("better", "worse")
            named = {"points": "percentage points", "nats": "nats a token", "score": "the task's own unit"}[unit]
            svg = rows(f"forest-{unit}", f"Differences from the base in {named}", made, unit=named, hints=hints)
            note = "Model minus base with 95 % intervals. Within the grey band lie differences that are smaller than "
            note += "what this sample finds four times in five. Triangle: worse; square: better; circle: none shown."
            figures.append(Figure(f"Difference from the base, {named}", note, Markup(svg)))
    table = Table(
        "All comparisons",
        ("comparison", "model", "base", "difference", "p", "corrected", "detectable", "items", "test"),
        tuple(
            (
                Cell(short(c.name, 80)),
                measured(c.model, 100 if c.unit == "points" else 1),
                measured(c.base, 100 if c.unit == "points" else 1),
                measured(c.difference, 100 if c.unit == "points" else 1, sign=True, unit=unit_words(c.unit)),
                Cell(probability(c.p), order=c.p),
                Cell(probability(c.p_adjusted), order=c.p_adjusted),
                Cell(number(c.detectable * (100 if c.unit == "points" else 1), 2)),
                Cell(f"{c.items:,}"),
                Cell(short(c.test, 80)),
            )
            for c in comparisons
        ),
    )
    return {
        "head": head,
        "base": base,
        "sentences": [(c.outcome, short(c.sentence, LONGEST_NOTE)) for c in comparisons],
        "figures": figures,
        "table": table if comparisons else None,
    }


def _difference(c: Comparison, factor: float) -> Mark:
    shown = measured(c.difference, factor, sign=True)
    tone = {"worse": "worse", "better": "better"}.get(c.outcome, "none")
    d = c.difference
    words = f"{shown.text} ({shown.below})"
    return Mark(d.value * factor, d.low * factor, d.high * factor, shown.text, tone, words=words)


# Sizes.


def _sizes(dossier: Dossier) -> dict[str, Any]:
    report, evaluation = dossier.report, dossier.evaluation
    body: list[tuple[Cell, ...]] = []

    def line(label: str, before: str, after: str, change: str) -> None:
        body.append((Cell(label), Cell(before), Cell(after, change)))

    figure = None
    if report:
        line("weights", size(report.bytes_before), size(report.bytes_after), times_smaller(report))
        before, after = sum(r.bytes_before for r in report.rows), sum(r.bytes_after for r in report.rows)
        own = sum(r.parameters for r in report.rows)
        if report.rows and before and after:
            line("compressed matrices", size(before), size(after), f"{before / after:.2f} times smaller")
            line("kept as they were", size(report.bytes_before - before), size(report.bytes_after - after), "")
        if report.parameters:
            was = 8 * report.bytes_before / report.parameters
            line("bits a weight, all", f"{was:.2f}", f"{report.bits:.2f}", "")
        if own:
            line("bits a weight, compressed matrices", f"{8 * before / own:.2f}", f"{8 * after / own:.2f}", "")
            share = share_of(own, report.parameters)
            line("weights compressed", "", share, f"{counted(own)} of {counted(report.parameters)}")
        figure = _size_figure(report)
    elif evaluation:
        base = evaluation.base
        change = of_base(evaluation.model.bytes, base.bytes) if base else ""
        line("weights", size(base.bytes) if base else "", size(evaluation.model.bytes), change)
    for speed, other in _pairs(dossier)[:1]:
        place = f"{speed.engine}, {_threads(speed.setting)}"
        for label, now, then in (
            ("all files on disk", speed.disk, other.disk if other else None),
            (f"memory, loaded ({place})", speed.memory_loaded, other.memory_loaded if other else None),
            (f"memory, peak ({place})", speed.memory_peak, other.memory_peak if other else None),
        ):
            line(label, size(then) if then is not None else "", size(now), of_base(now, then))
    table = Table("Bytes, bits and memory", ("", "before", "after"), tuple(body))
    return {"table": table if body else None, "figure": figure}


def _size_figure(report: Report) -> Figure | None:
    kept = report.bytes_before - sum(r.bytes_before for r in report.rows)
    kept_after = report.bytes_after - sum(r.bytes_after for r in report.rows)
    roles = sorted(
        {r.role for r in report.rows}, key=lambda role: ([*_TONES].index(role) if role in _TONES else 99, role)
    )
    parts = [(short(role, 24), _TONES.get(role, "c6")) for role in roles] + [("not compressed", "kept")]

    def sizes(attribute: str, rest: int) -> list[float]:
        return [float(sum(getattr(r, attribute) for r in report.rows if r.role == role)) for role in roles] + [
            float(max(0, rest))
        ]

    bars = [
        ("before", sizes("bytes_before", kept), size(report.bytes_before)),
        ("after", sizes("bytes_after", kept_after), size(report.bytes_after)),
    ]
    return Figure("Bytes of the weights, by part", "", Markup(stacks("bytes", "Bytes by part", parts, bars)))


# Quality on text and tasks.


def _language(text: TextResult) -> dict[str, Any]:
    d = text.divergence
    head = f"{text.tokens:,} predicted tokens of {text.documents:,} {text.kind}"
    head += f" (of {text.available:,})" if text.available > text.documents else ""
    head += f", at most {text.context:,} tokens each"
    body = [
        (
            Cell("loss, nats a token"),
            measured(text.loss),
            measured(d.base_loss) if d else Cell(""),
            measured(d.loss_difference, sign=True) if d else Cell(""),
        ),
        (
            Cell("perplexity"),
            Cell(number(text.perplexity, 4)),
            Cell(number(exponential(d.base_loss.value), 4) if d else ""),
            Cell(f"{TIMES} {number(exponential(d.loss_difference.value), 4)}" if d else ""),
        ),
        (Cell("bits per byte"), measured(text.bits_per_byte), Cell(""), Cell("")),
    ]
    figures = []
    for key, bins, label in (
        ("position", text.by_position, "place of the token in its sequence"),
        ("frequency", text.by_frequency, "times that the token stands in the text"),
    ):
        if bins:
            names = [bin_name(b) for b in bins]
            drawn = [Series("model", _points(bins, "loss"), "model")]
            if any(b.base_loss for b in bins):
                drawn.append(Series("base", _points(bins, "base_loss"), "base"))
            told = "by position" if key == "position" else "by token frequency"
            title = f"Loss {told}"
            svg = lines(f"loss-{key}", title, drawn, x_label=label, y_label="nats a token", names=names)
            figures.append(Figure(title, "", Markup(svg)))
            if any(b.kl for b in bins):
                title = f"KL {told}"
                svg = lines(
                    f"kl-{key}",
                    title,
                    [Series("", _points(bins, "kl"), "model")],
                    x_label=label,
                    y_label="nats a token",
                    names=names,
                    zero=True,
                )
                figures.append(Figure(title, "", Markup(svg)))
    return {
        "name": short(text.text, 200),
        "head": head,
        "sha256": text.sha256,
        "table": Table("The text", ("", "model", "base", "difference"), tuple(body)),
        "divergence": _divergence(d) if d else None,
        "figures": figures,
        "bins": [
            _bin_table("By place in the sequence", "place", text.by_position),
            _bin_table("By how often the token stands in the text", "times", text.by_frequency),
        ],
    }


def _divergence(d: Divergence) -> dict[str, Any]:
    body = [
        ("KL divergence, nats a token", "how far the predictions moved; 0: not at all", measured(d.kl)),
        ("same top token", "both find the same token most likely", measured(d.top1_agreement, 100, " %")),
        ("same top five", "overlap of their five likeliest tokens", measured(d.top5_agreement, 100, " %")),
        ("lost", "tokens that only the base had right", measured(d.lost, 100, " %")),
        ("gained", "tokens that only the model had right", measured(d.gained, 100, " %")),
        ("mean reciprocal rank", "of the base's favourite with the model", Cell(number(d.mean_reciprocal_rank))),
    ]
    if d.outside is not None:
        body.append(("outside", "probability of tokens that only the base has", measured(d.outside, 100, " %")))
    quantiles = Table(
        "KL of a token",
        ("", *(f"{percentile(q)}" for q in d.kl_quantiles)),
        ((Cell("nats"), *(Cell(number(v)) for v in d.kl_quantiles.values())),),
    )
    ranks = Table(
        "Rank of the base's favourite with the model",
        ("", *(f"rank {r}" if not r.endswith("-") else f"rank {r[:-1]} and up" for r in d.rank)),
        ((Cell("tokens"), *(Cell(percent(v)) for v in d.rank.values())),),
    )
    known = (
        ""
        if d.vocabulary == "full"
        else f"The two have different vocabularies: both were compared on the {d.shared:,} tokens that they share."
    )
    return {
        "table": Table(
            "Against the base", ("", "value"), tuple((Cell(name, words), value) for name, words, value in body)
        ),
        "quantiles": quantiles if d.kl_quantiles else None,
        "ranks": ranks if d.rank else None,
        "vocabulary": known,
        "compared": f"Compared on {d.tokens:,} tokens of {d.documents:,} documents.",
    }


def _bin_table(caption: str, header: str, bins: Sequence[Bin]) -> Table | None:
    body = tuple(
        (
            Cell(bin_name(b)),
            Cell(f"{b.tokens:,}"),
            measured(b.loss),
            measured(b.base_loss) if b.base_loss else Cell(""),
            measured(b.kl) if b.kl else Cell(""),
        )
        for b in bins
    )
    return Table(caption, (header, "tokens", "loss", "loss of the base", "KL"), body) if body else None


def _points(bins: Sequence[Bin], field: str) -> tuple[tuple[float, float, float, float], ...]:
    estimates = [(i, getattr(b, field)) for i, b in enumerate(bins)]
    return tuple((float(i), e.value, e.low, e.high) for i, e in estimates if e is not None)


def _tasks(evaluation: Evaluation) -> dict[str, Any]:
    tasks = evaluation.tasks
    compared = any(t.base for t in tasks)
    body = []
    for t in tasks:
        factor, unit = _scale(t)
        changed = "" if t.lost is None or t.gained is None else f"{t.lost} / {t.gained}"
        cells = [
            Cell(short(t.title or t.name, 80), short(f"{t.group}; {t.metric}" if t.group else t.metric, 80)),
            Cell(f"{t.items:,}", f"of {t.available:,}" if t.available > t.items else "", order=t.items),
            Cell(f"{number(t.chance * factor)}{unit}" if t.chance is not None else ""),
            measured(t.value, factor, unit),
        ]
        if compared:
            cells += [measured(t.base, factor, unit) if t.base else Cell(""), Cell(changed)]
        body.append(tuple(cells))
    headers = ("task", "items", "chance", "model", *(("base", "lost / gained") if compared else ()))
    parts = [(short(t.title or t.name, 80), len(t.parts), _part_table(t, compared)) for t in tasks if t.parts]
    harness = [
        (short(t.title or t.name, 80), ", ".join(f"{short(k, 60)} = {v:.10g}" for k, v in t.harness.items()))
        for t in tasks
        if t.harness
    ]
    return {
        "table": Table("Scores", headers, tuple(body)),
        "parts": parts,
        "harness": harness,
        "calibration": _calibration([t for t in tasks if t.calibration]),
        "compared": compared,
    }


def _scale(task: TaskResult) -> tuple[float, str]:
    """Shares are shown in per cent."""
    values = [e.value for e in (task.value, task.base) if e is not None]
    share = task.higher_is_better and all(0 <= v <= 1 for v in values)
    return (100, " %") if share else (1, "")


def _part_table(task: TaskResult, compared: bool) -> Table:
    factor, unit = _scale(task)

    def cells(p: Part) -> tuple[Cell, ...]:
        made = [Cell(short(p.name, 80)), Cell(f"{p.items:,}"), measured(p.value, factor, unit)]
        return tuple([*made, measured(p.base, factor, unit) if p.base else Cell("")] if compared else made)

    headers = ("part", "items", "model", *(("base",) if compared else ()))
    return Table("Parts", headers, tuple(cells(p) for p in task.parts))


def _calibration(tasks: Sequence[TaskResult]) -> dict[str, Any] | None:
    if not tasks:
        return None
    body: list[tuple[Cell, ...]] = []
    figures: list[Figure] = []
    for place, t in enumerate(tasks):
        own, base = t.calibration, t.base_calibration
        assert own is not None
        body.append(
            (
                Cell(short(t.title or t.name, 80)),
                measured(own.brier),
                measured(base.brier) if base else Cell(""),
                measured(own.error, 100, " %"),
                measured(base.error, 100, " %") if base else Cell(""),
            )
        )
        drawn = []
        for label, tone, c in (("model", "model", own), ("base", "base", base)):
            if c:
                points = tuple((b.confidence, b.accuracy, *_wilson(b.accuracy, b.items)) for b in c.bins if b.items)
                drawn.append(Series(label, points, tone))
        title = f"Certainty and truth: {short(t.title or t.name, 60)}"
        if len(figures) < _MOST_PICTURES:
            svg = lines(
                f"reliability-{place}",
                title,
                drawn,
                x_label="how sure it was",
                y_label="how often it was right",
                diagonal=True,
            )
            figures.append(Figure(title, "", Markup(svg)))
    headers = ("task", "Brier score", "of the base", "calibration error", "of the base")
    return {"table": Table("Calibration", headers, tuple(body)), "figures": figures}


def _wilson(share: float, items: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927)."""
    z = 1.96
    middle = (share + z * z / (2 * items)) / (1 + z * z / items)
    half = z / (1 + z * z / items) * math.sqrt(share * (1 - share) / items + z * z / (4 * items * items))
    return middle - half, middle + half


# Where it was lost.


def _inside(row: Row) -> tuple[str, str]:
    """(block list, path in the block) of a weight; ("", whole path) outside the blocks. Experts share a path."""
    path = row.name.removesuffix(".weight")
    if row.block is None:
        return "", path
    stack, found, inside = path.partition(f".{row.block}.")
    if not found:
        return "", path
    return stack, re.sub(r"(?<=\.)\d+(?=\.|$)", "*", inside)


def _errors(report: Report) -> dict[str, Any]:
    """Heat maps of error, and of bits where they differ, for every list of blocks."""
    by_stack: dict[str, dict[str, dict[int, list[Row]]]] = {}
    for row in report.rows:
        stack, path = _inside(row)
        if row.block is not None:
            by_stack.setdefault(stack, {}).setdefault(path, {}).setdefault(row.block, []).append(row)
    on_text = any(row.tokens for row in report.rows)
    of = "the outputs on the calibration text" if on_text else "the weights themselves"
    figures = []
    for place, (stack, paths) in enumerate(sorted(by_stack.items())[:_MOST_PICTURES]):
        blocks = sorted({b for found in paths.values() for b in found})
        leaves = _leaves(list(paths))
        many = max(len(own) for found in paths.values() for own in found.values()) > 1
        where = f" in {short(stack, 60)}" if len(by_stack) > 1 else ""
        errors, bits = {}, {}
        for j, (path, found) in enumerate(paths.items()):
            for block, own in found.items():
                at = (blocks.index(block), j)
                weight = sum(r.parameters for r in own) or 1
                mean = sum(r.error * r.parameters for r in own) / weight
                worst = f", worst of {len(own)}: {percent(max(r.error for r in own))}" if len(own) > 1 else ""
                label = f"block {block}, {short(path, 60)}"
                errors[at] = Heat(mean, f"{100 * mean:.1f}", f"{label}: {percent(mean)}{worst}")
                wide = 8 * sum(r.bytes_after for r in own) / weight
                bits[at] = Heat(wide, f"{wide:.1f}", f"{label}: {wide:.2f} bits")
        title = f"Relative error of each weight{where}, %"
        text = f"Of {of}." + (" Experts of a block: mean over their weights." if many else "")
        columns = [str(b) for b in blocks]
        svg = heatmap(f"error-{place}", title, columns, leaves, errors, unit=percent, axis="one column a block")
        figures.append(Figure(title, text, Markup(svg)))
        widths = [h.value for h in bits.values()]
        if max(widths) - min(widths) > 0.25:
            title = f"Bits a weight{where}, scales included"
            svg = heatmap(
                f"bits-{place}",
                title,
                columns,
                leaves,
                bits,
                unit=lambda v: f"{v:.3g} bits",
                axis="one column a block",
            )
            figures.append(Figure(title, "", Markup(svg)))
    body = []
    for role in dict.fromkeys(r.role for r in report.rows):
        own = [r for r in report.rows if r.role == role]
        largest = max(own, key=lambda r: r.error)
        body.append(
            (
                Cell(short(role, 60)),
                Cell(short(", ".join(dict.fromkeys(r.method for r in own)), 80)),
                Cell(f"{len(own):,}"),
                Cell(counted(sum(r.parameters for r in own))),
                Cell(f"{bits_a_weight(own) or 0:.2f}"),
                Cell(percent(median(r.error for r in own))),
                Cell(percent(largest.error), short(largest.name.removesuffix(".weight"), 80), wraps=True),
            )
        )
    headers = ("part", "method", "weights", "parameters", "bits", "median error", "largest error")
    return {"figures": figures, "table": Table("Error by part", headers, tuple(body), left=2)}


def _leaves(paths: Sequence[str]) -> list[str]:
    """The last words of paths, as many as tell them apart."""
    for words in (1, 2, 3):
        ends = [".".join(p.split(".")[-words:]) for p in paths]
        if len(set(ends)) == len(ends):
            return [short(end, 60) for end in ends]
    return [short(p, 60) for p in paths]


def _blame(blame: Blame) -> dict[str, Any]:
    restore = blame.direction == "restore"
    told = (
        "By how much the KL divergence falls when this site alone gets the base's weights back."
        if restore
        else "The KL divergence of the base with this site alone compressed."
    )
    figures = []
    for level, title in (("block", "What each block costs"), ("weight", "What single weights cost")):
        own = sorted((s for s in blame.sites if s.level == level), key=lambda s: -s.cost.value)
        if own:
            shown = own[:_MOST_BARS]
            made = [
                Line(
                    _site_name(s.name, s.block, s.level),
                    (Mark(s.cost.value, s.cost.low, s.cost.high, measured(s.cost).text),),
                )
                for s in shown
            ]
            more = f" The dearest {len(shown)} of {len(own)}." if len(own) > len(shown) else ""
            svg = rows(f"blame-{level}", title, made, unit="nats a token", bars=True)
            figures.append(Figure(title, f"{told}{more} Whiskers: 95 % intervals.", Markup(svg)))
    depth = []
    if blame.depth:
        for key, title, label, zero in (
            ("error", "Error along the depth", "relative error of the hidden states", True),
            ("cosine", "Direction along the depth", "mean cosine of the hidden states", False),
        ):
            points = tuple((float(i), v, v, v) for i, v in enumerate(getattr(p, key) for p in blame.depth))
            blocks = [str(p.block) for p in blame.depth]
            svg = lines(
                f"depth-{key}", title, [Series("", points)], x_label="block", y_label=label, names=blocks, zero=zero
            )
            depth.append(Figure(title, "", Markup(svg)))
    total = measured(blame.kl)
    body = tuple(
        (
            Cell(short(s.name.removesuffix(".weight"), 120)),
            Cell(short(s.role, 40)),
            Cell(counted(s.parameters), order=s.parameters),
            Cell(f"{s.bits:.2f}" if s.bits is not None else ""),
            Cell(measured(s.cost).text, measured(s.cost).below, order=s.cost.value),
        )
        for s in blame.sites[:_MOST_ROWS]
    )
    head = f"The whole model: KL {total.text} ({total.below}) nats a token, on {blame.tokens:,} tokens of "
    head += f"{blame.documents:,} documents of {short(blame.text, 80)}. Costs of sites need not add up to it."
    return {
        "head": head,
        "figures": figures,
        "depth": depth,
        "table": Table("Sites", ("site", "part", "parameters", "bits", "cost, nats"), body, left=2, sortable=True),
        "more": max(0, len(blame.sites) - _MOST_ROWS),
        "notes": shortened(blame.notes),
    }


def _site_name(name: str, block: int | None, level: str) -> str:
    path = name.removesuffix(".weight")
    if block is None:
        return short(path, 60)
    if level == "block":
        return f"block {block}"
    inside = path.partition(f".{block}.")[2] or path
    return f"{block} · {short(inside, 60)}"


# Speed.


def _pairs(dossier: Dossier) -> list[tuple[Speed, Speed | None]]:
    """Every speed of the model with the base's that was measured alike."""

    def alike(one: Speed) -> tuple[Any, ...]:
        return one.engine, one.setting.device, one.setting.hardware, one.setting.threads

    return [(s, next((b for b in dossier.base_speeds if alike(b) == alike(s)), None)) for s in dossier.speeds]


def _same_point(speed: Speed | None, point: Point) -> Point | None:
    wanted = (point.phase, point.batch, point.length, point.tokens)
    found = (p for p in (speed.points if speed else ()) if (p.phase, p.batch, p.length, p.tokens) == wanted)
    return next(found, None)


def _speed(dossier: Dossier) -> list[dict[str, Any]]:
    made = []
    for place, (speed, base) in enumerate(_pairs(dossier)):
        figures = []
        for phase, title in (
            ("decode", "Decoding, new tokens a second"),
            ("prefill", "Reading a prompt, tokens a second"),
        ):
            points = sorted((p for p in speed.points if p.phase == phase), key=lambda p: (p.batch, p.length, p.tokens))
            drawn = []
            for p in points[:_MOST_BARS]:
                other = _same_point(base, p)
                marks = [_rate(p, "model")] + ([_rate(other, "base")] if other else [])
                drawn.append(Line(f"batch {p.batch}, prompt {p.length:,}", tuple(marks)))
            if drawn and place < _MOST_PICTURES:
                svg = rows(f"{phase}-{place}", title, drawn, unit="tokens a second", bars=True)
                text = "Blue: model; grey: base. " if base else ""
                figures.append(
                    Figure(title, f"{text}Medians; whiskers from the slowest to the fastest repeat.", Markup(svg))
                )
        body = []
        for p in speed.points:
            other = _same_point(base, p)
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
        _threads(setting),
        f"{size(setting.memory)} of memory",
        setting.created[:10],
    ]
    return ", ".join(p for p in parts if p)


def _threads(setting: Setting) -> str:
    return f"{setting.threads} thread{'' if setting.threads == 1 else 's'}"


# Samples.


def _samples(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    made = []
    for s in samples:
        model, base = long_text(s.model), None if s.base is None else long_text(s.base)
        same = 0
        if base is not None:
            same = next(
                (i for i, (a, b) in enumerate(zip(model, base, strict=False)) if a != b), min(len(model), len(base))
            )
            if model != base and same < min(len(model), len(base)):
                same = max(model.rfind(" ", 0, same), model.rfind("\n", 0, same)) + 1
        columns = [("model", model, s.repetition)]
        if base is not None:
            columns.insert(0, ("base", base, s.base_repetition or 0.0))
        made.append(
            {
                "prompt": long_text(s.prompt),
                "equal": base is not None and s.base == s.model,
                "columns": [
                    {"who": who, "same": text[:same], "rest": text[same:], "repetition": _repeats(repetition)}
                    for who, text, repetition in columns
                ],
            }
        )
    return made


def _repeats(share: float) -> str:
    return f"{100 * share:.0f} % repeated" if share >= 0.005 else ""


# How to run it.


def _engines(dossier: Dossier, out: str) -> list[dict[str, str]]:
    """(engine, what is true of it, code) for the form in which the model is stored."""
    stored = dossier.format or (dossier.report.format if dossier.report else None)
    folder = repr(short(dossier.folder, 400) or "OUT")
    load = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"folder = {folder}\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        'inputs = tokenizer("The road to the north", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))"
    )
    vllm = f"from vllm import LLM, SamplingParams\n\nmodel = LLM(model={folder})\n" + (
        "settings = SamplingParams(temperature=0, max_tokens=40)\n"
        'print(model.generate(["The road to the north"], settings)[0].outputs[0].text)'
    )
    convert = (
        f"python convert_hf_to_gguf.py {out} --outfile model.gguf\nllama-cli -m model.gguf -p 'The road to the north'"
    )
    here = {"engine": "tersely", "text": "", "code": f"tersely generate {out} 'The road to the north' --tokens 40"}
    if stored == "compressed-tensors":
        widths = (
            sorted({s["bits"] for s in _steps(dossier.report) if isinstance(s.get("bits"), int)})
            if dossier.report
            else []
        )
        other = [str(b) for b in widths if b not in (4, 8)]
        vllm_text = "Stored in the layout that vLLM reads; not run by tersely's tests."
        if other:
            vllm_text += f" The vLLM whose code was read takes 4 and 8 bits only; this model has {', '.join(other)}."
        llama = "llama.cpp does not read compressed-tensors. Write the model with --format dense and convert that; "
        llama += "it then has the compressed values, and the size of the original."
        return [
            here,
            {
                "engine": "transformers",
                "text": "Needs the packages compressed-tensors and accelerate, not tersely. The weights are unpacked "
                "at loading: memory in use is that of the original.",
                "code": load,
            },
            {"engine": "vLLM", "text": vllm_text, "code": vllm},
            {"engine": "llama.cpp", "text": llama, "code": ""},
        ]
    if stored == "dense":
        dense = "An ordinary checkpoint: it loads wherever the original does, and is as large as the original."
        return [
            here,
            {"engine": "transformers", "text": dense, "code": load},
            {"engine": "vLLM", "text": "Like any checkpoint in this form; not run by tersely's tests.", "code": vllm},
            {
                "engine": "llama.cpp",
                "text": "Convert it first, with the script of llama.cpp; not run by tersely's tests.",
                "code": convert,
            },
        ]
    if stored == "gguf" or dossier.folder.lower().endswith(".gguf"):
        code = f"llama-cli -m {out} -p 'The road to the north'"
        return [{"engine": "llama.cpp", "text": "A file of llama.cpp's own format.", "code": code}]
    return [
        {"engine": "transformers", "text": "The folder does not say how its weights are stored.", "code": load},
        here,
    ]


# Every weight, how it was made, how it was measured.


def _sites(dossier: Dossier) -> dict[str, Any] | None:
    report = dossier.report
    if report is None or not report.rows:
        return None
    costs = {s.name: s.cost for s in dossier.blame.sites if s.level == "weight"} if dossier.blame else {}
    together = len(report.rows) > _MOST_ROWS
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in report.rows:
        key = (row.block, *_inside(row), row.method) if together else (row.name,)
        groups.setdefault(key, []).append(row)
    kept = list(groups.values())
    if len(kept) > _MOST_SITES:
        kept = sorted(kept, key=lambda own: -max(r.error for r in own))[:_MOST_SITES]
    body = []
    for own in kept:
        first, count = own[0], len(own)
        stack, path = _inside(first)
        name = first.name.removesuffix(".weight")
        if count > 1:
            name = f"{stack}.{first.block}.{path} ({count})"
        notes = "; ".join(dict.fromkeys(r.note for r in own if r.note))
        errors = [r.error for r in own]
        after, before, parameters = (
            sum(getattr(r, field) for r in own) for field in ("bytes_after", "bytes_before", "parameters")
        )
        tokens = min(r.tokens for r in own)
        cells = [
            Cell(short(name, 120), short(notes, 200)),
            Cell("" if first.block is None else str(first.block), order=-1 if first.block is None else first.block),
            Cell(short(first.role, 40)),
            Cell(short(first.method, 40)),
            Cell(counted(parameters), order=parameters),
            Cell(size(before), order=before),
            Cell(size(after), order=after),
            Cell(f"{8 * after / parameters:.2f}" if parameters else ""),
            Cell(
                f"{100 * sum(errors) / count:.2f}",
                f"at most {100 * max(errors):.2f}" if count > 1 else "",
                order=max(errors),
            ),
            Cell(f"{tokens:,}" if tokens else "", order=tokens),
        ]
        if costs:
            found = [costs[r.name] for r in own if r.name in costs]
            cells.append(Cell(number(found[0].value), order=found[0].value) if len(found) == 1 else Cell(""))
        body.append(tuple(cells))
    headers = ["weight", "block", "part", "method", "parameters", "before", "after", "bits", "error, %", "tokens"]
    return {
        "table": Table(
            "Compressed weights", (*headers, *(("KL cost",) if costs else ())), tuple(body), sortable=True, broad=True
        ),
        "count": len(report.rows),
        "together": together,
        "left_out": len(groups) - len(kept),
    }


def _made(dossier: Dossier) -> dict[str, Any]:
    report = dossier.report
    assert report is not None
    steps = []
    for step in _steps(report):
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


def _settings(dossier: Dossier) -> list[dict[str, Any]]:
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
            "on": f"{short(setting.hardware, 120)}, {setting.device}, {_threads(setting)}, {size(setting.memory)}",
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
    for speed, _ in _pairs(dossier):
        add(f"Speed in {speed.engine}", (speed.model,), speed.setting, {"in memory as": speed.format})
    return made


def _time(seconds: float, budget: float | None) -> str:
    asked = f"; sample sizes chosen for {duration(budget)}" if budget is not None else ""
    return f"{duration(seconds)}{asked}" if seconds > 0 else asked.removeprefix("; ")


# Several models.


def _models(dossiers: Sequence[Dossier]) -> dict[str, Any]:
    """Size against quality, and everything side by side. Only what was measured on the same data is compared."""
    main = dossiers[0].evaluation
    text = main.text if main else None
    numbers = {id(d): str(i + 1) for i, d in enumerate(dossiers)}
    comparable: list[Dossier] = []
    unlike: list[Dossier] = []
    for d in dossiers:
        if d.evaluation and d.evaluation.text and d.evaluation.text.divergence:
            (comparable if text and _same_text(main, d.evaluation) else unlike).append(d)
    figures = []
    sized = [d for d in comparable if _bytes(d)]
    if len(sized) > 1:
        dots = [_dot(d, numbers[id(d)], _kl(d), 1, d is dossiers[0]) for d in sized]
        bases = {(d.report.bytes_before) for d in sized if d.report}
        mark = (float(bases.pop()), "the original") if len(bases) == 1 else None
        title = "Size and KL divergence"
        svg = scatter(
            "pareto-kl",
            title,
            dots,
            x_label="bytes of the weights",
            y_label="KL divergence, nats a token",
            x_tick=size,
            y_tick=number,
            smaller_is_better=True,
            mark=mark,
        )
        note = "Down and left is better. The stepped line is the Pareto front: no model shown is both smaller and "
        note += "closer to the base. Whiskers: 95 % intervals."
        figures.append(Figure(title, note, Markup(svg)))
    small: list[Figure] = []
    for task in _shared_tasks(dossiers)[:_MOST_PICTURES]:
        found = [(d, t) for d in dossiers for t in [_task(d, task)] if t is not None and _bytes(d)]
        factor, unit = _scale(task)
        title = f"Size and {short(task.title or task.name, 60)}"
        dots = [_dot(d, numbers[id(d)], t.value, factor, d is dossiers[0]) for d, t in found]
        svg = scatter(
            f"pareto-task-{len(small)}",
            title,
            dots,
            x_label="bytes of the weights",
            y_label=short(f"{task.metric}{',' + unit if unit else ''}", 40),
            x_tick=size,
            y_tick=number,
            smaller_is_better=not task.higher_is_better,
            small=True,
        )
        small.append(Figure(title, "", Markup(svg)))
    body = []
    for d in dossiers:
        e = d.evaluation
        moved = e.text.divergence if e and e.text else None
        alike = d in comparable
        speed = next(iter(_pairs(d)), (None, None))[0]
        decode = (
            min((p for p in speed.points if p.phase == "decode"), key=lambda p: (p.batch, p.length), default=None)
            if speed
            else None
        )
        outcomes = [c.outcome for c in e.comparisons] if e else []
        body.append(
            (
                Cell(f"{numbers[id(d)]}. {short(d.name or '(no name)', 80)}", short(d.format or "", 40), wraps=True),
                Cell(
                    size(_bytes(d)) if _bytes(d) else "", times_smaller(d.report) if d.report else "", order=_bytes(d)
                ),
                Cell(f"{d.report.bits:.2f}" if d.report and d.report.parameters else ""),
                measured(moved.kl) if moved and alike else Cell("other data" if moved else ""),
                measured(moved.loss_difference, sign=True) if moved and alike else Cell(""),
                measured(moved.top1_agreement, 100, " %") if moved and alike else Cell(""),
                Cell(
                    f"{outcomes.count('worse')} / {outcomes.count('better')} / {outcomes.count('no difference shown')}"
                    if outcomes
                    else ""
                ),
                Cell(
                    number(decode.tokens_per_second, 4) if decode else "",
                    f"{speed.engine}, {_threads(speed.setting)}, {short(speed.format, 40)}" if speed and decode else "",
                    wraps=True,
                ),
                Cell(size(speed.memory_peak) if speed else ""),
            )
        )
    headers = (
        "model",
        "weights",
        "bits",
        "KL, nats",
        "loss against base",
        "same top token",
        "worse / better / neither",
        "decode, tokens/s",
        "peak memory",
    )
    tasks = _shared_tasks(dossiers)
    scores = [
        (
            Cell(f"{numbers[id(d)]}. {short(d.name or '(no name)', 80)}"),
            *(measured(t.value, *_scale(t)) if (t := _task(d, task)) else Cell("") for task in tasks),
        )
        for d in dossiers
    ]
    return {
        "count": len(dossiers),
        "figures": figures,
        "small": small,
        "table": Table("Models", headers, tuple(body), sortable=True, broad=True),
        "tasks": Table(
            "Tasks", ("model", *(short(t.title or t.name, 60) for t in tasks)), tuple(scores), sortable=True, broad=True
        )
        if tasks
        else None,
        "unlike": [short(d.name or "(no name)", 80) for d in unlike],
        "unmeasured": [short(d.name or "(no name)", 80) for d in dossiers if not (d.evaluation and d.evaluation.text)],
    }


def _same_text(one: Evaluation | None, other: Evaluation) -> bool:
    """Whether KLs may be compared: the same tokens, the same base."""
    if one is None or one.text is None or other.text is None:
        return False
    bases = [(e.base.fingerprint or e.base.name) if e.base else "" for e in (one, other)]
    return one.text.sha256 == other.text.sha256 and one.text.tokens == other.text.tokens and bases[0] == bases[1]


def _kl(dossier: Dossier) -> Estimate:
    assert dossier.evaluation is not None
    assert dossier.evaluation.text is not None
    assert dossier.evaluation.text.divergence is not None
    return dossier.evaluation.text.divergence.kl


def _bytes(dossier: Dossier) -> int:
    if dossier.report:
        return dossier.report.bytes_after
    if dossier.evaluation:
        return dossier.evaluation.model.bytes
    return dossier.speeds[0].disk if dossier.speeds else 0


def _dot(dossier: Dossier, place: str, estimate: Estimate, factor: float, main: bool) -> Dot:
    e = estimate
    name = short(dossier.name or "(no name)", 80)
    return Dot(name, place, float(_bytes(dossier)), e.value * factor, e.low * factor, e.high * factor, main)


def _task(dossier: Dossier, wanted: TaskResult) -> TaskResult | None:
    tasks = dossier.evaluation.tasks if dossier.evaluation else ()
    key = (wanted.name, wanted.metric, wanted.sha256)
    return next((t for t in tasks if (t.name, t.metric, t.sha256) == key), None)


def _shared_tasks(dossiers: Sequence[Dossier]) -> list[TaskResult]:
    """Tasks that the main model and another did on the same items."""
    tasks = dossiers[0].evaluation.tasks if dossiers[0].evaluation else ()
    return [t for t in tasks if any(_task(d, t) for d in dossiers[1:])]
