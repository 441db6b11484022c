"""Smaller shapes on really trained models: sparsity beside a peer, width, depth and low rank at equal parameters.

    python benchmarks/bench_shapes.py [stories-3m] [house-llama] [house-mixtral] --assets ../shared
        [--only NAME ...] [--speed] [--peer llmcompressor=PYTHON]

A row is a recipe, compressed and evaluated by the command line in processes of their own, with the protocols of
bench_quantization.py, but that 64 sequences calibrate a smaller shape. Sparsity takes all linear weights but the head,
as the peer's rows do (`--peer`, by the driver in peers/). For each way to a smaller shape, and each of 10, 20 and 40 %
fewer parameters, the ratio is sought that comes nearest, counted in the whole model, embeddings and head included; a
way that cannot come within 4 % is left out. `--speed` adds decoding speed over the source's, in turns: transformers,
and llama.cpp from a GGUF of 16 bits. Results are merged by row into benchmarks/results/DATE-shapes.json;
show_shapes.py makes a page of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from bench_quantization import CALIBRATION, HERE, TERSELY, compressed, data_of, measured_peer, run, toml
from quantization_rows import step
from transformers import AutoTokenizer

from tersely.calibrate import read_text, sequences
from tersely.checkpoint import open_checkpoint
from tersely.errors import UsageError
from tersely.evaluation.subject import setting
from tersely.plan.reading import presets, recipe_from_toml
from tersely.shape.run import planned

Steps = list[dict[str, Any]]
TARGETS = (0.1, 0.2, 0.4)
NEAR = 0.04
SEQUENCES = 64
"""That calibrate a smaller shape, where they are not trained on."""
PEER = {
    "llmcompressor": (
        "llm_compressor.py",
        {
            f"{name} {method}": f"--method {method} {what} {{sequences}}"
            for name, what in (
                ("50 %", "--sparsity 0.5"),
                ("2:4", "--sparsity 0.5 --mask 2:4"),
                ("70 %", "--sparsity 0.7"),
            )
            for method in ("wanda", "sparsegpt")
        },
    )
}


def sparsity() -> dict[str, Steps]:
    rows: dict[str, Steps] = {}
    for name, own in (("50 %", {"sparsity": 0.5}), ("2:4", {"pattern": "2:4"}), ("70 %", {"sparsity": 0.7})):
        for method in ("magnitude", "wanda", "dsnot", "sparsegpt"):
            rows[f"{name} {method}"] = [step(method, **own)]
        rows[f"{name} sparsegpt, refined"] = [step("sparsegpt", refine=20, **own)]
        rows[f"{name} sparsegpt, refined, then gptq w4"] = [
            step("sparsegpt", refine=20, **own),
            step("gptq", bits=4, group=64),
        ]
    learned = tomllib.loads(presets()["maskllm-2of4"])["steps"]
    rows["2:4 maskllm"] = [each | ({"autocast": True} if each["method"] == "maskllm" else {}) for each in learned]
    for ratio in (0.2, 0.4):
        share = f"low rank, {100 * ratio:.0f} % of the linear weights fewer"
        rows[f"{share}, svd_llm"] = [step("svd_llm", ratio=ratio)]
        rows[f"{share}, asvd"] = [step("asvd", ratio=ratio)]
        rows[f"{share}, plain svd"] = [step("asvd", ratio=ratio, alpha=0.0)]
    return rows


def shapes() -> dict[str, Callable[[float], Steps]]:
    """Name -> steps at a ratio."""

    def cut(where: str, method: str, **own: Any) -> Callable[[float], Steps]:
        return lambda ratio: [step(method, where, ratio=round(ratio, 4), **own)]

    # transformers takes hidden sizes of a Llama that are multiples of its heads only: of 4 or 6 here.
    widths, hidden = {"multiple": 8}, {"multiple": 24}
    rows: dict[str, Callable[[float], Steps]] = {}
    for method in ("minitron", "llm_pruner", "weight_norm", "random"):
        rows[f"neurons, {method}"] = cut("neurons", method, **widths)
    for method in ("minitron", "random"):
        rows[f"neurons, {method}, not refitted"] = cut("neurons", method, refit=False, **widths)
    rows["neurons and heads, minitron"] = cut("neurons|heads", "minitron", **widths)
    rows["neurons, compresso"] = cut("neurons", "compresso", **widths)
    for method in ("slicegpt", "minitron", "weight_norm", "random"):
        rows[f"hidden, {method}"] = cut("hidden", method, **hidden)
    rows["hidden, slicegpt, not refitted"] = cut("hidden", "slicegpt", refit=False, **hidden)
    rows["hidden and neurons, slicegpt and minitron"] = lambda ratio: [
        step("slicegpt", "hidden", ratio=round(ratio, 4), **hidden),
        step("minitron", "neurons", ratio=round(ratio, 4), **widths),
    ]
    for method in ("block_search", "block_similarity"):
        rows[f"blocks, {method}"] = cut("blocks", method)
    rows["experts, routed"] = cut("experts", "routed")
    rows["experts, random"] = cut("experts", "random", refit=False)
    return rows


def fewer(model: Path, steps: Steps) -> float:
    """Share of the parameters that steps remove. UsageError where they cannot."""
    recipe = recipe_from_toml(toml(steps, None if steps[-1]["method"] == "random" else (8, 64)))
    whole = made = open_checkpoint(model)
    for each in recipe.shapes:
        made = planned(made, each, each.where)
    return 1 - made.parameters / whole.parameters


def ratio_for(model: Path, make: Callable[[float], Steps], target: float) -> float | None:
    """The ratio whose share of removed parameters is nearest to the target; None where none is near."""
    found: dict[float, float] = {}
    low, high = 0.01, 0.97
    for _ in range(12):
        ratio = (low + high) / 2
        try:
            found[ratio] = fewer(model, make(ratio))
        except UsageError as error:
            if "removes none" not in str(error):
                high = ratio
                continue
            found[ratio] = 0.0
        low, high = (ratio, high) if found[ratio] < target else (low, ratio)
    reached = {ratio: share for ratio, share in found.items() if abs(share - target) <= NEAR}
    return min(reached, key=lambda ratio: abs(reached[ratio] - target)) if reached else None


def measured(
    model: str, name: str, target: float | None, steps: Steps, speed: bool, assets: Path, work: Path
) -> dict[str, Any]:
    source, out = assets / "models" / model, work / "out"
    text, evaluate = data_of(model, assets, work)
    samples, context = CALIBRATION[model]
    few = target is not None and not name.endswith("compresso")
    calibration = (SEQUENCES if few else samples, context)
    report, seconds, peak = compressed(source, out, steps, calibration, text, work)
    facts, _, _ = run([*TERSELY, "evaluate", str(out), "--against", str(source), *evaluate, "--no-store", "--json"])
    apart = facts["text"]["divergence"]
    after = report["shapes"][-1]["parameters_after"] if report["shapes"] else report["parameters"]
    row = {
        "model": model,
        "name": name,
        "target": target,
        "system": "tersely",
        "steps": steps,
        "format": report["format"],
        "fewer": 1 - after / report["parameters"],
        "bytes": report["bytes_after"],
        "loss": facts["text"]["loss"],
        "kl": apart["kl"],
        "top1": apart["top1_agreement"],
        "cpu_seconds": round(seconds, 1),
        "peak_memory": peak,
        "notes": report["notes"][:6],
    }
    if speed:
        row["speed"] = speeds(source, out, work)
    return row


def per_norm(model: str, target: float, assets: Path, work: Path) -> dict[str, Any]:
    """SliceGPT with a basis for each norm, which no stock model can have: slicegpt_per_norm.py."""
    source = assets / "models" / model
    text, evaluate = data_of(model, assets, work)
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    files = []
    for name, content, context, count in (
        ("calibration", text, CALIBRATION[model][1], SEQUENCES),
        ("evaluation", evaluate[1], int(evaluate[3]), 200),
    ):
        ids = sequences(
            read_text(content), tokenizer, context=context, samples=count, purpose=f"the {name}", at_most=True
        )
        files.append(work / f"{name}.json")
        files[-1].write_text(json.dumps([own.tolist() for own in ids.ids]), "utf-8")
    script = HERE / "slicegpt_per_norm.py"
    found, seconds, peak = run([sys.executable, str(script), str(source), *map(str, files), str(target)])
    return {
        "model": model,
        "name": "hidden, slicegpt, a basis for each norm (not stock; computed at full width)",
        "target": target,
        "system": "tersely",
        "fewer": found["fewer"],
        "bytes": round((1 - found["fewer"]) * open_checkpoint(source).nbytes),
        **{name: {"value": found[name]} for name in ("loss", "kl", "top1")},
        "cpu_seconds": round(seconds, 1),
        "peak_memory": peak,
        "notes": [f"{found['kept']} hidden coordinates"],
    }


def speeds(source: Path, out: Path, work: Path) -> dict[str, float]:
    """Tokens a second that are written, over the source's, measured in turns: transformers, llama.cpp."""
    found = {}
    grid = ["--batch", "1", "--length", "64", "--tokens", "32", "--no-store", "--json"]
    for engine, folders in (("transformers", (out, source)), ("llama.cpp", ggufs(source, out, work))):
        facts, _, _ = run([*TERSELY, "speed", *map(str, folders), "--engine", engine, *grid])
        ours, theirs = (
            next(p["tokens_per_second"] for p in each["points"] if p["phase"] == "decode") for each in facts
        )
        found[engine] = ours / theirs
    return found


