"""Draw the README's picture: loss added to full precision, one bar per tool, method and width.

    python benchmarks/plot_results.py [RESULTS.json] [OUT.svg]

The bars start at zero, which is the uncompressed model. The card has a background of its own, light or dark
as the reader's system is.
"""

import argparse
import json
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WIDTH, LEFT, RIGHT, TOP, BAR, GAP, BETWEEN = 760, 250, 110, 92, 24, 8, 14

STYLE = """
  text { font: 14px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2328 }
  .title { font-size: 17px; font-weight: 600 } .soft { fill: #59636e; font-size: 12.5px }
  .value { font-variant-numeric: tabular-nums } text.ours { font-weight: 600 }
  .card { fill: #ffffff; stroke: #d1d9e0 } .axis { stroke: #818b98 }
  .bar { fill: #b3bcc6 } .bar.ours { fill: #0b7285 }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc } .soft { fill: #9198a1 } .card { fill: #0d1117; stroke: #3d444d }
    .bar { fill: #545d68 } .bar.ours { fill: #3bc9db }
  }
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw loss by tool, method and width from a results file.")
    newest = max((HERE / "results").glob("*-foundation.json"), default=HERE / "results")
    parser.add_argument("results", type=Path, nargs="?", default=newest)
    default = HERE.parent / "docs" / "images" / "loss.svg"
    parser.add_argument("out", type=Path, nargs="?", default=default)
    options = parser.parse_args()
    options.out.write_text(draw(chosen(json.loads(options.results.read_text("utf-8")))), encoding="utf-8")


def chosen(results: dict[str, Any]) -> dict[str, Any]:
    """The rows of the picture, from what bench_foundation.py measured: 4 bits, then 3, each pair side by side."""
    loss = {row["name"]: row["loss"]["value"] for row in results["quality"]}
    rows = [
        {"bits": bits, "tool": tool, "method": method, "loss": loss[f"{tool} {method}, {bits} bits"]}
        for bits, methods in ((4, ("RTN", "GPTQ")), (3, ("GPTQ",)))
        for method in methods
        for tool in ("llm-compressor", "tersely")
    ]
    return {
        "title": "What 4 and 3 bits cost a really trained model",
        "subtitle": "loss added to full precision, nats a token; less is better",
        "note": "llama, 3.15 M parameters, 200 held-out stories; groups of 64; equal bytes",
        "full_precision": loss["full precision"],
        "rows": rows,
    }


def draw(results: dict[str, Any]) -> str:
    """The picture as SVG text."""
    base, rows = results["full_precision"], results["rows"]
    scale = (WIDTH - LEFT - RIGHT) / max(row["loss"] - base for row in rows)
    bars, y, last = [], TOP, None
    for row in rows:
        group = (row["bits"], row["method"])
        if last not in (None, group):
            y += BETWEEN
        ours = " ours" if row["tool"] == "tersely" else ""
        added = row["loss"] - base
        if last != group:
            bars.append(text(24, y + BAR, f"{row['bits']} bits, {row['method']}"))
        bars += [
            text(LEFT - 10, y + 17, row["tool"], ours or "soft", "end"),
            f'<rect class="bar{ours}" x="{LEFT}" y="{y}" width="{added * scale:.1f}" height="{BAR}" rx="2"/>',
            text(LEFT + added * scale + 8, y + 17, f"+{added:.4f}", f"value{ours}"),
        ]
        last, y = group, y + BAR + GAP
    height = y + 44
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img" aria-label="{escape(summary(results))}">',
        f"<style>{STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
        text(24, 36, results["title"], "title"),
        text(24, 60, results["subtitle"], "soft"),
        *bars,
        f'<line class="axis" x1="{LEFT}" x2="{LEFT}" y1="{TOP - 8}" y2="{y}"/>',
        text(24, height - 16, f"{results['note']}; full precision: {base:.4f}", "soft"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def summary(results: dict[str, Any]) -> str:
    """What the picture shows, for those who cannot see it."""
    said = [f"{r['tool']} {r['method']} {r['bits']} bits {r['loss']:.4f}" for r in results["rows"]]
    return f"{results['title']}: full precision {results['full_precision']:.4f}, {', '.join(said)}"


def text(x: float, y: float, content: str, style: str = "", anchor: str = "start") -> str:
    """One line of text."""
    return f'<text class="{style.strip()}" x="{x:.1f}" y="{y}" text-anchor="{anchor}">{escape(content)}</text>'


if __name__ == "__main__":
    main()
