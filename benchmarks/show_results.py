"""Show the newest results of bench_quantization.py: docs/results.md, and what the README has of them.

    python benchmarks/show_results.py [RESULTS.json]

The picture has a card of its own, light or dark as the reader's system is; down and to the left is better.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODEL = "stories-3m"
FULL_PRECISION = 1.2486
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 500, 76, 24, 92, 92
BITS = (2.0, 4.7)
ADDED = (0.05, 8.0)
TICKS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5)

STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2328 }
  .title { font-size: 17px; font-weight: 600 } .soft { fill: #59636e; font-size: 12.5px }
  text.ours { fill: #0b7285; font-weight: 600 }
  .card { fill: #ffffff; stroke: #d1d9e0 } .grid { stroke: #e6eaef } .axis { stroke: #818b98 }
  .line { fill: none; stroke: #8b96a2; stroke-width: 2 } .line.ours { stroke: #0b7285; stroke-width: 2.5 }
  .mark { fill: #8b96a2; stroke: #ffffff; stroke-width: 1.5 } .mark.ours { fill: #0b7285 }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc } .soft { fill: #9198a1 } text.ours { fill: #3bc9db }
    .card { fill: #0d1117; stroke: #3d444d } .grid { stroke: #21262d }
    .line { stroke: #6e7883 } .line.ours { stroke: #3bc9db }
    .mark { fill: #6e7883; stroke: #0d1117 } .mark.ours { fill: #3bc9db }
  }
"""


TOOLS = {"llmcompressor": "llm-compressor", "nvidia-modelopt": "ModelOpt", "auto-round": "AutoRound"}
MODELS = {
    "stories-3m": "Llama, 3.15 million parameters in float32, 200 held-out stories. Full precision: loss 1.2486.",
    "house-llama": "Llama, 8.9 million parameters in bfloat16, 200 windows of unseen books.",
    "house-mixtral": "Mixtral, 5.4 million parameters in bfloat16, 8 experts of which 2 are used, the same books.",
}
INTRODUCTION = """\
# Results: quantization

Measured {date} on {hardware}; made by `benchmarks/show_results.py` from
[{source}](../benchmarks/results/{source}), which has all settings. Each row of ours is a recipe of
`benchmarks/bench_quantization.py`, compressed and evaluated by the command line; rows with a tool's name are that
tool's, by the drivers in `benchmarks/peers/`, on the same calibration text and evaluated by the same command.

Bits a weight count everything that is stored for the compressed weights: codes, scales, zeros, codebooks, indices,
low-rank factors. Scales have the dtype of the source, so rows of stories-3m (float32) pay 32 bits a group; those from
a float16 copy of it pay 16, as AutoRound's do. W4A8 and W8A8 in the standard format take a byte a code. Loss is in
nats a token, with half the width of its 95 % interval over texts: most of that is common to all rows, so KL from the
source and the share of equal top tokens tell close rows apart. CPU seconds and peak memory are those of the whole
compressing process; the machine was busy with two or three such processes, which lengthens CPU seconds too."""


BEGIN, END = "<!-- results -->", "<!-- /results -->"
SHORT = """\
A really trained Llama of 3.15 million parameters; 200 held-out stories, groups of 64, calibrated on 256 other stories,
one machine, one script. Loss in nats a token (the original's is 1.249), KL divergence from the original, and how often
both find the same token most likely. Seconds of one busy core: ours of the whole process, the peers' of their
quantizing call. Distillation needs memory for about eleven times the model; the others work block by block."""

CHOSEN = {
    bits: (
        (("llmcompressor", f"w{bits} gptq"), "llm-compressor 0.14, GPTQ"),
        *(((("nvidia-modelopt", "w4 awq_lite"), "ModelOpt 0.47, AWQ"),) if bits == 4 else ()),
        (("auto-round", f"w{bits} 200 steps, whole text"), "AutoRound 0.16, 200 steps, all text"),
        (("tersely", f"w{bits} gptq"), "tersely, GPTQ"),
        (("tersely", f"w{bits} gptq, asymmetric, signround, float16 source"), "tersely, GPTQ and learned rounding"),
        (("tersely", f"w{bits}a16-best, float16 source"), f"tersely, GPTQ and distillation (`w{bits}a16-best`)"),
    )
    for bits in (4, 3, 2)
}


