"""Show the newest results of bench_trim.py, bench_transplant.py and bench_tokenizers.py: docs/results-vocabulary.md.

python benchmarks/show_vocabulary.py
"""

from __future__ import annotations

import json
import math
from typing import Any

from show_results import HERE

INTRODUCTION = """\
# Results: vocabularies

Made by `benchmarks/show_vocabulary.py` of `benchmarks/results/{trim}`, `{transplant}` and `{tokenizers}` ({hardware}).

## Trimming to one language

`benchmarks/bench_trim.py`: the first half of an XQuAD language (about 15,000 words) is the corpus, the second half is
held out. All tokens of the corpus stay, with what they need, so it is cut as before in every row. Bytes are those that
a model with this tokenizer saves in 16 bits. A corpus this small does not have all tokens of a language: on the
held-out half there are more tokens to a word than before; a larger corpus keeps more rows, and less of this is lost.
"""
LARGE = """
A checkpoint of the shapes of a 1.2B model ({size:.2f} GB, 128,256 rows, tied) with Llama 3's tokenizer, trimmed to
32,000 rows by the command line, in turns with a plain copy of its files: {trim} s of wall time where the copy took
{copy} s ({times:.1f} times as long; {cpu} s of processor time, of which Python and the tokenizer take two thirds),
{peak:.2f} GB at most.
"""
MOVES = """
## Rows for new tokens

`benchmarks/bench_transplant.py`: nats a byte of held-out text right after the move, and after {steps} steps of 256
tokens on text of the same kind (all parameters, AdamW, two orders of the data). House-llama moves to a BPE learnt from
simple stories, and to one of books and five other languages; a smaller model moves to house-llama's tokenizer, with
house-llama itself as the donor that `omp` needs.
"""
TRAINED = """
## Tokenizers of one text

`benchmarks/bench_tokenizers.py`: trained on 16 MB of books; bytes a token (more is better) of books that were not seen,
and of encyclopedia text, which is another domain. Processor seconds of training.
"""
PAPERS = """
SuperBPE's authors report up to 33 % fewer tokens than BPE at 200,000 tokens, on text enough for that many.
"""


def main() -> None:
    names = {kind: max((HERE / "results").glob(f"*-{kind}.json")).name for kind in ("trim", "transplant", "tokenizers")}
    found = {kind: json.loads((HERE / "results" / name).read_text("utf-8")) for kind, name in names.items()}
    hardware = found["trim"]["setting"]["hardware"]
    parts = [INTRODUCTION.format(**names, hardware=hardware), *trims(found["trim"])]
    parts += [MOVES.format(steps=found["transplant"]["rows"][0]["steps"]), *moves(found["transplant"]["rows"])]
    parts += [TRAINED, *tokenizers(found["tokenizers"]["rows"]), PAPERS]
    (HERE.parent / "docs" / "results-vocabulary.md").write_text("\n".join(parts), "utf-8")


def trims(found: dict[str, Any]) -> list[str]:
    lines = []
    for name in dict.fromkeys(row["tokenizer"] for row in found["languages"]):
        rows = [row for row in found["languages"] if row["tokenizer"] == name]
        lines += [f"### {name}: {rows[0]['rows_before']:,} rows ({rows[0]['model']})", ""]
        lines += [
            "| language | rows | bytes saved | tokens a word, held out: before | after |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['language']} | {row['rows_after']:,} | {row['bytes_saved'] / 1e6:,.0f} MB | "
            f"{row['tokens_per_word_before']:.3f} | {row['tokens_per_word_after']:.3f} |"
            for row in rows
        ]
        lines.append("")
    own = found["large"]
    copy, trim = (sorted(own[key])[len(own[key]) // 2] for key in ("copy_seconds", "trim_seconds"))
    lines.append(
        LARGE.format(
            size=own["bytes"] / 1e9,
            trim=trim,
            copy=copy,
            times=trim / copy,
            cpu=sorted(own["cpu_seconds"])[len(own["cpu_seconds"]) // 2],
            peak=max(own["peak_bytes"]) / 1e9,
        )
    )
    return lines


def moves(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for move in dict.fromkeys(row["move"] for row in rows):
        own = sorted(
            (r for r in rows if r["move"] == move),
            key=lambda r: (r["name"] != "its own tokenizer", mean(r["loss_trained"])),
        )
        lines += [f"### {move}", "", "| rows by | right after | trained |", "|---|---|---|"]
        lines += [f"| {row['name']} | {cell(row['loss'])} | {cell(row['loss_trained'])} |" for row in own]
        lines.append("")
    return lines


def tokenizers(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for size in sorted({row["size"] for row in rows}):
        own = sorted((row for row in rows if row["size"] == size), key=lambda row: -density(row, "books"))
        bpe = next((row for row in own if row["method"] == "bpe"), None)
        lines += [f"### {size:,} tokens", ""]
        lines += [
            "| method | books | tokens beside BPE | encyclopedia | Renyi | CPU s | peak MB |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in own:
            beside = "" if bpe is None else f"{density(bpe, 'books') / density(row, 'books') - 1:+.1%}"
            lines.append(
                f"| {row['method']} | {density(row, 'books'):.3f} | {beside} | {density(row, 'wikitext-2'):.3f} | "
                f"{row['texts']['books']['renyi_efficiency']:.3f} | {row['cpu_seconds']:.0f} | "
                f"{row['peak_memory'] / 1e6:.0f} |"
            )
        lines.append("")
    return lines


def density(row: dict[str, Any], text: str) -> float:
    """Bytes a token."""
    return float(row["texts"][text]["bytes_per_token"])


def cell(values: list[float]) -> str:
    return f"{mean(values):.4f}" if values else ""


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.inf


if __name__ == "__main__":
    main()
