"""The numbers of the main job: quality beside llm-compressor, time in pairs, memory, and a plain load.

    python benchmarks/bench_foundation.py [quality] [time] [memory] [copy] --assets ../shared --peer peer/bin/python

Without parts, all run. `--peer` is the Python of an environment with llm-compressor (peers/llm_compressor.py);
without it only our side is measured. Results are added to benchmarks/results/DATE-foundation.json and shown as tables.
Both sides see the same documents: the first 256 stories calibrate, the last 200 evaluate, 512 tokens at most.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TERSELY = [sys.executable, "-m", "tersely"]
PLAIN_LOSS = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
documents = [d.strip() for d in open(sys.argv[2]).read().split("<|endoftext|>") if d.strip()][-200:]
loss = count = 0
with torch.no_grad():
    for document in documents:
        ids = torch.tensor([tokenizer(document)["input_ids"][:512]])
        logits = model(ids).logits[0, :-1].double()
        loss += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")); count += ids.shape[1] - 1
print(json.dumps(loss / count))
"""


def run(command: list[str], **named: Any) -> dict[str, Any]:
    """Run a process; its wall seconds, peak resident bytes and last line of output that is JSON."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **named)
    output, errors = process.stdout, process.stderr
    assert output is not None
    assert errors is not None
    text, trouble = output.read(), errors.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{trouble[-3000:]}")
    wall = time.perf_counter() - start
    try:
        result = json.loads(text)
    except ValueError:
        result = json.loads(text.strip().splitlines()[-1]) if text.strip().endswith("}") else None
    return {"wall": wall, "peak": usage.ru_maxrss * 1024, "result": result}


def ours(model: Path, out: Path, recipe: str, *settings: str, calibration: str | None = None) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(f"{out}.partial", ignore_errors=True)
    sets = [part for setting in settings for part in ("--set", setting)]
    data = ["--calibration", calibration] if calibration else []
    return run([*TERSELY, "compress", str(model), str(out), "--recipe", recipe, *sets, *data, "--json"])


def peer(python: str, model: Path, out: Path, method: str, bits: int, text: Path) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    script = str(HERE / "peers" / "llm_compressor.py")
    options = ["--method", method, "--scheme", f"w{bits}a16", "--group", "64", "--text", str(text)]
    return run([python, script, str(model), str(out), *options], cwd=out.parent)


def weight_bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def quality(assets: Path, python: str | None, work: Path) -> list[dict[str, Any]]:
    """Loss, KL and agreement of stories-3m on the last 200 stories, and the same loss by plain transformers."""
    model, text = assets / "models" / "stories-3m", assets / "data" / "tinystories" / "sample.txt"
    folders = {"full precision": model}
    measured = ("group=64", "calibration.samples=256", "calibration.context=512")
    for bits in (4, 3):
        for name, recipe, settings in (
            ("RTN", f"w{bits}a16", ("group=64",)),
            ("RTN, clip search", f"w{bits}a16", ("group=64", "clip=mse")),
            ("GPTQ", f"w{bits}a16-gptq", measured),
            ("GPTQ, asymmetric", f"w{bits}a16-gptq", (*measured, "symmetric=false")),
        ):
            out = work / f"ours-{bits}-{name.replace(' ', '').replace(',', '-')}"
            ours(model, out, recipe, *settings, calibration=f"{text}[:256]" if "gptq" in recipe else None)
            folders[f"tersely {name}, {bits} bits"] = out
        for method in ("rtn", "gptq") if python else ():
            out = work / f"peer-{bits}-{method}"
            peer(str(python), model, out, method, bits, text)
            folders[f"llm-compressor {method.upper()}, {bits} bits"] = out / "native"
    rows = []
    for name, folder in folders.items():
        against = ["--against", str(model)] if folder != model else []
        command = [
            *TERSELY,
            "evaluate",
            str(folder),
            *against,
            "--text",
            f"{text}[-200:]",
            "--context",
            "512",
            "--no-store",
            "--json",
        ]
        facts = run(command)["result"]
        plain = run([sys.executable, "-c", PLAIN_LOSS, str(folder), str(text)])["result"]
        found = facts["text"]
        row = {"name": name, "bytes": weight_bytes(folder), "loss": found["loss"], "plain_loss": plain}
        apart = found["divergence"] or {}
        rows.append(row | {k: apart.get(k) for k in ("kl", "top1_agreement", "loss_difference")})
        print(json.dumps(row), flush=True)
    return rows


def timing(assets: Path, python: str | None, work: Path, pairs: int) -> dict[str, Any]:
    """The GPTQ job of 4 bits, ours and the peer's in turn; ratios are taken pair by pair."""
    model, text = assets / "models" / "stories-3m", assets / "data" / "tinystories" / "sample.txt"
    settings = ("group=64", "calibration.samples=256", "calibration.context=512")
    rows = []
    for number in range(pairs + 1):
        a = ours(model, work / "time-ours", "w4a16-gptq", *settings, calibration=f"{text}[:256]")
        row = {"ours_wall": a["wall"], "ours_job": a["result"]["seconds"], "ours_peak": a["peak"]}
        if python:
            b = peer(python, model, work / "time-peer", "gptq", 4, text)
            row |= {"peer_wall": b["wall"], "peer_job": b["result"]["seconds"], "peer_peak": b["peak"]}
            row |= {"wall_ratio": b["wall"] / a["wall"], "job_ratio": b["result"]["seconds"] / a["result"]["seconds"]}
        print(json.dumps(row), flush=True)
        if number:  # the first pair warms the caches
            rows.append(row)
    return {"pairs": rows, "median": {k: statistics.median(r[k] for r in rows) for k in rows[0]}}