@dataclass(frozen=True)
class Series:
    """Rows of one method, joined by a line, with its name beside one of them."""

    name: str
    system: str
    rows: tuple[str, ...]
    beside: int = 2
    """Of which row the name stands."""
    offset: tuple[int, int] = (11, 4)
    """Pixels from the mark to the name."""
    anchor: str = "start"

    @property
    def ours(self) -> str:
        return " ours" if self.system == "tersely" else ""


SERIES = (
    Series("GPTQ, llm-compressor", "llmcompressor", tuple(f"w{b} gptq" for b in (4, 3, 2))),
    Series("AWQ, ModelOpt", "nvidia-modelopt", ("w4 awq_lite",), 0, (0, -14), "middle"),
    Series("AutoRound", "auto-round", tuple(f"w{b} 200 steps, whole text" for b in (4, 3, 2)), 2, (0, -13), "middle"),
    Series("tersely, GPTQ", "tersely", tuple(f"w{b} gptq" for b in (4, 3, 2)), 0, (14, 22), "middle"),
    Series(
        "tersely, GPTQ and distillation",
        "tersely",
        tuple(f"w{b}a16-best, float16 source" for b in (4, 3, 2)),
        1,
        (-11, 20),
        "end",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the pages and the picture of a results file.")
    newest = max((HERE / "results").glob("*-quantization.json"), default=HERE / "results")
    parser.add_argument("results", type=Path, nargs="?", default=newest)
    options = parser.parse_args()
    results = json.loads(options.results.read_text("utf-8"))
    docs = HERE.parent / "docs"
    (docs / "results.md").write_text(page(results, options.results.name), encoding="utf-8")
    found = {(row["system"], row["name"]): row for row in results["rows"] if row["model"] == MODEL}
    (docs / "images" / "loss.svg").write_text(draw(found), encoding="utf-8")
    readme = HERE.parent / "README.md"
    before, _, rest = readme.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{short(found)}{END}{after}", encoding="utf-8")


def page(results: dict[str, Any], source: str) -> str:
    """All rows as Markdown, by model and by bits of weights and inputs."""
    setting = results["setting"]
    hardware = setting["hardware"] if isinstance(setting["hardware"], str) else ", ".join(map(str, setting["hardware"]))
    parts = [INTRODUCTION.format(date=results["date"], hardware=hardware, source=source)]
    for model, about in MODELS.items():
        parts.append(f"## {model}\n\n{about}")
        groups: dict[tuple[float, float, float], list[dict[str, Any]]] = {}
        for row in results["rows"]:
            if row["model"] == model:
                groups.setdefault(kind(row["name"]), []).append(row)
        for (_, bits, inputs), rows in sorted(groups.items()):
            parts.append(f"### {heading(bits, inputs)}\n\n{table(sorted(rows, key=lambda row: row['kl']['value']))}")
    return "\n\n".join(parts) + "\n"


def short(found: dict[tuple[str, str], dict[str, Any]]) -> str:
    """The part of the README: the picture, and a table of the rows that most will ask for."""
    parts = [f"![Loss added by 4, 3 and 2 bits: tersely and three peers](docs/images/loss.svg)\n\n{SHORT}"]
    for bits, rows in CHOSEN.items():
        parts.append(f"| {bits} bits | bits/weight | loss | KL | same top token | CPU s |\n|---|---|---|---|---|---|")
        best = min(found[row]["loss"]["value"] for row, _ in rows)
        for row, name in rows:
            own = found[row]
            loss = f"{own['loss']['value']:.3f}"
            cells = (
                name,
                f"{own['bits_per_weight']:.2f}",
                f"**{loss}**" if own["loss"]["value"] == best else loss,
                f"{own['kl']['value']:.3f}",
                f"{100 * own['top1']['value']:.0f} %",
                f"{own['cpu_seconds']:.0f}",
            )
            parts[-1] += f"\n| {' | '.join(cells)} |"
    parts.append("All rows, two more models, W8A8, W4A8, W4A4 and caches: [results](docs/results.md).\n")
    return "\n\n".join(parts)


def kind(name: str) -> tuple[float, float, float]:
    """Order, bits of weights and bits of inputs of a row; 0 bits of weights: it is about the cache."""
    if name.startswith("cache"):
        return 1, 0, 16
    found = re.match(r"w([\d.]+)(?:a(\d+))?", name)
    bits, inputs = (float(found[1]), float(found[2] or 16)) if found else (2, 16)
    return -inputs, -math.ceil(bits), inputs


def heading(bits: float, inputs: float) -> str:
    if not bits:
        return "Keys and values, behind weights of 8 bits"
    weights = f"Weights of {-bits:g} bits" if bits < -2 else "Weights of about 2 bits"
    return weights if inputs == 16 else f"{weights}, inputs of {inputs:g}"


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; those of peers name the tool."""
    cached = any(row["name"].startswith("cache") for row in rows)
    head = [
        "",
        "bits/number of the cache" if cached else "bits/weight",
        "loss",
        "KL",
        "same top token",
        "CPU s",
        "peak MB",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        loss, kl, top = row["loss"], row.get("kl") or {}, row.get("top1") or {}
        bits = row.get("cache_bits" if cached else "bits_per_weight")
        cells = (
            row["name"] if row["system"] == "tersely" else f"{TOOLS[row['system']]}: {row['name']}",
            f"{bits:.2f}" if bits else "",
            f"{loss['value']:.4f}" + (f" ± {(loss['high'] - loss['low']) / 2:.4f}" if "high" in loss else ""),
            f"{kl['value']:.4f}" if kl else "",
            f"{100 * top['value']:.1f} %" if top else "",
            f"{row['cpu_seconds']:.0f}" if row.get("cpu_seconds") else "",
            f"{row['peak_memory'] / 1e6:.0f}" if row.get("peak_memory") else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: dict[tuple[str, str], dict[str, Any]]) -> str:
    """The picture as SVG text."""
    floor = HEIGHT - BOTTOM
    parts: list[str] = []
    for tick in TICKS:
        y = down(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(text(LEFT - 10, y + 4, f"+{tick:g}", "soft", "end"))
    for bits in (2, 2.5, 3, 3.5, 4, 4.5):
        parts.append(text(across(bits), floor + 20, f"{bits:g}", "soft", "middle"))
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    parts.append(
        text((LEFT + WIDTH - RIGHT) / 2, floor + 40, "bits a weight, scales and zeros counted", "soft", "middle")
    )
    said = []
    for series in SERIES:
        points = [(found[series.system, name], name) for name in series.rows]
        places = [(across(row["bits_per_weight"]), down(row["loss"]["value"] - FULL_PRECISION)) for row, _ in points]
        if len(places) > 1:
            joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline class="line{series.ours}" points="{joined}"/>')
        parts += [f'<circle class="mark{series.ours}" cx="{x:.1f}" cy="{y:.1f}" r="5.5"/>' for x, y in places]
        x, y = places[series.beside]
        right, under = series.offset
        parts.append(text(x + right, y + under, series.name, series.ours, series.anchor))
        said += [f"{series.name} {row['bits_per_weight']:.2f} bits {row['loss']['value']:.4f}" for row, _ in points]
    title = "What 4, 3 and 2 bits cost a really trained model"
    summary = f"{title}: {', '.join(said)}"
    return (
        "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
                f'height="{HEIGHT}" role="img" aria-label="{escape(summary)}">',
                f"<style>{STYLE}</style>",
                f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>',
                text(24, 36, title, "title"),
                text(
                    24,
                    60,
                    "loss added to full precision, nats a token (each gridline a factor); less is better",
                    "soft",
                ),
                *parts,
                text(
                    24,
                    HEIGHT - 18,
                    f"llama, 3.15 M parameters, 200 held-out stories; groups of 64; full precision: {FULL_PRECISION}",
                    "soft",
                ),
                "</svg>",
            ]
        )
        + "\n"
    )


def across(bits: float) -> float:
    return LEFT + (bits - BITS[0]) / (BITS[1] - BITS[0]) * (WIDTH - LEFT - RIGHT)


def down(added: float) -> float:
    share = math.log(added / ADDED[0]) / math.log(ADDED[1] / ADDED[0])
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def text(x: float, y: float, content: str, style: str = "", anchor: str = "start") -> str:
    """One line of text."""
    return f'<text class="{style.strip()}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


if __name__ == "__main__":
    main()
