"""Every quantization method on really trained models, beside the peers, at counted bytes.

    python benchmarks/bench_quantization.py [stories-3m] [house-llama] [house-mixtral] --assets ../shared
        [--only NAME ...] [--peer llmcompressor=PYTHON ...]

A row is a recipe of quantization_rows.py, compressed and evaluated by the command line in processes of their own: loss
with its interval, KL and top-1 agreement with the source, bytes of the encoded weights counted in full (codes, scales,
zeros, codebooks, indices, low-rank factors), seconds of processor time and peak memory of the job. `--peer` runs a
peer's rows, by its driver in peers/ (which says how to make its environment), on the same calibration text; its seconds
are those of its quantizing call alone. Results are merged by row into benchmarks/results/DATE-quantization.json, so
that a run can be made in parts; show_results.py makes a page and a picture of them.

Protocols: stories-3m calibrates on the first 256 stories and is evaluated on the last 200, each alone, 512 tokens at
most; the house models calibrate on 256 windows of 256 tokens from the first 300,000 characters of books/train.txt and
are evaluated on 200 windows of 257 tokens, drawn evenly from books/valid.txt.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from quantization_rows import HALF, PEERS, recipes
from safetensors.torch import load_file, save_file
from show_results import table
from transformers import AutoTokenizer

from tersely.calibrate import read_text, sequences
from tersely.evaluation.subject import setting
from tersely.runtime.policy import policy_from_plain

HERE = Path(__file__).parent
TERSELY = [sys.executable, "-m", "tersely"]
CALIBRATION = {"stories-3m": (256, 512), "house-llama": (256, 256), "house-mixtral": (256, 256)}


def run(command: list[str]) -> tuple[Any, float, int]:
    """What a process printed as JSON, its processor seconds and its peak resident bytes."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        if os.waitstatus_to_exitcode(status):
            errors.seek(0)
            raise RuntimeError(errors.read().decode().strip().splitlines()[-1])
    # A peer may print of itself before the line that counts.
    found = json.loads(text if text.startswith(("{", "[")) else text.strip().splitlines()[-1])
    return found, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def toml(steps: list[dict[str, Any]], calibration: tuple[int, int] | None) -> str:
    lines = ["seed = 0"]
    if calibration:
        lines += ["[calibration]", f"samples = {calibration[0]}", f"context = {calibration[1]}"]
    for each in steps:
        lines.append("[cache]" if "cache" in each else "[[steps]]")
        lines += [f"{'method' if key == 'cache' else key} = {json.dumps(value)}" for key, value in each.items()]
    return "\n".join(lines) + "\n"


def data_of(model: str, assets: Path, work: Path) -> tuple[str, list[str]]:
    """Calibration text, and the arguments that evaluate."""
    if model == "stories-3m":
        text = assets / "data" / "tinystories" / "sample.txt"
        return f"{text}[:256]", ["--text", f"{text}[-200:]", "--context", "512"]
    books = assets / "data" / "books"
    part = work / "books.txt"
    part.write_text((books / "train.txt").read_text("utf-8")[:300_000], "utf-8")
    return str(part), ["--text", str(books / "valid.txt"), "--context", "257", "--samples", "200"]