def large(work: Path, blocks: int) -> Path:
    model = work / f"large-{blocks}"
    if not model.exists():
        run([sys.executable, str(HERE / "make_checkpoint.py"), str(model), "--blocks", str(blocks)])
    return model


def memory(assets: Path, work: Path) -> list[dict[str, Any]]:
    """Peak memory of GPTQ, W4 group 128, 16 x 512 tokens, on the shapes of a 1.2B model and twice its blocks."""
    rows = []
    for blocks in (16, 32):
        model, out = large(work, blocks), work / "memory-out"
        text = str(assets / "data" / "books" / "train.txt")
        settings = ("calibration.samples=16", "calibration.context=512")
        plan = [
            *TERSELY,
            "compress",
            str(model),
            str(out),
            "--recipe",
            "w4a16-gptq",
            "--calibration",
            text,
            "--dry-run",
            "--json",
        ]
        expected = run([*plan, *(part for s in settings for part in ("--set", s))])["result"]
        facts = ours(model, out, "w4a16-gptq", *settings, calibration=text)
        row = {"blocks": blocks, "peak": facts["peak"], "wall": facts["wall"], "bytes": weight_bytes(out)}
        rows.append(row | {"expected_peak": expected["memory"], "expected_seconds": expected["seconds"]})
        print(json.dumps(rows[-1]), flush=True)
        shutil.rmtree(out)
    return rows


def copying(work: Path, pairs: int) -> dict[str, Any]:
    """RTN, file to file, beside a copy of the same file (durable, as ours is), in turn."""
    model, out, copy = large(work, 16), work / "copy-out", work / "copy"
    rows = []
    for number in range(pairs + 1):
        copy.unlink(missing_ok=True)
        start = time.perf_counter()
        shutil.copyfile(model / "model.safetensors", copy)
        with copy.open("rb+") as file:
            os.fsync(file.fileno())
        seconds = time.perf_counter() - start
        copy.unlink()
        facts = ours(model, out, "w4a16")
        row = {"copy": seconds, "wall": facts["wall"], "job": facts["result"]["seconds"], "peak": facts["peak"]}
        row |= {"wall_ratio": row["wall"] / seconds, "job_ratio": row["job"] / seconds}
        print(json.dumps(row), flush=True)
        if number:
            rows.append(row)
    shutil.rmtree(out)
    return {"pairs": rows, "median": {k: statistics.median(r[k] for r in rows) for k in rows[0]}}


def processor() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="quality, time, memory, copy (default: all)")
    parser.add_argument("--assets", type=Path, default=HERE.parent.parent / "shared")
    parser.add_argument("--peer", help="the Python that has llm-compressor")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument(
        "--work", type=Path, help="where large checkpoints are made and kept (default: a temporary folder)"
    )
    options = parser.parse_args()
    if not options.assets.exists():
        raise SystemExit(f"{options.assets} is missing: pass --assets PATH")
    parts = options.parts or ["quality", "time", "memory", "copy"]
    file = HERE / "results" / f"{date.today()}-foundation.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    packages = {p: version(p) for p in ("torch", "transformers", "compressed-tensors")}
    results["hardware"] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PHYS_PAGES") * 4096,
    }
    results["software"] = {"python": platform.python_version(), **packages}
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if "quality" in parts:
            results["quality"] = quality(options.assets, options.peer, work)
        if "time" in parts:
            results["time"] = timing(options.assets, options.peer, work, options.pairs)
        if "memory" in parts:
            results["memory"] = memory(options.assets, work)
        if "copy" in parts:
            results["copy"] = copying(work, options.pairs)
        file.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
