"""The evaluation itself: does it agree with others, and what does it cost?

    python benchmarks/bench_evaluation.py [loss] [time] [memory] [llama] --assets ../shared
        --llama-perplexity PATH --gguf BASE.gguf COMPRESSED.gguf

Without parts, all run. `llama` needs llama-cpp-python, llama.cpp's own llama-perplexity, and house-llama as two GGUF
files; where one is missing it is left out by name. Results are added to benchmarks/results/DATE-evaluation.json.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tersely.calibrate import micro_batches, read_text, sequences
from tersely.evaluation import divergence, text_result
from tersely.evaluation.distributions import compare, workspace
from tersely.evaluation.divergence import measure_text
from tersely.runtime import Loaded, load_model, load_tokenizer

HERE = Path(__file__).parent
MODELS = {
    "stories-3m": ("data/tinystories/sample.txt[-200:]", 512, None),
    "house-llama": ("data/books/valid.txt", 256, 200),
    "house-qwen3": ("data/books/valid.txt", 256, 200),
    "house-mixtral": ("data/books/valid.txt", 256, 200),
    "house-gpt2": ("data/books/valid.txt", 256, 200),
}
TEXT_OF_RANDOM = "data/books/valid.txt"
MEMORY = """
import sys
from pathlib import Path
from tersely.calibrate import read_text
from tersely.evaluation.distributions import compare, workspace
from tersely.evaluation.divergence import measure_text
from tersely.runtime import Loaded, load_model, load_tokenizer
path, text, context, samples, tokens = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:6])
models = [Loaded(path.name, load_model(path), load_tokenizer(path), "cpu") for _ in range(2)]
def peak():
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
before = peak()
found = measure_text(models, read_text(text), "text", context=context, samples=samples, tokens_per_batch=tokens)
print(found.result.tokens, before, peak())
"""


def loaded(path: Path, noise: float = 0.0) -> Loaded:
    """A model, or a copy with some noise in every weight, in float32."""
    model: Any = load_model(path, dtype=torch.float32)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters() if noise else ():
            parameter += noise * parameter.abs().mean() * torch.randn(parameter.shape, generator=draw)
    return Loaded(path.name, model, load_tokenizer(path), "cpu")


def loss(assets: Path) -> list[dict[str, Any]]:
    """Our loss beside transformers' own (its `labels`), sequence by sequence."""
    rows = []
    for name, (text, context, samples) in MODELS.items():
        model, content = loaded(assets / "models" / name), read_text(f"{assets}/{text}")
        found = measure_text([model], content, name, context=context, samples=samples).result
        data = sequences(content, model.tokenizer, context=context, samples=samples)
        total = 0.0
        with torch.inference_mode():
            for ids_L in data.ids:
                given = ids_L[None]
                total += float(model.network(input_ids=given, labels=given, use_cache=False).loss) * (len(ids_L) - 1)
        plain = total / found.tokens
        rows.append({"model": name, "ours": found.loss.value, "transformers": plain, "tokens": found.tokens})
        print(f"{name}: {found.loss.value:.7f}, transformers {plain:.7f}, apart {abs(found.loss.value - plain):.1e}")
    return rows


def timed(assets: Path, only: str | None) -> list[dict[str, Any]]:
    """Evaluating a model against another, beside two plain forwards over the same micro-batches, in turns."""
    rows = []
    for name, (text, context, samples) in [*MODELS.items(), ("random-200m", (TEXT_OF_RANDOM, 512, 4))]:
        if only not in (None, name):
            continue
        if name in MODELS:
            first, base = (loaded(assets / "models" / name, noise) for noise in (0.05, 0.0))
        else:
            first, base = random_models(load_tokenizer(assets / "models" / "house-llama"))
        models = [first, replace(base, tokenizer=first.tokenizer)]
        content = read_text(f"{assets}/{text}")[: None if samples is None else 6 * context * samples]
        data = sequences(content, first.tokenizer, context=context, samples=samples)
        batches = micro_batches(data, tokens=4096, pad=True)
        pairs = []
        for _ in range(7):
            begin = time.perf_counter()
            with torch.inference_mode():
                for batch in batches:
                    for model in models:
                        model.network(input_ids=batch.ids_BL, use_cache=False)
            middle = time.perf_counter()
            measure_text(models, content, name, context=context, samples=samples)
            pairs.append((middle - begin, time.perf_counter() - middle))
        ratios = [ours / plain for plain, ours in pairs]
        row = {
            "model": name,
            "vocabulary": models[0].network.config.vocab_size,
            "parameters": sum(p.numel() for p in models[0].network.parameters()),
            "tokens": data.tokens,
            "two forwards": statistics.median(plain for plain, _ in pairs),
            "evaluation": statistics.median(ours for _, ours in pairs),
            "ratio": statistics.median(ratios),
            "ratios": [round(r, 3) for r in ratios],
        }
        rows.append(row)
        print(f"{name}: {row['ratio']:.3f} times two forwards ({min(ratios):.3f} to {max(ratios):.3f})", flush=True)
    return rows


