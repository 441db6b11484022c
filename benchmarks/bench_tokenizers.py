"""Tokenizers of one text at equal sizes: BPE, SuperBPE, Unigram, CompoundPiece and LiB.

    python benchmarks/bench_tokenizers.py --assets ../shared [--size N ...] [--only NAME ...]

Each is trained on books/train.txt (16 MB) in a process of its own, on one thread, whose processor time counts, and
measured on texts that it has not seen: books/valid.txt, in the domain, and the validation text of wikitext-2, out of
it. Results are merged by name and size into benchmarks/results/DATE-tokenizers.json. CompoundPiece's own least count
of a word is meant for texts of the size of the web; here it is 2. Its `split` is bytes per token where words are split
into parts at run time too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from bench_quantization import HERE, run

from tersely.errors import TerselyError
from tersely.evaluation.subject import setting
from tersely.results.plain import to_plain
from tersely.vocabulary.corpus import open_texts
from tersely.vocabulary.counting import count_texts
from tersely.vocabulary.fertility import measure
from tersely.vocabulary.training import CompoundPiece, SuperBPE, Training, encode_parts, pipeline
from tersely.vocabulary.training.bpe import BPE, words_of
from tersely.vocabulary.training.compound import known_words
from tersely.vocabulary.training.lib import LiB
from tersely.vocabulary.training.unigram import Unigram

SIZES = (4000, 8000, 16000, 32000, 64000)
METHODS: dict[str, tuple[Training, str | None]] = {
    "bpe": (BPE(), "gpt-4o"),
    "superbpe, transition 0.9": (SuperBPE(), "gpt-4o"),
    "superbpe, transition 0.5": (SuperBPE(transition=0.5), "gpt-4o"),
    "superbpe, transition 0.25": (SuperBPE(transition=0.25), "gpt-4o"),
    "unigram": (Unigram(), "metaspace"),
    "compound": (CompoundPiece(min_count=2, resolution=1), "metaspace"),
    "lib": (LiB(), None),
}
TEXTS = {"books": "books/valid.txt", "wikitext-2": "wikitext-2/valid.txt"}


def row(name: str, size: int, assets: Path) -> dict[str, Any]:
    """Trains and measures, in this process."""
    method, around = METHODS[name]
    texts = list(open_texts([assets / "data/books/train.txt"]))
    begin = time.process_time()
    tokenizer = method(texts, size, special=(), around=pipeline(around) if around else None, say=lambda _w, _s: None)
    seconds = time.process_time() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    unseen = {group: list(open_texts([assets / "data" / file])) for group, file in TEXTS.items()}
    found = {group: count_texts(tokenizer, own) for group, own in unseen.items()}
    begin = time.process_time()
    lossless = all(
        tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
        for own in unseen.values()
        for text in own
    )
    use = measure(name, tokenizer, found)
    made: dict[str, Any] = {
        "method": name,
        "size": size,
        "settings": to_plain(method),
        "pre_tokenizer": around,
        "cpu_seconds": round(seconds, 1),
        "peak_memory": peak,
        "megabytes_per_second": round(use.total.bytes / 1e6 / (time.process_time() - begin), 2),
        "lossless": lossless,
        "texts": {own.group: to_plain(own) for own in use.groups},
    }
    if isinstance(method, CompoundPiece):
        split = known_words(words_of(texts, pipeline("metaspace")))
        made["split"] = {
            group: found[group].bytes / sum(len(encode_parts(tokenizer, text, split)) for text in own)
            for group, own in unseen.items()
        }
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("../shared"))
    parser.add_argument("--size", action="append", type=int, default=[])
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help=", ".join(METHODS))
    parser.add_argument("--row", nargs=2, metavar=("NAME", "SIZE"), help="only this one, printed")
    options = parser.parse_args()
    assets = options.assets.absolute()
    if options.row:
        try:
            print(json.dumps(row(options.row[0], int(options.row[1]), assets)))
        except TerselyError as error:
            sys.exit(str(error))
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    out = HERE / "results" / f"{date.today()}-tokenizers.json"
    for size in options.size or SIZES:
        for name in options.only or METHODS:
            command = [sys.executable, __file__, "--assets", str(assets), "--row", name, str(size)]
            try:
                made, _, _ = run(command)
            except RuntimeError as error:
                print(f"{name}, {size}: {error}", file=sys.stderr)
                continue
            kept = json.loads(out.read_text("utf-8"))["rows"] if out.exists() else []
            rows = {(each["method"], each["size"]): each for each in kept} | {(name, size): made}
            where = dataclasses.asdict(setting("cpu", packages=["tokenizers"]))
            plain = {"date": str(date.today()), "setting": where, "rows": list(rows.values())}
            out.write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n", "utf-8")
            each = ", ".join(f"{group} {own['bytes_per_token']:.3f}" for group, own in made["texts"].items())
            print(f"{name}, {size}: bytes per token: {each}; {made['cpu_seconds']} s", flush=True)


if __name__ == "__main__":
    main()
