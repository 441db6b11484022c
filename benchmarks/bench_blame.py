"""Blame: what does a site cost in time, and are its costs of use?

    python benchmarks/bench_blame.py [time] [use] --assets ../shared

Without parts, both run. `time`: a pass for each block with and without replay,
in seconds of one core. `use`: a model of 3 bits is blamed on
one text; then blocks and weights get 4 bits by what they cost, and the KL is taken on another text. Of every pair of
blocks where that is cheap (rounded to nearest), else of the dearest and the cheapest pair (GPTQ). All blocks have equal
bytes. Results are added to benchmarks/results/DATE-blame.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from tersely.calibrate import read_text
from tersely.checkpoint import open_checkpoint
from tersely.compression import compress
from tersely.evaluation import blame as inside
from tersely.evaluation.blame import blame
from tersely.evaluation.divergence import measure_text
from tersely.evaluation.passes import Work, in_batches
from tersely.evaluation.swapping import differences
from tersely.graph import read_graph
from tersely.plan.reading import load_recipe
from tersely.results import Blame
from tersely.runtime import Loaded, load_model, load_tokenizer

HERE = Path(__file__).parent
CONTEXT, BLAMED, EVALUATED = 256, 20, 60
GROUP = 64


def texts(assets: Path, name: str, work: Path) -> tuple[Path, Path, Path]:
    """Three texts that share nothing: to calibrate with, to blame on, to evaluate on."""
    if name == "stories-3m":
        file = assets / "data" / "tinystories" / "sample.txt"
        return Path(f"{file}[:128]"), Path(f"{file}[-200:-100]"), Path(f"{file}[-100:]")
    books = assets / "data" / "books"
    content = read_text(books / "valid.txt")
    halves = work / "blamed.txt", work / "evaluated.txt"
    halves[0].write_text(content[: len(content) // 4], "utf-8")
    halves[1].write_text(content[len(content) // 2 :][: len(content) // 4], "utf-8")
    train = work / "train.txt"
    train.write_text(read_text(books / "train.txt")[:1_000_000], "utf-8")
    return train, *halves


def compressed(source: Path, out: Path, method: str, wider: str, calibration: Path) -> int:
    """A model of 3 bits in which `wider` has 4; bytes of its weights."""
    step = f'[[steps]]\nmethod = "{method}"\ngroup = {GROUP}\nsymmetric = true\n'
    parts = [f'{step}bits = 3\nwhere = "linear"\n', f'{step}bits = 4\nwhere = "{wider}"\n' if wider else ""]
    data = f"[calibration]\nsamples = 96\ncontext = {CONTEXT}\n" if method == "gptq" else ""
    recipe = out.with_suffix(".toml")
    recipe.write_text(data + "".join(parts), "utf-8")
    compress(source, load_recipe(recipe), out, calibration=calibration if data else None)
    return sum(file.stat().st_size for file in out.glob("*.safetensors"))


def kl(model: Path, base: Loaded, text: Path) -> dict[str, float]:
    loaded = Loaded(model.name, load_model(model), base.tokenizer, "cpu")
    found = measure_text([loaded, base], read_text(text), "text", context=CONTEXT, samples=EVALUATED).result.divergence
    assert found is not None
    return {"kl": found.kl.value, "stderr": found.kl.stderr}


def blocks_of(result: Blame) -> list[int]:
    return [site.block for site in result.sites if site.level == "block" and site.block is not None]


def densest(result: Blame, parameters: int) -> list[str]:
    """Weights with the largest cost for each parameter, as many as fit into so many parameters."""
    inner = [site for site in result.sites if site.level == "weight" and site.block is not None]
    chosen: list[str] = []
    for site in sorted(inner, key=lambda site: -site.cost.value / site.parameters):
        if site.parameters <= parameters:
            chosen.append(site.name)
            parameters -= site.parameters
    return chosen


def used(source: Path, method: str, data: tuple[Path, Path, Path], work: Path) -> dict[str, Any]:
    base = Loaded(source.name, load_model(source), load_tokenizer(source), "cpu")
    calibration, blamed_text, evaluated_text = data
    narrow = work / f"{method}-narrow"
    found: dict[str, Any] = {"bytes": compressed(source, narrow, method, "", calibration)}
    found["all 3 bits"] = kl(narrow, base, evaluated_text)
    results = {
        direction: blame(narrow, blamed_text, against=source, direction=direction, context=CONTEXT, samples=BLAMED)
        for direction in ("restore", "spoil")
    }
    restored = results["restore"]
    for direction, result in results.items():
        found[direction] = {
            "kl": result.kl.value,
            "tokens": result.tokens,
            "seconds": round(result.seconds, 1),
            "sites": len(result.sites),
            "blocks": [
                [site.block, round(site.cost.value, 5), round(site.cost.stderr, 5)]
                for site in result.sites
                if site.level == "block"
            ],
        }
    order = blocks_of(restored)
    pairs: dict[str, Sequence[int]] = {"dearest": order[:2], "cheapest": order[-2:]}
    if blocks_of(results["spoil"])[:2] != order[:2]:
        pairs["dearest by spoiling"] = blocks_of(results["spoil"])[:2]
    if method == "rtn":
        pairs |= {f"{a} {b}": (a, b) for a, b in combinations(sorted(order), 2)}
    size = sum(site.parameters for site in restored.sites if site.level == "block") // len(order)
    chosen = {label: " | ".join(f"linear blocks {n}" for n in pair) for label, pair in pairs.items()}
    for direction, result in results.items():
        chosen[f"weights by {direction}"] = " | ".join(densest(result, 2 * size))
    found["4 bits in"] = {}
    for number, (label, where) in enumerate(chosen.items()):
        out = work / f"{method}-{number}"
        nbytes = compressed(source, out, method, where, calibration)
        found["4 bits in"][label] = {"where": where, "bytes": nbytes, **kl(out, base, evaluated_text)}
        print(f"{source.name} {method} {label}: {found['4 bits in'][label]['kl']:.5f}")
    if method == "rtn":
        every = sorted(found["4 bits in"][f"{a} {b}"]["kl"] for a, b in combinations(sorted(order), 2))
        ranks = {
            label: 1 + every.index(found["4 bits in"][label]["kl"])
            for label in pairs
            if " by" in label or label.isalpha()
        }
        found["rank among all pairs"] = {**ranks, "of": len(every)}
    return found


def timed(source: Path, data: tuple[Path, Path, Path], work: Path, repeats: int = 5) -> dict[str, Any]:
    """Median seconds of one core for each block, with and without replay, on one micro-batch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = work / "timed"
    compressed(source, model, "rtn", "", data[0])
    folders = (model, source)
    networks = inside._load(folders, "cpu", "auto")
    sequences, _ = inside._data(read_text(data[1]), networks, folders, CONTEXT, 16, None, 0)
    graph = read_graph(open_checkpoint(source))
    changed = differences(graph, networks, folders, "restore", "cpu")
    batch = in_batches(sequences, range(16), 4096)[0]
    found: dict[str, Any] = {"tokens": batch.tokens}
    begin = time.process_time()
    Work(changed.networks, {}).record(batch)
    found["record"] = round(time.process_time() - begin, 4)
    sites = [site for site in changed.sites if site.level == "block"]
    for label, replays in (("replay", True), ("whole passes", False)):
        work_ = Work(changed.networks, {}, replays=replays)
        work_.record(batch)
        seconds = []
        for site in sites:
            times = []
            for _ in range(repeats):
                begin = time.process_time()
                work_.divergences((site,), batch)
                times.append(time.process_time() - begin)
            seconds.append(round(statistics.median(times), 4))
        found[label] = seconds
    found["ratio"] = round(sum(found["replay"]) / sum(found["whole passes"]), 3)
    print(source.name, found)
    torch.set_num_threads(threads)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--assets", type=Path, default=Path("../shared"))
    options = parser.parse_args()
    parts = options.parts or ["time", "use"]
    if unknown := set(parts) - {"time", "use"}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    assets = options.assets.resolve()
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    file = HERE / "results" / f"{date.today()}-blame.json"
    made: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    made |= {
        "hardware": f"{cpu.partition(': ')[2] or platform.processor()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "threads": torch.get_num_threads(),
    }
    for name in ("stories-3m", "house-llama"):
        source = assets / "models" / name
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            data = texts(assets, name, work)
            if "time" in parts:
                made.setdefault("time", {})[name] = timed(source, data, work)
            for method in ("rtn", "gptq") if "use" in parts else ():
                made.setdefault("use", {}).setdefault(name, {})[method] = used(source, method, data, work)
                file.write_text(json.dumps(made, indent=1) + "\n")
        file.write_text(json.dumps(made, indent=1) + "\n")
    print(f"wrote {file.name}")


if __name__ == "__main__":
    main()
