"""How fast models run before and after: dense beside 4-bit GPTQ in transformers, and GGUF files in llama.cpp.

    python benchmarks/bench_speed.py --assets ../shared [--gguf house-llama-f16.gguf ...] [--llama-bench llama-bench]

Of each model, the dense checkpoint, the compressed one and the GGUF files whose names begin with the model's are
measured in turns (`tersely.evaluation.speed.race`). With `--llama-bench`, llama.cpp's own benchmark runs in turns with
our measurement of the same file, one sequence at a time: it feeds random tokens and chooses none, ours chooses each.
Run it on a machine that does nothing else. Results go to benchmarks/results/DATE-speed.json and are shown as tables.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console

from tersely.compression import compress
from tersely.evaluation.speed import Race, race, speed
from tersely.plan.reading import load_recipe
from tersely.report.speed_tables import speed_table
from tersely.results.plain import to_plain

HERE = Path(__file__).parent
MODELS = {
    "stories-3m": ("tinystories/sample.txt", "[:128]"),
    "house-llama": ("books/train.txt", ""),
}
"""Model -> what it is calibrated on: a file of the assets, and which documents of it."""


def compressed(assets: Path, name: str, out: Path) -> Path:
    """The model with 4 bits in groups of 64, by GPTQ on 128 sequences of 256 tokens."""
    file, part = MODELS[name]
    settings = ["group=64", "calibration.samples=128", "calibration.context=256"]
    recipe = load_recipe("w4a16-gptq", settings)
    compress(assets / "models" / name, recipe, out, calibration=f"{assets / 'data' / file}{part}")
    return out


def plain(measured: Race) -> dict[str, Any]:
    """The facts, with the models' names instead of their places on this machine."""
    named = [replace(s, model=replace(s.model, name=Path(s.model.name).name)) for s in measured.speeds]
    ratios = {s.model.name: r for s, r in zip(named[1:], measured.ratios, strict=True)}
    return {"speeds": [to_plain(s) for s in named], "ratios": to_plain(ratios)}


def beside(program: str, file: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of llama.cpp's own benchmark and of ours, round by round, for the first length."""
    length, tokens, threads = options.lengths[0], options.tokens, options.threads
    found: dict[str, list[float]] = {"theirs prefill": [], "ours prefill": [], "theirs decode": [], "ours decode": []}
    for _ in range(options.repeats):
        for phase, what in (("prefill", ("-p", length, "-n", 0)), ("decode", ("-p", 0, "-n", tokens, "-d", length))):
            command = [program, "-m", file, "-t", threads, "-r", 5, "-o", "jsonl", *what]
            ran = subprocess.run([f"{word}" for word in command], capture_output=True, text=True, check=True)
            found[f"theirs {phase}"] += json.loads(ran.stdout.splitlines()[0])["samples_ts"]
        ours = speed(file, batches=(1,), lengths=(length,), tokens=tokens, threads=threads)
        for point in ours.points:
            found[f"ours {point.phase}"].append(point.tokens_per_second)
    return {name: {"median": statistics.median(each), "runs": len(each)} for name, each in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=HERE.parent.parent / "shared")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--gguf", nargs="+", type=Path, default=[], help="files named after the models")
    parser.add_argument("--llama-bench", help="llama.cpp's own benchmark program")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 384])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"{date.today()}-speed.json")
    options = parser.parse_args()
    if not options.assets.exists():
        raise SystemExit(f"{options.assets} is missing: pass --assets PATH")
    if options.gguf and importlib.util.find_spec("llama_cpp") is None:
        raise SystemExit("llama-cpp-python is not installed: pip install 'tersely[llama-cpp]'")
    if strange := [f.name for f in options.gguf if not f.name.startswith(tuple(options.models))]:
        raise SystemExit(f"{', '.join(strange)}: expected names that begin with one of {', '.join(options.models)}")
    results: dict[str, Any] = {}
    console = Console(width=100)
    with tempfile.TemporaryDirectory() as work:
        for name in options.models:
            small = compressed(options.assets, name, Path(work) / f"{name}-w4a16-gptq")
            files = [file for file in options.gguf if file.name.startswith(name)]
            measured = race(
                [options.assets / "models" / name, small, *files],
                batches=options.batches,
                lengths=options.lengths,
                tokens=options.tokens,
                repeats=options.repeats,
                threads=options.threads,
            )
            console.print(speed_table(measured.speeds), "")
            results[name] = plain(measured)
            if options.llama_bench:
                results[name]["llama-bench"] = {f.name: beside(options.llama_bench, f, options) for f in files}
                console.print(results[name]["llama-bench"], "")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
