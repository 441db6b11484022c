"""Show the newest results of bench_shapes.py: docs/results-shapes.md.

python benchmarks/show_shapes.py [RESULTS.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from show_results import HERE, MODELS, TOOLS

INTRODUCTION = """\
# Results: smaller shapes

Made by `benchmarks/show_shapes.py` of `benchmarks/results/{source}` ({date}; {hardware}); `benchmarks/bench_shapes.py`
says how each row was measured. Nothing was trained after a cut, unless a row says so. Loss in nats a token; KL
divergence from the source; how often both find the same token most likely; bytes of the weights. These models are small
and use all that they have: a larger one loses less at the same share. What is to be read here is the order."""
NAMES = ("50 %", "2:4", "70 %")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the page of a results file.")
    newest = max((HERE / "results").glob("*-shapes.json"), default=HERE / "results")
    parser.add_argument("results", type=Path, nargs="?", default=newest)
    options = parser.parse_args()
    results = json.loads(options.results.read_text("utf-8"))
    page = HERE.parent / "docs" / "results-shapes.md"
    page.write_text(whole(results, options.results.name), encoding="utf-8")


def whole(results: dict[str, Any], source: str) -> str:
    setting = results["setting"]
    hardware = setting["hardware"] if isinstance(setting["hardware"], str) else ", ".join(map(str, setting["hardware"]))
    parts = [INTRODUCTION.format(date=results["date"], hardware=hardware, source=source)]
    for model, about in MODELS.items():
        rows = [row for row in results["rows"] if row["model"] == model]
        if rows:
            parts.append(f"## {model}\n\n{about}")
            parts += [made for made in (sparse(rows), *smaller(rows), other(rows)) if made]
    return "\n\n".join(parts) + "\n"


def sparse(rows: list[dict[str, Any]]) -> str:
    """Sparsity of all linear weights but the head, ours and the peer's."""
    own = [row for row in rows if row["name"].startswith(NAMES)]
    if not own:
        return ""
    methods = list(dict.fromkeys((row["system"], _method(row)) for row in own))
    lines = [f"| zeros | {' | '.join(NAMES)} | CPU s | peak MB |", "|---" * (len(NAMES) + 3) + "|"]
    best = {name: min((r["loss"]["value"] for r in own if r["name"].startswith(name)), default=0.0) for name in NAMES}
    for system, method in methods:
        found = {n: r for n in NAMES for r in own if r["system"] == system and r["name"] == f"{n} {method}"}
        label = method if system == "tersely" else f"{TOOLS[system]}: {method}"
        cells = [_loss(found[name], best[name]) if name in found else "" for name in NAMES]
        first = next(iter(found.values()))
        cells += [f"{first['cpu_seconds']:.0f}", f"{first['peak_memory'] / 1e6:.0f}"]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    told = "Seconds are ours of the whole process, the peer's of its call; they and the memory are of the first number."
    return f"### Sparsity of all linear weights but the head: loss\n\n{told}\n\n" + "\n".join(lines)


def smaller(rows: list[dict[str, Any]]) -> list[str]:
    """A table for each share of parameters that went."""
    parts = []
    for target in sorted({row["target"] for row in rows if row.get("target")}):
        own = sorted((r for r in rows if r.get("target") == target), key=lambda r: r["kl"]["value"])
        timed = any("speed" in row for row in own)
        head = ["", "fewer", "loss", "KL", "same top token", "MB", "CPU s", "peak MB"]
        head += ["transformers, tokens/s", "llama.cpp, tokens/s"] if timed else []
        lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for row in own:
            cells = [
                row["name"],
                f"{100 * row['fewer']:.1f} %",
                f"{row['loss']['value']:.3f}",
                f"{row['kl']['value']:.3f}",
                f"{100 * row['top1']['value']:.1f} %",
                f"{row['bytes'] / 1e6:.2f}",
                f"{row['cpu_seconds']:.0f}",
                f"{row['peak_memory'] / 1e6:.0f}",
            ]
            cells += [f"{row['speed'][e]:.2f} x" if row.get("speed") else "" for e in ("transformers", "llama.cpp")][
                : 2 if timed else 0
            ]
            lines.append(f"| {' | '.join(cells)} |")
        parts.append(f"### {100 * target:.0f} % fewer parameters\n\n" + "\n".join(lines))
    return parts


def other(rows: list[dict[str, Any]]) -> str:
    """Rows that are neither."""
    own = [row for row in rows if not row.get("target") and not row["name"].startswith(NAMES)]
    lines = ["| | loss | KL | same top token | MB |", "|---" * 5 + "|"]
    for row in own:
        size = f"{row['bytes'] / 1e6:.2f}"
        values = f"{row['loss']['value']:.3f} | {row['kl']['value']:.3f} | {100 * row['top1']['value']:.1f} % | {size}"
        lines.append(f"| {row['name']} | {values} |")
    return "### Others\n\n" + "\n".join(lines) if own else ""


def _method(row: dict[str, Any]) -> str:
    found: str = next(row["name"].removeprefix(f"{name} ") for name in NAMES if row["name"].startswith(f"{name} "))
    return found


def _loss(row: dict[str, Any], best: float) -> str:
    said = f"{row['loss']['value']:.3f}"
    return f"**{said}**" if row["loss"]["value"] == best else said


if __name__ == "__main__":
    main()
