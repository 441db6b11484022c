"""A tiny tokenizer and a text for it, for jobs that measure."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "one",
    "red",
    "bird",
    "fly",
    "over",
    "old",
    "trees",
    "until",
    "night",
    "came",
    "down",
    "soft",
    "while",
    "two",
    "small",
    "dogs",
    "ran",
    "home",
    "by",
    "river",
    "road",
]


def write_tokenizer(folder: Path) -> Path:
    """A byte-level BPE with a start token and ids below 60, as tokenizer.json and tokenizer_config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 2, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrap: Any = PreTrainedTokenizerFast  # untyped in transformers
    fast = wrap(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return folder


def write_text(file: Path, *, documents: int = 16, words: int = 12, seed: int = 0) -> Path:
    """Documents of unequal lengths, the longest of `words` words, separated as calibration texts are."""
    draw = random.Random(seed)
    lengths = [max(2, words - 2 * (n % 5)) for n in range(documents)]
    texts = [" ".join(draw.choices(WORDS, k=length)) for length in lengths]
    file.write_text("\n<|endoftext|>\n".join(texts), "utf-8")
    return file