def ggufs(source: Path, out: Path, work: Path) -> tuple[Path, Path]:
    made = []
    for number, folder in enumerate((out, source)):
        file = work / f"{number}.gguf"
        run([*TERSELY, "export", str(folder), str(file), "--to", "gguf", "--json"])
        made.append(file)
    return made[0], made[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(CALIBRATION))
    parser.add_argument("--assets", type=Path, default=Path("../shared"))
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="rows whose name begins so")
    parser.add_argument("--target", action="append", type=float, default=[], help="shares of parameters to remove")
    parser.add_argument("--speed", action="store_true", help="decoding speed too")
    parser.add_argument("--peer", action="append", default=[], metavar="TOOL=PYTHON", help=", ".join(PEER))
    options = parser.parse_args()
    assets = options.assets.absolute()
    out = HERE / "results" / f"{date.today()}-shapes.json"
    jobs: list[tuple[str, str, str, Callable[[Path], dict[str, Any] | None]]] = []
    for model in options.models:
        if options.peer:
            for said in options.peer:
                system, _, python = said.partition("=")
                driver, own = PEER[system]
                jobs += [
                    (
                        model,
                        system,
                        name,
                        partial(measured_peer, model, name, system, python, driver, arguments, assets),
                    )
                    for name, arguments in own.items()
                ]
            continue
        if model != "house-mixtral":
            jobs += [
                (model, "tersely", name, partial(measured, model, name, None, steps, False, assets))
                for name, steps in sparsity().items()
            ]
        for target in options.target or TARGETS:
            name = "hidden, slicegpt, a basis for each norm"
            jobs.append((model, "tersely", name, partial(per_norm, model, target, assets)))
        for name, make in shapes().items():
            for target in options.target or TARGETS:
                jobs.append((model, "tersely", name, partial(sought, model, name, target, make, options.speed, assets)))
    for model, system, name, job in jobs:
        if options.only and not any(name.startswith(each) for each in options.only):
            continue
        with tempfile.TemporaryDirectory() as work:
            try:
                row = job(Path(work))
            except (RuntimeError, ValueError, IndexError) as error:
                print(f"{model}, {system} {name}: {error}", file=sys.stderr)
                continue
        if row is None:
            continue
        share = f"{100 * row['fewer']:.1f} % fewer" if row.get("target") else ""
        print(
            f"{model} {system} {name} {share}: loss {row['loss']['value']:.4f}, KL {row['kl']['value']:.4f}", flush=True
        )
        # Read again: another run may have written since.
        kept = json.loads(out.read_text("utf-8"))["rows"] if out.exists() else []
        rows = {(each["model"], each["system"], each["name"], each.get("target")): each for each in kept}
        rows[model, system, name, row.get("target")] = row
        where = dataclasses.asdict(setting("cpu", packages=["compressed-tensors"]))
        plain = {"date": str(date.today()), "setting": where, "rows": list(rows.values())}
        out.write_text(json.dumps(plain, indent=1) + "\n", "utf-8")


def sought(
    model: str, name: str, target: float, make: Callable[[float], Steps], speed: bool, assets: Path, work: Path
) -> dict[str, Any] | None:
    try:
        ratio = ratio_for(assets / "models" / model, make, target)
    except UsageError:
        return None
    if ratio is None:
        return None
    shutil.rmtree(work / "out", ignore_errors=True)
    return measured(model, name, target, make(ratio), speed, assets, work)


if __name__ == "__main__":
    main()
