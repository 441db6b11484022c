"""Every quantization method on really trained models, beside the peers, at counted bytes.

    python benchmarks/bench_quantization.py [stories-3m] [house-llama] [house-mixtral] --assets ../shared
        [--only NAME ...] [--peers peers.json]

A row is a recipe, compressed and evaluated by the command line in processes of their own: loss with its interval, KL
and top-1 agreement with the source, bytes of the encoded weights counted in full (codes, scales, zeros, codebooks,
indices, low-rank factors), seconds of processor time and peak memory of the job. `--peers` adds the rows that the
drivers in peers/ printed (one JSON list), measured under the same protocol. Results are merged by row into
benchmarks/results/DATE-quantization.json, so that a run can be made in parts.

Protocols: stories-3m calibrates on the first 256 stories and is evaluated on the last 200, each alone, 512 tokens at
most; the house models calibrate on 256 windows of 256 tokens from the first 300,000 characters of books/train.txt and
are evaluated on 200 windows of 257 tokens, drawn evenly from books/valid.txt. Peers' rows of the house models are the
weights that they left, in float32, evaluated by the same command.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tersely.evaluation.subject import setting
from tersely.runtime.policy import policy_from_plain

HERE = Path(__file__).parent
TERSELY = [sys.executable, "-m", "tersely"]
CALIBRATION = {"stories-3m": (256, 512), "house-llama": (256, 256), "house-mixtral": (256, 256)}


HALF = ", float16 source"
"""What ends the name of a row whose source is rounded to 16 bits first."""


def step(method: str, where: str = "linear", **settings: Any) -> dict[str, Any]:
    return {"where": where, "method": method, **settings}


def cache(method: str, **settings: Any) -> dict[str, Any]:
    """Not a step: how keys and values are kept."""
    return {"cache": method, **settings}


def recipes() -> dict[str, list[dict[str, Any]]]:
    """Name -> steps. Groups are of 64 inputs where the method has groups, as the peers' are."""
    smooth = step("smooth", "normed", alpha=0.5)
    whole = step("rtn", bits=8, group=64)
    rows: dict[str, list[dict[str, Any]]] = {}
    for bits in (4, 3, 2):
        rows |= {
            f"w{bits} rtn": [step("rtn", bits=bits, group=64)],
            f"w{bits} hqq": [step("hqq", bits=bits, group=64)],
            f"w{bits} gptq": [step("gptq", bits=bits, group=64)],
            f"w{bits} gptq, asymmetric": [step("gptq", bits=bits, group=64, symmetric=False)],
            f"w{bits} awq, gptq": [
                step("awq", "normed | mlp", bits=bits, group=64, symmetric=True, clip="mse"),
                step("gptq", bits=bits, group=64),
            ],
            f"w{bits} rotate, gptq": [step("rotate", "residual"), step("gptq", bits=bits, group=64)],
            f"w{bits} gptq, signround": [step("gptq", bits=bits, group=64), step("signround")],
        }
    # Much text of the parent, and bfloat16 products.
    text: dict[str, Any] = {"tokens": 1_200_000, "own_texts": 3000, "checks": 6, "autocast": True}
    for bits, rate in ((4, 1.5e-3), (3, 3e-3), (2, 8e-3)):
        distill = step("distill", rate=rate, value_rate=2e-3, norm_rate=1e-3, **text)
        rows[f"w{bits} gptq, distill"] = [step("gptq", bits=bits, group=64), distill]
        # Scales have the dtype of the source: with 16 bits they take as much as AutoRound's.
        rows[f"w{bits} gptq, distill{HALF}"] = [step("gptq", bits=bits, group=64, symmetric=bits > 2), distill]
    # Learned anew from where it ended, at half the rate.
    again = step("distill", rate=4e-3, value_rate=2e-3, norm_rate=1e-3, **text)
    rows[f"w2 gptq, distill twice{HALF}"] = [*rows[f"w2 gptq, distill{HALF}"], again]
    pv = step("pv", **text)
    aqlm = step("aqlm", codebooks=1, bits=8, group=4)
    for bits in (4, 3):
        rows |= {
            f"w{bits} squeezellm": [step("squeezellm", bits=bits)],
            f"w{bits} squeezellm, dense": [step("squeezellm", bits=bits, outliers=0.0, sensitive=0.0)],
            f"w{bits} lqer": [step("lqer", bits=bits, group=64, rank=16)],
            f"w{bits} aser": [step("aser", bits=bits, group=64, rank=16, outliers=8)],
            f"w{bits} shiftaddllm": [step("shiftaddllm", bits=bits)],
            f"w{bits} bipolar": [step("bipolar", bits=bits, group=64)],
        }
    return rows | {
        "w4 awq, rtn": [
            step("awq", "normed | mlp", bits=4, group=64, symmetric=False, clip="mse"),
            step("rtn", bits=4, group=64, symmetric=False, clip="mse"),
        ],
        "w4 finequant": [step("finequant")],
        "w4 nf4": [step("nf4")],
        "w4 mxfp4": [step("mxfp4")],
        "w4 nvfp4": [step("nvfp4")],
        "w8 fp8": [step("fp8")],
        "w8 llm_int8": [step("llm_int8", activations="int8-outliers")],
        "w2 bipolar": [step("bipolar", bits=2, group=64)],
        "w2.5 shiftaddllm, allocated": [step("shiftaddllm", bits=3, average_bits=2.5)],
        "w2 aqlm 1x8 g4": [aqlm],
        "w2 aqlm 1x8 g4, pv": [aqlm, pv],
        "w2 gptq, asymmetric, pv": [step("gptq", bits=2, group=64, symmetric=False), pv],
        "ternary": [step("ternary")],
        "ternary, distill": [step("ternary"), step("distill", rate=8e-3, value_rate=5e-3, norm_rate=1e-3, **text)],
        "w8a8 rtn": [step("rtn", bits=8, group=0, activations="int8")],
        "w8a8 smooth, gptq": [smooth, step("gptq", bits=8, group=0, activations="int8")],
        "w8a8 fp8": [step("fp8", activations="fp8")],
        "w4a8 gptq": [step("gptq", bits=4, group=0, activations="int8")],
        "w4a8 smooth, gptq": [smooth, step("gptq", bits=4, group=0, activations="int8")],
        "w4a8 aser 64": [
            step("aser_smooth", "normed | mlp | attn"),
            step("aser", bits=4, activations="int8"),
        ],
        # On widths of 192 to 768 a rank of 64 is a large branch; this one adds about 3 %, as 64 does on 4096.
        "w4a8 aser 3": [
            step("aser_smooth", "normed | mlp | attn", outliers=2),
            step("aser", bits=4, rank=3, outliers=2, activations="int8"),
        ],
        "w4a8 aser 64, in turns": [
            step("aser_smooth", "normed | mlp | attn"),
            step("aser", bits=4, passes=8, activations="int8"),
        ],
        "w4a8 aser 3, in turns": [
            step("aser_smooth", "normed | mlp | attn", outliers=2),
            step("aser", bits=4, rank=3, outliers=2, passes=8, activations="int8"),
        ],
        "w4a8 aser 64, nearest": [
            step("aser_smooth", "normed | mlp | attn"),
            step("aser", bits=4, rounding="nearest", activations="int8"),
        ],
        "w4a8 lqer 64": [step("lqer", bits=4, group=0, rank=64, activations="int8")],
        "w4a4 gptq": [step("gptq", bits=4, group=0, activations="int4")],
        "w4a4 quarot": [
            step("rotate", "residual"),
            step("gptq", bits=4, group=0, activations="int4"),
            step("gptq", "*.o_proj | *.down_proj", bits=4, group=0, activations="int4", hadamard=64),
        ],
        "cache none": [whole],
        "cache fp8": [whole, cache("fp8")],
        **{f"cache kivi {bits}": [whole, cache("kivi", bits=bits, residual=32)] for bits in (4, 2)},
        "cache kivi 2, rotated": [whole, cache("kivi", bits=2, residual=32, rotate=True)],
        "w4a4 nvfp4": [step("nvfp4", activations="nvfp4")],
    }


