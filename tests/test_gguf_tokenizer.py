"""The tokenizer of a GGUF file: llama.cpp cuts texts as transformers does."""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tersely.errors import CheckpointError
from tersely.export.gguf import write_gguf
from tersely.export.gguf.tokenizer import _table
from tests.tiny import tiny

THEIRS: Any = AutoTokenizer  # untyped in transformers
TEXTS = (
    "",
    "a",
    "Hello, world!",
    "I'm sure they've told us WE'LL see; it's 12345 miles, or 1 2 33 444.",
    "two  spaces,   three    and four",
    "tab\tnew\nline\n\n\nand\r\nmore \n end ",
    "Ünïcode naïve Straße Ω ≈ ∞ — “quotes”",
    "Привет, мир! 你好世界 123 こんにちは مرحبا नमस्ते สวัสดี",
    "🦙 😶\u200d🌫️ x_y->z != [0x1F]; <p>(a+b)*c</p>",
    "CamelCaseWords HTTPServer don'T 'Re",
    "______ ====== ...... ''''",
)


def wrap(tokenizer: Tokenizer, folder: Path, **special: Any) -> Path:
    """Save with a llama of as many rows, and a few more."""
    tiny("llama", folder, vocab=tokenizer.get_vocab_size() + 5)
    fast: Any = PreTrainedTokenizerFast  # untyped in transformers
    fast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


