"""How a model gets on with another tokenizer: every way to give rows to its new tokens.

    python benchmarks/bench_transplant.py --assets ../shared [--only NAME ...] [--steps 50]

Three moves: house-llama to a byte-level BPE of as many tokens learnt here from TinyStories, and to one learnt from
books and five other languages; and the smaller demo model to house-llama's tokenizer, the only move with a donor that
was trained with the new one (house-llama itself), which omp needs. Loss is in nats a byte of held-out text, cut into
documents of about 500 bytes so that every tokenizer sees the same; right after the move, and after so many steps of
256 tokens on text of the same kind (AdamW, 5e-4, all parameters), for two orders of the data. Results are merged by
row into benchmarks/results/DATE-transplant.json.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import random
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tersely.calibrate import DOCUMENT_SEPARATOR, documents, read_text, sequences
from tersely.evaluation.subject import setting
from tersely.vocabulary.initialise import Gap, Initialiser, Tables
from tersely.vocabulary.initialise.align import Align
from tersely.vocabulary.initialise.cw2v import CW2V
from tersely.vocabulary.initialise.focus import Focus
from tersely.vocabulary.initialise.mean import Mean
from tersely.vocabulary.initialise.merge import Merge
from tersely.vocabulary.initialise.multivariate import Multivariate
from tersely.vocabulary.initialise.ofa import OFA
from tersely.vocabulary.initialise.omp import OMP
from tersely.vocabulary.initialise.random_normal import RandomNormal
from tersely.vocabulary.initialise.token_adapt import TokenAdapt
from tersely.vocabulary.pieces import Pieces, read_pieces
from tersely.vocabulary.transplant import find_gap, transplant
from tersely.writer import replace_file

HERE = Path(__file__).parent
SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>"]
SEEDS = (0, 1)
DOCUMENT = 500
HELD_OUT = 32
"""Documents."""
OWN = "its own tokenizer"
# Name -> method, what stands in where it has no answer, whether it is trained on too.
METHODS: dict[str, tuple[Initialiser, Initialiser | None, bool]] = {
    "random_normal": (RandomNormal(), None, True),
    "multivariate": (Multivariate(), None, True),
    "mean": (Mean(), None, True),
    "merge": (Merge(), None, True),
    "align, else random": (Align(), RandomNormal(), False),
    "align with mean": (Align(with_mean=True), None, True),
    "focus, else random": (Focus(), RandomNormal(), False),
    "focus": (Focus(), None, True),
    "ofa, else random": (OFA(), RandomNormal(), False),
    "ofa": (OFA(), None, True),
    "token_adapt": (TokenAdapt(), None, True),
    "cw2v": (CW2V(rank=64, steps=60), None, True),
    "cw2v, from the mean of all rows": (CW2V(rank=64, steps=60, start=0.0), None, False),
    "omp": (OMP(), None, True),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Move:
    """A model, the tokenizer that it gets, and texts for it."""

    model: str
    tokenizer: Tokenizer
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    donor: str | None


def moves(assets: Path) -> dict[str, Move]:
    data = assets / "data"
    stories = documents(read_text(data / "tinystories" / "sample.txt"))
    books = pieces_of(read_text(data / "books" / "train.txt")[:1_500_000])
    valid = pieces_of(read_text(data / "books" / "valid.txt"))[::40]
    languages = [
        text for name in ("de", "es", "ru", "el", "tr") for text in contexts(data / "xquad" / f"xquad.{name}.json")
    ]
    mixed = tuple(random.Random(0).sample([*books, *languages], len(books) + len(languages)))
    house = Tokenizer.from_file(str(assets / "models" / "house-llama" / "tokenizer.json"))
    count = house.get_vocab_size()
    held_out = tuple(part for story in stories[-200:] for part in pieces_of(story))
    return {
        "house-llama to stories": Move("house-llama", trained(stories[:-200], count), stories[:-200], held_out, None),
        "house-llama to books and languages": Move("house-llama", trained(mixed, count), mixed, valid, None),
        "demo to house-llama": Move("demo", house, tuple(books), valid, "house-llama"),
    }


def contexts(file: Path) -> list[str]:
    plain = json.loads(file.read_text("utf-8"))
    return [paragraph["context"] for article in plain["data"] for paragraph in article["paragraphs"]]


def pieces_of(text: str) -> tuple[str, ...]:
    """Documents of about as many characters, cut at spaces."""
    found, words, size = [], [], 0
    for word in text.replace(DOCUMENT_SEPARATOR, " ").split(" "):
        words.append(word)
        size += len(word) + 1
        if size >= DOCUMENT:
            found.append(" ".join(words).strip())
            words, size = [], 0
    return tuple(each for each in found if each)


def trained(texts: Sequence[str], count: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=count,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    return tokenizer


def load(folder: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.train(False)


def tables(model: Any) -> Tables:
    own = Tables(model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach())
    return own if own.head_VD is not own.embedding_VD else Tables(own.embedding_VD)


def tokenized(texts: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[Tensor, ...], int]:
    """Sequences, and the bytes that they predict."""
    wrap: Any = PreTrainedTokenizerFast  # untyped in transformers
    wrapped = wrap(tokenizer_object=tokenizer, bos_token=SPECIAL[0], pad_token=SPECIAL[2])
    text = f"\n{DOCUMENT_SEPARATOR}\n".join([*texts, ""])
    found = sequences(text, wrapped, context=512)
    return found.ids, sum(found.nbytes)


@torch.no_grad()
def loss(model: Any, held_out: tuple[tuple[Tensor, ...], int]) -> float:
    """Nats a byte."""
    ids, nbytes = held_out
    total = 0.0
    for own in ids:
        logits = model(input_ids=own[None]).logits[0, :-1]
        total += float(nn.functional.cross_entropy(logits, own[1:], reduction="sum"))
    return total / nbytes


def train(model: Any, ids: tuple[Tensor, ...], steps: int, seed: int) -> None:
    """On 4 windows of 64 tokens a step."""
    stream = torch.cat(random.Random(seed).sample(list(ids), len(ids)))
    starts = torch.randint(0, len(stream) - 65, (steps, 4), generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.95), weight_decay=0.01)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    model.train()
    for first in starts:
        batch = torch.stack([stream[start : start + 65] for start in first.tolist()])
        logits = model(input_ids=batch[:, :-1]).logits
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()))
        optimizer.step()
        warm.step()
    model.train(False)


def moved(model: Any, gap: Gap, name: str, donor: Tables | None, seed: int) -> tuple[Any, dict[str, Any]]:
    method, fallback, _ = METHODS[name]
    begun = time.process_time()
    made = transplant(
        gap,
        tables(model),
        method,
        fallback=fallback,
        donor=donor if "donor" in method.needs else None,
        seed=seed,
    )
    seconds = time.process_time() - begun
    own = copy.deepcopy(model)
    own.get_input_embeddings().weight = nn.Parameter(made.embedding_MD)
    assert made.head_MD is not None
    own.lm_head.weight = nn.Parameter(made.head_MD)
    facts = {
        "copied": made.copied,
        "initialised": made.initialised,
        "fallen_back": len(made.fallen),
        "cpu_seconds": round(seconds, 2),
    }
    return own, facts


def rows_of(name: str, move: Move, assets: Path, only: Sequence[str], steps: int) -> Iterator[dict[str, Any]]:
    model = load(assets / "models" / move.model)
    before = Tokenizer.from_file(str(assets / "models" / move.model / "tokenizer.json"))
    old, new = pieces(before), pieces(move.tokenizer)
    held_out = tokenized(move.held_out[:HELD_OUT], move.tokenizer)
    text = tokenized(move.train, move.tokenizer)[0]
    donor = None if move.donor is None else tables(load(assets / "models" / move.donor))
    taken = [own for own in METHODS if not only or own in only]
    taken = [own for own in taken if donor is not None or "donor" not in METHODS[own][0].needs]
    gap = find_gap(old, new, {need for own in taken for need in METHODS[own][0].needs}, texts=move.train)
    for method in [OWN, *taken]:
        ids = tokenized(move.held_out[:HELD_OUT], before) if method == OWN else held_out
        learnt = tokenized(move.train, before)[0] if method == OWN else text
        row: dict[str, Any] = {"move": name, "name": method, "tokens": sum(map(len, ids[0])), "steps": steps}
        row |= {"loss": [], "loss_trained": []}
        for seed in SEEDS:
            own, facts = (copy.deepcopy(model), {}) if method == OWN else moved(model, gap, method, donor, seed)
            row["loss"].append(loss(own, ids))
            row |= facts
            if method == OWN or METHODS[method][2]:
                train(own, learnt, steps, seed)
                row["loss_trained"].append(loss(own, ids))
        after = ", ".join(f"{value:.4f}" for value in row["loss_trained"])
        print(f"{name}, {method}: {', '.join(f'{value:.4f}' for value in row['loss'])} -> {after}", flush=True)
        yield row


def pieces(tokenizer: Tokenizer) -> Pieces:
    ids = tokenizer.get_vocab()
    return read_pieces(
        tokenizer, {role: ids[token] for role, token in zip(("bos", "eos", "pad"), SPECIAL, strict=True)}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("../shared"))
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="methods")
    parser.add_argument("--move", action="append", default=[], metavar="NAME", help="moves whose name begins so")
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    out = HERE / "results" / f"{date.today()}-transplant.json"
    for name, move in moves(options.assets.absolute()).items():
        if options.move and not any(name.startswith(each) for each in options.move):
            continue
        for row in rows_of(name, move, options.assets.absolute(), options.only, options.steps):
            # Read again: another run may have written since.
            kept = json.loads(out.read_text("utf-8"))["rows"] if out.exists() else []
            rows = {(own["move"], own["name"]): own for own in [*kept, row]}
            where = dataclasses.asdict(setting("cpu"))
            plain = {"date": str(date.today()), "setting": where, "rows": list(rows.values())}
            replace_file(out, (json.dumps(plain, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
