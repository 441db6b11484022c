"""Reports as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from statistics import median

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tersely.checkpoint import Checkpoint
from tersely.graph import Graph, Weight
from tersely.plan.cost import Cost, duration, size
from tersely.results import Report, Row

ROLES = ("embedding", "attention", "mlp", "expert", "router", "norm", "head", "other")


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> Table:
    """A plain table: the first `left` columns are text, the others numbers."""
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for number, header in enumerate(headers):
        made.add_column(header, justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def cost_lines(cost: Cost) -> RenderableType:
    """What a job is expected to use."""
    lines = [
        ("memory", f"about {size(cost.memory)}", f"{size(cost.memory_available)} free"),
        (
            "disk",
            f"{size(cost.disk)} while it runs, {size(cost.output)} of weights after",
            f"{size(cost.disk_available)} free",
        ),
        ("time", f"about {duration(cost.seconds)}", ""),
    ]
    return table(("expected", "", ""), lines, left=3)


def report_table(report: Report) -> RenderableType:
    """What a job gave: a line per role, then what the user should know."""
    lines = []
    for role, rows in _by_role(report.rows):
        errors = [row.error for row in rows]
        worst = max(rows, key=lambda row: row.error)
        lines.append(
            (
                role,
                ", ".join(dict.fromkeys(row.method for row in rows)),
                str(len(rows)),
                _count(sum(r.parameters for r in rows)),
                size(sum(r.bytes_before for r in rows)),
                size(sum(r.bytes_after for r in rows)),
                f"{8 * sum(r.bytes_after for r in rows) / sum(r.parameters for r in rows):.2f}",
                f"{100 * median(errors):.1f} %",
                f"{100 * worst.error:.1f} %  {worst.name.removesuffix('.weight')}",
            )
        )
    kept = report.bytes_after - sum(r.bytes_after for r in report.rows)
    parameters = report.parameters_after - sum(r.parameters for r in report.rows)
    if parameters:
        lines.append(
            (
                "kept",
                "",
                "",
                _count(parameters),
                size(kept),
                size(kept),
                f"{8 * kept / parameters:.2f}",
                "",
                "",
            )
        )
    lines.append(
        (
            "all",
            "",
            "",
            _count(report.parameters_after),
            size(report.bytes_before),
            size(report.bytes_after),
            f"{report.bits:.2f}",
            "",
            f"{report.ratio:.2f} times smaller",
        )
    )
    measured = any(row.tokens for row in report.rows)
    error = "error" if measured else "weight error"
    made = table(
        ("part", "method", "weights", "parameters", "before", "after", "bits", error, "largest"),
        lines,
        left=2,
    )
    parts: list[RenderableType] = [made]
    if report.shapes and not report.rows:
        sizes = f"{size(report.bytes_before)} of weights before, {size(report.bytes_after)} after"
        parts = [shapes_table(report), Text(f"\n{sizes}: {report.ratio:.2f} times smaller")]
    elif report.shapes:
        parts = [shapes_table(report), Text(""), made]
    if report.notes:
        shown = report.notes[:10]
        more = [f"and {len(report.notes) - 10} more, in report.json"] if len(report.notes) > 10 else []
        parts.append(Text("\n" + "\n".join(f"note: {n}" for n in [*shown, *more])))
    return Group(*parts)


def shapes_table(report: Report) -> RenderableType:
    """What each step has cut, and how many parameters that leaves."""
    lines = [
        (
            shape.where,
            shape.method,
            _count(shape.parameters_before),
            _count(shape.parameters_after),
            f"{100 * (1 - shape.parameters_after / shape.parameters_before):.1f} %",
        )
        for shape in report.shapes
    ]
    return table(("cut", "method", "parameters", "left", "fewer"), lines, left=2)


def inspection(checkpoint: Checkpoint, graph: Graph) -> RenderableType:
    """Parameters and bytes by role and by block, from headers alone."""
    total = sum(w.spec.nbytes for w in graph.weights)
    roles = []
    for role in ROLES:
        own = [w for w in graph.weights if w.role == role]
        if own:
            roles.append(
                (
                    role,
                    str(len(own)),
                    _count(sum(map(_numel, own))),
                    size(sum(w.spec.nbytes for w in own)),
                    f"{100 * sum(w.spec.nbytes for w in own) / total:.1f} %",
                    _dtypes(own),
                )
            )
    roles.append(
        (
            "all",
            str(len(graph.weights)),
            _count(sum(map(_numel, graph.weights))),
            size(total),
            "100 %",
            _dtypes(graph.weights),
        )
    )
    blocks = []
    described = [(unit, _shape_of(graph.unit(unit))) for unit in graph.units]
    for _, run in groupby(described, key=lambda d: (d[0].rpartition(".")[0], d[1])):
        units = [unit for unit, _ in run]
        first = graph.unit(units[0])
        label = units[0] if len(units) == 1 else f"{units[0]} to {units[-1].rpartition('.')[2]}"
        blocks.append(
            (
                label,
                str(len(first)),
                _count(sum(map(_numel, first))),
                size(sum(w.spec.nbytes for w in first)),
                ", ".join(graph.stages(units[0])),
            )
        )
    config = checkpoint.config
    head = "tied to the embedding" if graph.tied else "of its own"
    lines = [
        f"{checkpoint.path}",
        f"{graph.model_type} ({config.get('architectures', ['?'])[0]}), table families/{graph.family.name}.toml, "
        f"{len(graph.units)} blocks, vocabulary {graph.sizes.get('tokens', 0)}, head {head}",
    ]
    if graph.extra:
        lines.append(f"{len(graph.extra)} stored tensors are not read by the model: {', '.join(graph.extra[:4])}")
    return Group(
        Text("\n".join(lines) + "\n"),
        table(("part", "tensors", "parameters", "bytes", "share", "stored as"), roles),
        Text(""),
        table(("each block", "tensors", "parameters", "bytes", "reads"), blocks),
    )


def inspection_dict(checkpoint: Checkpoint, graph: Graph) -> dict[str, object]:
    """The same as plain values."""

    def total(weights: Sequence[Weight]) -> dict[str, object]:
        return {
            "tensors": len(weights),
            "parameters": sum(map(_numel, weights)),
            "bytes": sum(w.spec.nbytes for w in weights),
        }

    roles = {role: [w for w in graph.weights if w.role == role] for role in ROLES}
    return {
        "path": str(checkpoint.path),
        "model_type": graph.model_type,
        "family": graph.family.name,
        "tied": graph.tied,
        **total(graph.weights),
        "sizes": dict(graph.sizes),
        "roles": {r: total(w) for r, w in roles.items() if w},
        "blocks": {unit: total(graph.unit(unit)) for unit in graph.units},
        "unread": list(graph.extra),
        "weights": [
            {
                "name": w.name,
                "role": w.role,
                "kind": w.kind,
                "shape": list(w.spec.shape),
                "dtype": str(w.spec.dtype).removeprefix("torch."),
                "bytes": w.spec.nbytes,
                "reads": w.statistics,
            }
            for w in graph.weights
        ],
    }


def _by_role(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    return [(role, own) for role in ROLES if (own := [row for row in rows if row.role == role])]


def _numel(weight: Weight) -> int:
    return weight.spec.nbytes // weight.spec.dtype.itemsize


def _dtypes(weights: Iterable[Weight]) -> str:
    return ", ".join(dict.fromkeys(str(w.spec.dtype).removeprefix("torch.") for w in weights))


def _shape_of(weights: Sequence[Weight]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((w.path + w.leaf, w.spec.shape) for w in weights)


def _count(n: int) -> str:
    for unit in ("", " k", " M", " G"):
        if n < 999.5:
            return f"{n:.3g}{unit}"
        n /= 1000  # type: ignore[assignment]
    return f"{n:.3g} T"