def random_models(tokenizer: Any) -> list[Loaded]:
    """Two models of random weights in the shape of a small real one: what counts is the time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=1024,
    )
    made: Any = LlamaForCausalLM
    return [Loaded(f"random {seed}", made(config).eval(), tokenizer, "cpu") for seed in range(2)]


def memory(assets: Path) -> list[dict[str, Any]]:
    """Peak memory above the loaded models, for more text and for larger micro-batches."""
    path, rows = assets / "models" / "house-llama", []
    # Of a length at which the text is tokenized as a whole, however few windows of it are taken.
    text = Path(tempfile.gettempdir(), "tersely-bench-memory.txt")
    text.write_text(read_text(f"{assets}/data/books/valid.txt")[:1_500_000], "utf-8")
    for samples, tokens in ((50, 4096), (400, 4096), (1200, 4096), (50, 1024), (400, 16384)):
        command = [sys.executable, "-c", MEMORY, str(path), str(text), "256", str(samples), str(tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        seen, before, peak = map(int, done)
        rows.append({"predicted": seen, "micro-batch": tokens, "above the models": peak - before})
        print(f"{seen} tokens in micro-batches of {tokens}: {(peak - before) / 2**20:.0f} MiB above the models")
    return rows


def llama(assets: Path, program: Path, base: Path, compressed: Path) -> dict[str, Any]:
    """KL and agreement of llama.cpp's own tool, and ours on the logits that llama.cpp gives for the same chunks."""
    from llama_cpp import Llama

    context = 512
    with tempfile.TemporaryDirectory() as work:
        text = Path(work, "text.txt")
        text.write_text(read_text(f"{assets}/data/books/valid.txt")[:60_000], "utf-8")
        # The same arithmetic on both sides: a float32 cache, attention without its fused form.
        common = ["-f", str(text), "-c", str(context), "-b", str(context), "-fa", "off", "-ctk", "f32", "-ctv", "f32"]
        common += ["--kl-divergence-base", f"{work}/base.dat"]
        environment = {**os.environ, "LD_LIBRARY_PATH": str(program.parent)}
        settings: dict[str, Any] = {"capture_output": True, "text": True, "check": True, "env": environment}
        subprocess.run([str(program), "-m", str(base), *common], **settings)
        done = subprocess.run([str(program), "-m", str(compressed), *common, "--kl-divergence"], **settings)
        theirs = {
            "kl": float(search(r"Mean\s+KLD:\s+([\d.e-]+)", done.stdout + done.stderr)),
            "kl stderr": float(search(r"Mean\s+KLD:\s+[\d.e-]+\s+.\s+([\d.e-]+)", done.stdout + done.stderr)),
            "99 %": float(search(r"99\.0%\s+KLD:\s+([\d.e-]+)", done.stdout + done.stderr)),
            "same top": float(search(r"Same top p:\s+([\d.]+)", done.stdout + done.stderr)) / 100,
            "difference": float(search(r"Mean ln\(PPL\(Q\)/PPL\(base\)\)\s*:\s*([\d.e-]+)", done.stdout + done.stderr)),
        }
        engines = [
            Llama(str(path), n_ctx=context, n_batch=context, logits_all=True, verbose=False, type_k=0, type_v=0)
            for path in (compressed, base)
        ]
        begins = engines[0].metadata.get("tokenizer.ggml.add_bos_token", "false") == "true"
        ids = engines[0].tokenize(text.read_bytes(), add_bos=begins)
        facts = []
        for first in range(0, len(ids) - context + 1, context):
            chunk = ids[first : first + context]
            rows, targets = [], torch.tensor(chunk[context // 2 + 1 :])
            for engine in engines:
                engine.reset()
                engine.eval([engine.token_bos() if begins else chunk[0], *chunk[1:]])
                rows.append(torch.tensor(engine.scores[context // 2 : context - 1]).float())
            space = workspace(rows[0].shape[1], rows[0].device, 2)
            facts.append(divergence._facts(list(compare(rows, [targets, targets], [None, None], space))))
        facts_TF = torch.cat(facts).double()
    column = {name: facts_TF[:, place] for place, name in enumerate(text_result.FACTS)}
    ours = {
        "kl": float(column["kl"].mean()),
        "99 %": float(column["kl"].quantile(0.99)),
        "same top": float(column["top1"].mean()),
        "difference": float((column["loss"] - column["base_loss"]).mean()),
    }
    print(f"llama.cpp: {theirs}\nours:      {ours}\non {len(facts_TF)} tokens")
    return {"llama.cpp": theirs, "ours": ours, "tokens": len(facts_TF)}


def search(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise SystemExit(f"llama-perplexity printed nothing like {pattern}:\n{text[-3000:]}")
    return found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="loss, time, memory, llama (default: all)")
    parser.add_argument("--assets", type=Path, default=Path("../shared"))
    parser.add_argument("--only", help="time: this model alone; the others' rows of the day are kept")
    parser.add_argument("--llama-perplexity", type=Path)
    parser.add_argument("--gguf", type=Path, nargs=2, metavar=("BASE", "COMPRESSED"))
    options = parser.parse_args()
    parts = options.parts or ["loss", "time", "memory", "llama"]
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    result: dict[str, Any] = {
        "hardware": f"{cpu.partition(': ')[2] or platform.processor()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    file = HERE / "results" / f"{date.today()}-evaluation.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    for part, measure in (("loss", loss), ("memory", memory)):
        if part in parts:
            result[part] = measure(options.assets.resolve())
    if "time" in parts:
        rows = timed(options.assets.resolve(), options.only)
        result["time"] = [r for r in before.get("time", []) if r["model"] not in {n["model"] for n in rows}] + rows
    if "llama" in parts:
        if options.llama_perplexity and options.gguf:
            result["llama.cpp"] = llama(options.assets.resolve(), options.llama_perplexity.resolve(), *options.gguf)
        else:
            print("llama: left out, give --llama-perplexity and --gguf")
    file.write_text(json.dumps({**before, **result}, indent=1) + "\n")
    print(f"wrote {file.name}")


if __name__ == "__main__":
    main()