def halved(source: Path, out: Path) -> Path:
    """The same checkpoint in float16."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    for path in (out, *out.iterdir()):
        path.chmod(path.stat().st_mode | 0o200)
    for file in source.glob("*.safetensors"):
        save_file({name: tensor.half() for name, tensor in load_file(file).items()}, out / file.name)
    config = json.loads((out / "config.json").read_text("utf-8"))
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float16"}), "utf-8")
    return out


def compressed(
    source: Path, out: Path, steps: list[dict[str, Any]], calibration: tuple[int, int], text: str, work: Path
) -> tuple[Any, float, int]:
    """Compress by the command line: its report, processor seconds and peak memory."""
    shutil.rmtree(out, ignore_errors=True)
    recipe = work / "recipe.toml"
    command = [*TERSELY, "compress", str(source), str(out), "--recipe", str(recipe), "--json"]
    recipe.write_text(toml(steps, calibration), "utf-8")
    try:
        return run([*command, "--calibration", text])
    except RuntimeError as error:
        if "no effect" not in str(error):
            raise
    # A recipe that measures nothing may not say on how much.
    recipe.write_text(toml(steps, None), "utf-8")
    return run(command)


def measured(model: str, name: str, steps: list[dict[str, Any]], assets: Path, work: Path) -> dict[str, Any]:
    parent, out = assets / "models" / model, work / "out"
    source = halved(parent, work / "half") if name.endswith(HALF) else parent
    text, evaluate = data_of(model, assets, work)
    report, seconds, peak = compressed(source, out, steps, CALIBRATION[model], text, work)
    facts, _, _ = run([*TERSELY, "evaluate", str(out), "--against", str(parent), *evaluate, "--no-store", "--json"])
    rows = report["rows"]
    found = facts["text"]
    apart = found["divergence"]
    return {
        "model": model,
        "name": name,
        "system": "tersely",
        "steps": steps,
        "format": report["format"],
        "bits_per_weight": 8 * sum(r["bytes_after"] for r in rows) / sum(r["parameters"] for r in rows),
        "bytes": sum(r["bytes_after"] for r in rows),
        "cache_bits": cache_bits(parent, steps),
        "loss": found["loss"],
        "kl": apart["kl"],
        "top1": apart["top1_agreement"],
        "cpu_seconds": round(seconds, 1),
        "peak_memory": peak,
        "notes": report["notes"],
    }


def cache_bits(model: Path, steps: list[dict[str, Any]], tokens: int = 512) -> float:
    """Of a number among the keys and values of so many tokens; 16 where nothing is said."""
    said = next((each for each in steps if "cache" in each), None)
    if said is None:
        return 16.0
    policy = policy_from_plain({"method" if key == "cache" else key: value for key, value in said.items()})
    config = json.loads((model / "config.json").read_text("utf-8"))
    channels: int = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 8 * policy.nbytes(1, channels, channels, tokens, 2) / (2 * channels * tokens)


def measured_peer(
    model: str, name: str, system: str, python: Path, driver: str, arguments: str, assets: Path, work: Path
) -> dict[str, Any]:
    """A peer's row. Weights that it left in float32 are evaluated as ours are; where it rounds inputs too, its own
    process measures the loss, and there is no interval."""
    source, out = assets / "models" / model, work / "out"
    stories = model == "stories-3m"
    text, evaluate = data_of(model, assets, work)
    own = text.removesuffix("[:256]")
    whole = "--samples 256 --context 512" if stories else "--samples 256 --context 256 --windows"
    command = [str(python), str(HERE / "peers" / driver), str(source), str(out), "--text", own]
    command += arguments.format(sequences=whole).split()
    if stories:
        # The documents that are evaluated must not be seen.
        command[command.index("--text") + 1] = str(first_stories(Path(own), 256, work))
    elif "--windows" not in command:
        command.append("--windows")
    inputs = re.search(r"--scheme w\d+a(?!16)", arguments) is not None
    if inputs:
        content, context = read_text(evaluate[1]), int(evaluate[3])
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
        chosen = sequences(content, tokenizer, context=context, samples=200, purpose="the evaluation", at_most=True)
        command += ["--evaluate", str(work / "ids.json")]
        (work / "ids.json").write_text(json.dumps([ids.tolist() for ids in chosen.ids]), "utf-8")
    record, _, _ = run(command)
    if inputs:
        facts: dict[str, Any] = {"loss": {"value": record["loss"]}, "kl": {"value": record["kl"]}}
    else:
        found, _, _ = run(
            [*TERSELY, "evaluate", str(out / "dense"), "--against", str(source), *evaluate, "--no-store", "--json"]
        )
        apart = found["text"]["divergence"]
        facts = {"loss": found["text"]["loss"], "kl": apart["kl"], "top1": apart["top1_agreement"]}
    return {
        "model": model,
        "name": name,
        "system": system,
        "version": record["version"],
        # All of them load the model in float32; kept in 16 bits, as the house models are, their scales would be too.
        "bits_per_weight": record.get("bits_per_weight" if stories else "bits_per_weight_half_scales"),
        **facts,
        "cpu_seconds": round(record["cpu_seconds"], 1),
        "peak_memory": record["peak_rss_bytes"],
        "settings": {k: v for k, v in record["settings"].items() if k not in ("model", "out", "text", "evaluate")},
    }


def first_stories(text: Path, count: int, work: Path) -> Path:
    end = "<|endoftext|>"
    out = work / "stories.txt"
    out.write_text(end.join(text.read_text("utf-8").split(end)[:count]), "utf-8")
    return out


def write(out: Path, rows: list[dict[str, Any]]) -> None:
    where = dataclasses.asdict(setting("cpu", packages=["compressed-tensors"]))
    out.write_text(json.dumps({"date": str(date.today()), "setting": where, "rows": rows}, indent=1) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(CALIBRATION))
    parser.add_argument("--assets", type=Path, default=Path("../shared"))
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="rows whose name begins so")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="TOOL=PYTHON",
        help=f"run a peer's rows with the Python of its environment ({', '.join(PEERS)}); ours are then left out",
    )
    options = parser.parse_args()
    assets = options.assets.absolute()
    out = HERE / "results" / f"{date.today()}-quantization.json"
    jobs: list[tuple[str, str, str, Callable[[Path], dict[str, Any]]]] = []
    for model in options.models:
        for said in options.peer:
            system, _, python = said.partition("=")
            driver, own = PEERS[system]
            jobs += [
                (model, system, name, partial(measured_peer, model, name, system, python, driver, arguments, assets))
                for name, arguments in own.items()
            ]
        if not options.peer:
            jobs += [
                (model, "tersely", name, partial(measured, model, name, steps, assets))
                for name, steps in recipes().items()
            ]
    for model, system, name, job in jobs:
        if options.only and not any(name.startswith(each) for each in options.only):
            continue
        with tempfile.TemporaryDirectory() as work:
            try:
                row = job(Path(work))
            except (RuntimeError, ValueError, IndexError) as error:
                print(f"{model}, {system} {name}: {error}", file=sys.stderr)
                continue
        print(f"{model} {table([row]).splitlines()[-1]}", flush=True)
        # Read again: another run may have written since.
        kept = json.loads(out.read_text("utf-8"))["rows"] if out.exists() else []
        rows = {(each["model"], each["system"], each["name"]): each for each in kept}
        rows[model, system, name] = row
        write(out, list(rows.values()))


if __name__ == "__main__":
    main()
