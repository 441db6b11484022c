"""Trimming vocabularies: to single languages, for four tokenizers; and time and memory on a model with 128k rows.

    python -m benchmarks.bench_trim --assets ../shared [--large FOLDER]

Languages: the first half of each XQuAD language is the corpus, the second half is held out. All tokens that the corpus
has stay, with what they need; rows, bytes that models of these tokenizers save, and tokens per word on the second half,
before and after. `--large`: a checkpoint of make_checkpoint.py (1.2B, tied): it gets Llama 3's tokenizer and is trimmed
by the command line, in turns with a plain copy of its files. Results go to benchmarks/results/DATE-trim.json.
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
import time
from datetime import date
from pathlib import Path
from typing import Any

from tests.tiny import tiny
from tests.vocabularies import gpt2_json, tiktoken_json

from tersely.checkpoint import open_checkpoint
from tersely.evaluation.subject import setting
from tersely.methods.trim import Frequency
from tersely.plan.recipe import Trim
from tersely.vocabulary.counting import count_texts
from tersely.vocabulary.tokenizer import read_tokenizer
from tersely.vocabulary.trim import plan_trim, tokenizer_of

RESULTS = Path(__file__).parent / "results"
LANGUAGES = ("en", "de", "es", "vi", "tr", "ru", "el", "ar", "th", "zh")
# Name -> a model that has this tokenizer: bytes of one row of embedding and head.
MODELS = {
    "llama-2": ("Llama-2-7B", 2 * 2 * 4096),
    "gpt-2": ("GPT-2", 2 * 768),
    "gpt-neox": ("GPT-NeoX-20B", 2 * 2 * 6144),
    "llama-3": ("Llama-3-8B", 2 * 2 * 4096),
}
LLAMA_3 = ("<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{n}|>" for n in range(254)))
PAIRS = 3


def tokenizers(assets: Path) -> dict[str, str]:
    """Name -> tokenizer.json."""
    folder = assets / "data" / "tokenizers"
    return {
        "llama-2": (folder / "llama2-hf" / "tokenizer.json").read_text("utf-8"),
        "gpt-2": gpt2_json(folder / "gpt2" / "gpt2_vocab.json", folder / "gpt2" / "gpt2_merges.txt"),
        "gpt-neox": (folder / "gpt-neox-20b" / "20B_tokenizer.json").read_text("utf-8"),
        "llama-3": tiktoken_json(folder / "llama3" / "tokenizer.model", LLAMA_3),
    }


def halves(assets: Path, language: str) -> tuple[list[str], list[str]]:
    plain = json.loads((assets / "data" / "xquad" / f"xquad.{language}.json").read_text("utf-8"))
    texts = [paragraph["context"] for article in plain["data"] for paragraph in article["paragraphs"]]
    return texts[: len(texts) // 2], texts[len(texts) // 2 :]


def by_language(assets: Path, work: Path) -> list[dict[str, Any]]:
    rows = []
    for name, text in tokenizers(assets).items():
        folder = tiny("llama", work / name, vocab=rows_of(text))
        (folder / "tokenizer.json").write_text(text, "utf-8")
        checkpoint = open_checkpoint(folder)
        vocabulary = read_tokenizer(checkpoint)
        whole = tokenizer_of(vocabulary)
        for language in LANGUAGES:
            corpus, held_out = halves(assets, language)
            start = time.process_time()
            counted = count_texts(whole, corpus)
            plan = plan_trim(checkpoint, vocabulary, Trim("tokens", Frequency(), minimum_count=1, multiple=1), counted)
            seconds = time.process_time() - start
            small = type(whole).from_str(plan.trimmed.files["tokenizer.json"].decode())
            before, after = count_texts(whole, held_out), count_texts(small, held_out)
            alike = sum(
                whole.encode(t, add_special_tokens=False).tokens == small.encode(t, add_special_tokens=False).tokens
                for t in corpus
            )
            model, nbytes = MODELS[name]
            rows.append(
                {
                    "tokenizer": name,
                    "language": language,
                    "rows_before": len(vocabulary.ids),
                    "rows_after": plan.facts.rows_after,
                    "model": model,
                    "bytes_saved": (len(vocabulary.ids) - plan.facts.rows_after) * nbytes,
                    "corpus_alike": alike / len(corpus),
                    "tokens_per_word_before": before.tokens / before.words,
                    "tokens_per_word_after": after.tokens / after.words,
                    "tokens_per_byte_before": before.tokens / before.bytes,
                    "tokens_per_byte_after": after.tokens / after.bytes,
                    "cpu_seconds": round(seconds, 2),
                }
            )
            print(*rows[-1].values(), flush=True)
    return rows


def rows_of(text: str) -> int:
    from tokenizers import Tokenizer

    return max(Tokenizer.from_str(text).get_vocab(with_added_tokens=True).values()) + 1


def large(folder: Path, assets: Path, work: Path) -> dict[str, Any]:
    """Wall seconds of trims and of copies, in turns, and the peak memory of a trim."""
    source = work / "large"
    source.mkdir()
    for file in folder.iterdir():
        if "tokenizer" not in file.name:
            os.link(file, source / file.name)
    (source / "tokenizer.json").write_text(tokenizers(assets)["llama-3"], "utf-8")
    corpus = assets / "data" / "xquad" / "xquad.de.json"
    found: dict[str, Any] = {"trim_seconds": [], "copy_seconds": [], "peak_bytes": [], "cpu_seconds": []}
    for number in range(PAIRS):
        start = time.perf_counter()
        shutil.copytree(source, work / "copy")
        os.sync()
        found["copy_seconds"].append(round(time.perf_counter() - start, 2))
        shutil.rmtree(work / "copy")
        out = work / f"out-{number}"
        command = [sys.executable, "-m", "tersely", "vocab", "trim", str(source), str(out), "--corpus", str(corpus)]
        start = time.perf_counter()
        process = subprocess.Popen([*command, "--rows", "32000"], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        os.sync()
        assert os.waitstatus_to_exitcode(status) == 0
        found["trim_seconds"].append(round(time.perf_counter() - start, 2))
        found["peak_bytes"].append(usage.ru_maxrss * 1024)
        found["cpu_seconds"].append(round(usage.ru_utime + usage.ru_stime, 1))
        found["bytes"] = sum(file.stat().st_size for file in source.iterdir())
        shutil.rmtree(out)
    print(found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--assets", type=Path, default=Path("../shared"))
    parser.add_argument("--large", type=Path)
    options = parser.parse_args()
    file = RESULTS / f"{date.today():%Y-%m-%d}-trim.json"
    found = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    with tempfile.TemporaryDirectory(dir=options.large.parent if options.large else None) as work:
        if options.large:
            found["large"] = large(options.large, options.assets, Path(work))
        else:
            found["languages"] = by_language(options.assets, Path(work))
    found |= {"date": f"{date.today():%Y-%m-%d}", "setting": dataclasses.asdict(setting("cpu"))}
    file.write_text(json.dumps(found, indent=2, default=str) + "\n", "utf-8")


if __name__ == "__main__":
    main()