@cache
def trained(kind: str) -> Tokenizer:
    steps = {"ByteLevel": pre_tokenizers.ByteLevel(add_prefix_space=False), "Digits": pre_tokenizers.Digits(True)}
    split = pre_tokenizers.Split
    known = json.loads(kind)
    cut: list[Any] = [steps.get(step) or split(_regex(step), "isolated") for step in known["steps"]]
    if known["steps"][-1] != "ByteLevel":
        cut.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer = Tokenizer(models.BPE(ignore_merges=known.get("whole", False)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def _regex(text: str) -> Any:
    return importlib.import_module("tokenizers").Regex(text)


def same_tokens(folder: Path, file: Path, texts: tuple[str, ...], llama: Any) -> None:
    tokenizer = THEIRS.from_pretrained(folder)
    with llama(file) as model:
        for text in texts:
            assert model.tokens(text) == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize("known", [json.dumps(known) for known in _table()["pre"]])
def test_llama_cpp_cuts_texts_as_each_pre_tokenizer_does(known: str, tmp_path: Path, llama: Any) -> None:
    folder = wrap(trained(known), tmp_path / "model", bos_token="<s>", eos_token="</s>")
    report = write_gguf(folder, tmp_path / "model.gguf")
    noted = json.loads(known).get("note")
    assert report.notes == ((noted,) if noted else ())
    same_tokens(folder, tmp_path / "model.gguf", TEXTS if noted is None else TEXTS[:-4] + TEXTS[-3:], llama)


def sentencepiece(prepend: bool) -> Tokenizer:
    """BPE over characters with bytes for the rest, and every merge that makes a token, as converters write them."""
    steps: list[Any] = [normalizers.Prepend("\u2581")] if prepend else []
    normal = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    learner = Tokenizer(models.BPE())
    learner.normalizer = normal
    learner.train_from_iterator(TEXTS[1:6] * 3, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    learned = sorted(learner.get_vocab(), key=lambda token: learner.get_vocab()[token])
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    ids = {text: i for i, text in enumerate(texts)}
    cuts = [(text[:n], text[n:]) for text in learned for n in range(1, len(text))]
    merges = [(a, b) for a, b in cuts if a in ids and b in ids]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normal
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def unigram() -> Tokenizer:
    words = [f"\u2581{word}" for text in TEXTS[1:6] for word in text.split(" ")]
    pieces = sorted({word[a : a + n] for word in words for n in (1, 2, 3, 5) for a in range(len(word) - n + 1)})
    draw = random.Random(0)
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, draw.uniform(-12, -3)) for piece in pieces)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


@pytest.mark.parametrize(
    ("make", "special"),
    [
        (lambda: sentencepiece(True), {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
        (lambda: sentencepiece(False), {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
        (unigram, {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}),
    ],
    ids=["sentencepiece", "sentencepiece-bare", "unigram"],
)
def test_llama_cpp_cuts_texts_as_other_tokenizers_do(
    make: Callable[[], Tokenizer], special: dict[str, str], tmp_path: Path, llama: Any
) -> None:
    folder = wrap(make(), tmp_path / "model", **special)
    write_gguf(folder, tmp_path / "model.gguf")
    same_tokens(folder, tmp_path / "model.gguf", TEXTS[1:], llama)


def test_the_file_says_what_the_tokenizer_and_the_config_say(tmp_path: Path, llama: Any) -> None:
    tokenizer = trained(json.dumps(_table()["pre"][0]))
    folder = wrap(
        tokenizer,
        tmp_path / "model",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template="{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    write_gguf(folder, tmp_path / "model.gguf")
    wanted = {
        "general.architecture": "llama",
        "general.name": "model",
        "llama.context_length": "64",
        "llama.attention.head_count_kv": "2",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": "0",
        "tokenizer.ggml.eos_token_id": "1",
        "tokenizer.ggml.padding_token_id": "1",
        "tokenizer.ggml.add_bos_token": "true",
        "tokenizer.ggml.add_eos_token": "false",
        "tokenizer.chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    with llama(tmp_path / "model.gguf") as model:
        assert {key: model.metadata(key) for key in wanted} == wanted


def nfkc(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


def strangely_cut(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    split = pre_tokenizers.Split(_regex(r"\d"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return tokenizer


@pytest.mark.parametrize(
    ("change", "message"),
    [(nfkc, r"it normalizes by NFKC"), (strangely_cut, r'its pre-tokenizer is \["\\\\d"\]; known are dbrx, gpt-2')],
)
def test_a_tokenizer_that_llama_cpp_has_not_is_an_error(
    change: Callable[[Tokenizer], Tokenizer], message: str, tmp_path: Path
) -> None:
    tokenizer = change(trained(json.dumps(_table()["pre"][0])))
    folder = wrap(tokenizer, tmp_path / "model", bos_token="<s>", eos_token="</s>")
    with pytest.raises(CheckpointError, match=message):
        write_gguf(folder, tmp_path / "model.gguf")


def test_more_tokens_than_rows_are_an_error(tmp_path: Path) -> None:
    folder = wrap(trained(json.dumps(_table()["pre"][0])), tmp_path / "model", bos_token="<s>", eos_token="</s>")
    tiny("llama", folder, vocab=300)
    with pytest.raises(CheckpointError, match="but the embedding only 300 rows"):
        write_gguf(folder, tmp_path / "model.gguf")


@pytest.mark.parametrize("name", ["stories-3m", "house-llama", "house-qwen3", "house-mixtral"])
def test_llama_cpp_cuts_texts_as_the_tokenizers_of_trained_models_do(
    name: str, assets: Path, tmp_path: Path, llama: Any
) -> None:
    write_gguf(assets / "models" / name, tmp_path / "model.gguf")
    stories = (assets / "data/tinystories/sample.txt").read_text("utf-8")[:4000].split("\n")
    same_tokens(assets / "models" / name, tmp_path / "model.gguf", (*TEXTS[1:], *stories), llama)


def test_llama_cpp_cuts_its_own_test_texts_as_llama_2_does(assets: Path, tmp_path: Path, llama: Any) -> None:
    folder = tiny("llama", tmp_path / "model", vocab=32000, bos_token_id=1, eos_token_id=2)
    tokenizer = (assets / "data/tokenizers/llama2-hf/tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(tokenizer)
    report = write_gguf(folder, tmp_path / "model.gguf")
    assert report.notes == ()
    texts = (assets / "data/tokenizers/conformance/ggml-vocab-llama-spm.gguf.inp").read_text("utf-8")
    spaces = tuple(f"a{' ' * count}b" for count in range(1, 40))
    same_tokens(folder, tmp_path / "model.gguf", (*texts.split("\n__ggml_vocab_test__\n"), *spaces), llama)
