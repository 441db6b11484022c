"""Small tokenizers of every kind, folders that hold them, and converters of published ones."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tersely.checkpoint import Checkpoint, open_checkpoint
from tersely.vocabulary.surgery import Trimmed
from tersely.vocabulary.tokenizer import Vocabulary, read_tokenizer

SPACE = "\u2581"
TEXTS = (
    "the quick brown fox jumps over the lazy dog, and the lowest of the newer widest rivers flows slower than the old",
    "I'm sure they've told us; it's 12345 miles, or 1 2 33 444. two  spaces,   three\tand\nnewlines\n\n\nend",
    "Größe naïve Straße crème brûlée déjà vu; Привет, мир! Как дела? Хорошо, спасибо",
    "你好世界 こんにちは مرحبا नमस्ते สวัสดี 🦙 🦊🦊 ______ ====== ......",
    "newest newest lower lowest slowest wide wider widest river rivers other others together weather whether",
)
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")


def byte_level(*, ignore_merges: bool = False, full: bool = True) -> Tokenizer:
    """As GPT-2 has it, with added tokens outside of the model's vocabulary; full: with all 256 bytes."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if full else []
    _train(tokenizer, trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([*SPECIAL, "<|a|>", "<|b|>", "<|c|>"])
    tokenizer.add_tokens(["    ", "lowest"])
    return _in_template(tokenizer)


def whole_words() -> Tokenizer:
    """Words that are tokens are not merged; some are tokens that no merges make."""
    plain = json.loads(byte_level(ignore_merges=True).to_str())
    model = plain["model"]
    for word in ("Ġquick", "Ġslowest", "Ġwhether"):
        model["vocab"].setdefault(word, len(model["vocab"]))
        model["merges"] = [merge for merge in model["merges"] if "".join(merge) != word]
    return _in_template(Tokenizer.from_str(json.dumps(plain)))


def all_splits() -> Tokenizer:
    """As SentencePiece's BPE is converted: every split of a token into tokens is a merge, and bytes for the rest."""
    normal = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    learner = Tokenizer(models.BPE())
    learner.normalizer = normal
    learner.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    _train(learner, trainers.BpeTrainer(vocab_size=330, show_progress=False), TEXTS[:3] + TEXTS[4:])
    learned = sorted(learner.get_vocab(), key=learner.get_vocab().__getitem__)
    tokens = [*SPECIAL[:3], *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    ids = {token: i for i, token in enumerate(tokens)}
    cuts = ((token[:n], token[n:]) for token in learned for n in range(1, len(token)))
    merges = [(a, b) for a, b in cuts if a in ids and b in ids]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normal
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return _in_template(tokenizer)


def marked(*, prefix: str = "", suffix: str = "") -> Tokenizer:
    """A BPE over characters that marks the inside of words, or their ends."""
    given: dict[str, Any] = {"continuing_subword_prefix": prefix} if prefix else {}
    given |= {"end_of_word_suffix": suffix} if suffix else {}
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", **given))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(SPECIAL), show_progress=False, **given)
    _train(tokenizer, trainer)
    return _in_template(tokenizer)


def unigram(*, byte_fallback: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace("  ", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=320, special_tokens=list(SPECIAL), unk_token="<unk>", show_progress=False
    )
    _train(tokenizer, trainer)
    if byte_fallback:
        plain = json.loads(tokenizer.to_str())
        lowest = min(score for _, score in plain["model"]["vocab"])
        plain["model"]["vocab"] += [[f"<0x{byte:02X}>", lowest - 1] for byte in range(256)]
        plain["model"]["byte_fallback"] = True
        tokenizer = Tokenizer.from_str(json.dumps(plain))
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return _in_template(tokenizer)


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    _train(tokenizer, trainers.WordPieceTrainer(vocab_size=400, special_tokens=list(SPECIAL), show_progress=False))
    return _in_template(tokenizer)


KINDS: Mapping[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "byte-level, some bytes": lambda: byte_level(full=False),
    "whole words": whole_words,
    "all splits": all_splits,
    "suffix": lambda: marked(suffix="</w>"),
    "prefix": lambda: marked(prefix="##"),
    "prefix and suffix": lambda: marked(prefix="##", suffix="</w>"),
    "unigram": unigram,
    "unigram with bytes": lambda: unigram(byte_fallback=True),
    "wordpiece": wordpiece,
}
LOSSLESS = ("byte-level", "whole words", "all splits")


@cache
def text_of(kind: str) -> str:
    """The tokenizer.json of a kind."""
    return str(KINDS[kind]().to_str())


def folder_of(
    folder: Path, tokenizer: str, *, rows: int | None = None, config: Any = None, files: Mapping[str, Any] | None = None
) -> Checkpoint:
    """A checkpoint with this tokenizer.json, a config of so many rows, and other files: bytes, or what goes to JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    size = Tokenizer.from_str(tokenizer).get_vocab_size() if rows is None else rows
    contents = {"tokenizer.json": tokenizer, "config.json": {"vocab_size": size, **(config or {})}, **(files or {})}
    for name, content in contents.items():
        if not isinstance(content, str | bytes):
            content = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    save_file({"embed": torch.zeros(1)}, folder / "model.safetensors")
    return open_checkpoint(folder)


def read(folder: Path, tokenizer: str, **rest: Any) -> Vocabulary:
    return read_tokenizer(folder_of(folder, tokenizer, **rest))


def write_trimmed(old: Path, folder: Path, trimmed: Trimmed) -> Checkpoint:
    """The folder of a trimmed tokenizer."""
    folder.mkdir()
    for file in old.iterdir():
        if file.name not in trimmed.removed:
            (folder / file.name).write_bytes(trimmed.files.get(file.name, file.read_bytes()))
    for name, content in trimmed.files.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(trimmed.config), "utf-8")
    return open_checkpoint(folder)


def counted(vocabulary: Vocabulary, ids: Iterable[int]) -> torch.Tensor:
    return torch.bincount(torch.tensor([*ids], dtype=torch.int64), minlength=vocabulary.rows)


def gpt2_json(vocab: Path, merges: Path) -> str:
    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return str(tokenizer.to_str())


def tiktoken_json(ranks: Path, special: Iterable[str]) -> str:
    """Every split of a token into two tokens is a merge, in the order of the tokens; special ones come behind."""
    signs = _signs()
    lines = (line.split() for line in ranks.read_bytes().splitlines())
    ids = {"".join(signs[byte] for byte in base64.b64decode(token)): int(rank) for token, rank in lines}
    merges: list[tuple[str, str]] = []
    for token in ids:
        cuts = ((token[:n], token[n:]) for n in range(1, len(token)))
        merges += sorted((cut for cut in cuts if cut[0] in ids and cut[1] in ids), key=lambda c: (ids[c[0]], ids[c[1]]))
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*special])
    return str(tokenizer.to_str())


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+"
)


def _signs() -> dict[int, str]:
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


def _train(tokenizer: Tokenizer, trainer: Any, texts: Iterable[str] = TEXTS) -> None:
    tokenizer.train_from_iterator([*texts] * 3, trainer)


def _in_template(tokenizer: Tokenizer) -> Tokenizer:
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return tokenizer


def varint(value: int) -> bytes:
    """A protobuf number."""
    parts = []
    while value >= 128:
        parts.append(value % 128 + 128)
        value //= 128
    return bytes([*parts, value])


def block(number: int, content: bytes) -> bytes:
    """A protobuf field of bytes."""
    return varint(number * 8 + 2) + varint(len(content)) + content