def run(command: list[str]) -> tuple[dict[str, Any], float, int]:
    """What a process printed as JSON, its processor seconds and its peak resident bytes."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        if os.waitstatus_to_exitcode(status):
            errors.seek(0)
            raise RuntimeError(errors.read().decode().strip().splitlines()[-1])
    return json.loads(text), usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


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


def measured(model: str, name: str, steps: list[dict[str, Any]], assets: Path, work: Path) -> dict[str, Any]:
    parent, out = assets / "models" / model, work / "out"
    source = halved(parent, work / "half") if name.endswith(HALF) else parent
    text, evaluate = data_of(model, assets, work)
    shutil.rmtree(out, ignore_errors=True)
    recipe = work / "recipe.toml"
    # A recipe that measures nothing may not say on how much.
    for calibration in (CALIBRATION[model], None):
        recipe.write_text(toml(steps, calibration), "utf-8")
        command = [*TERSELY, "compress", str(source), str(out), "--recipe", str(recipe), "--json"]
        try:
            report, seconds, peak = run([*command, *(["--calibration", text] if calibration else [])])
            break
        except RuntimeError as error:
            if calibration is None or "no effect" not in str(error):
                raise
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


def presets() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The presets for the best quality, at the group of the peers."""
    for file in sorted((HERE.parent / "src" / "tersely" / "plan" / "presets").glob("*-best.toml")):
        steps = tomllib.loads(file.read_text("utf-8"))["steps"]
        yield file.stem, [{**each, **({"group": 64} if "group" in each else {})} for each in steps]


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | bits/weight | loss | KL | top-1 | CPU s | peak MB |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        loss, kl, top = row["loss"], row.get("kl") or {}, row.get("top1") or {}
        system = "" if row["system"] == "tersely" else f"{row['system']}: "
        cells = (
            f"{system}{row['name']}",
            f"{row['bits_per_weight']:.3f}" if row.get("bits_per_weight") else "",
            f"{loss['value']:.4f} ± {(loss['high'] - loss['low']) / 2:.4f}"
            if "high" in loss
            else f"{loss['value']:.4f}",
            f"{kl['value']:.4f}" if kl else "",
            f"{top['value']:.3f}" if top else "",
            f"{row['cpu_seconds']:.0f}" if row.get("cpu_seconds") else "",
            f"{row['peak_memory'] / 1e6:.0f}" if row.get("peak_memory") else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def peers(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of the peers' drivers, as ours."""
    for record in json.loads(path.read_text("utf-8")):
        if record.get("loss") is not None:
            yield {
                "model": record["model"],
                "name": f"{record['scheme']} {record['method']}",
                "system": record["peer"],
                "bits_per_weight": record.get("bits_per_weight"),
                "loss": {"value": record["loss"]},
                "kl": {"value": record["kl"]} if record.get("kl") is not None else None,
                "cpu_seconds": record.get("cpu_seconds"),
                "peak_memory": record.get("peak_rss_bytes"),
                "settings": record.get("settings"),
            }


def write(out: Path, rows: list[dict[str, Any]]) -> None:
    where = dataclasses.asdict(setting("cpu", packages=["compressed-tensors"]))
    out.write_text(json.dumps({"date": str(date.today()), "setting": where, "rows": rows}, indent=1) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(CALIBRATION))
    parser.add_argument("--assets", type=Path, default=Path("../shared"))
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="rows whose name begins so")
    parser.add_argument("--peers", type=Path)
    options = parser.parse_args()
    out = HERE / "results" / f"{date.today()}-quantization.json"
    kept = json.loads(out.read_text("utf-8")) if out.exists() else {"rows": []}
    rows = {(r["model"], r["system"], r["name"]): r for r in kept["rows"]}
    for row in peers(options.peers) if options.peers else ():
        rows[row["model"], row["system"], row["name"]] = row
        write(out, list(rows.values()))
    for model in options.models:
        for name, steps in [*recipes().items(), *presets()]:
            if options.only and not any(name.startswith(each) for each in options.only):
                continue
            with tempfile.TemporaryDirectory() as work:
                try:
                    row = measured(model, name, steps, options.assets.absolute(), Path(work))
                except RuntimeError as error:
                    print(f"{model}, {name}: {error}", file=sys.stderr)
                    continue
            rows[model, "tersely", name] = row
            print(table([row]).splitlines()[-1], flush=True)
            write(out, list(rows.values()))
    for model in options.models:
        print(f"\n{model}\n{table([r for r in rows.values() if r['model'] == model])}")


if __name__ == "__main__":
    main()
