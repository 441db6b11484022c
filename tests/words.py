"""A tiny Llama that reads words, and texts for it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

WORDS = re.findall(r"\w+", "the cat sat on a mat and saw one red bird fly over old trees until night came down soft")


def write_tokenizer(folder: Path, words: list[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    wrap: Any = PreTrainedTokenizerFast  # untyped in transformers
    fast = wrap(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)


def write_model(folder: Path, *, seed: int = 0, vocabulary: int = 32) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder, WORDS)
    return folder


def write_text(file: Path, *, documents: int = 12, seed: int = 3) -> Path:
    """Documents of 5, 8, 11, ... words."""
    drawn = torch.randint(0, len(WORDS), (documents, 3 * documents + 4), generator=torch.Generator().manual_seed(seed))
    stories = [" ".join(WORDS[i] for i in row[: 5 + 3 * n]) for n, row in enumerate(drawn.tolist())]
    file.write_text("\n<|endoftext|>\n".join(stories))
    return file
