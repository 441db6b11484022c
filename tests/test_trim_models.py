"""Trimming models, tokenizer and weights together: a text whose tokens all stay is cut and computed as before.

Shapes: L tokens, V rows before, K rows that stay.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import Tensor

from tersely.checkpoint import Checkpoint, open_checkpoint
from tersely.export.gguf import write_gguf
from tersely.graph import read_graph
from tersely.methods.trim import Frequency
from tersely.plan.recipe import Trim
from tersely.runtime import load_tokenizer
from tersely.vocabulary.counting import count_texts
from tersely.vocabulary.tokenizer import read_tokenizer
from tersely.vocabulary.trim import plan_trim, tokenizer_of, trimmed_checkpoint
from tests import tiny
from tests.vocabularies import gpt2_json, text_of, tiktoken_json

LLAMA_3 = ("<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{n}|>" for n in range(254)))
ANY_TEXT = st.text(
    st.one_of(
        st.characters(codec="utf-8"),
        st.sampled_from("abcdefghij 0123456789.,;\n\t"),
        st.sampled_from("éßаяλع字かกर한🙂👩🏽‍🚀\u200d\ufe0f"),
    ),
    max_size=60,
)


class Pair:
    """A model and what was left of it."""

    def __init__(self, source: Checkpoint, folder: Path, corpus: Sequence[str], **asked: Any) -> None:
        vocabulary = read_tokenizer(source)
        self.old_tokenizer = tokenizer_of(vocabulary)
        step = Trim("tokens", Frequency(), multiple=1, **asked)
        plan = plan_trim(source, vocabulary, step, count_texts(self.old_tokenizer, corpus))
        made = trimmed_checkpoint(source, plan, folder, {}, resume=False)
        self.kept_K = plan.trimmed.kept_old_ids_K
        self.places = {old: new for new, old in enumerate(self.kept_K.tolist())}
        self.new_tokenizer = Tokenizer.from_file(str(made.path / "tokenizer.json"))
        self.old, self.new = tiny_load(source.path), tiny_load(made.path)
        self.tied = read_graph(source).tied

    def ids(self, text: str) -> tuple[list[int], list[int]]:
        """As both tokenizers cut it."""
        return tuple(one.encode(text).ids for one in (self.old_tokenizer, self.new_tokenizer))  # type: ignore[return-value]

    def check(self, text: str) -> bool:
        """Whether all tokens of a text stay; if so, all is as it was; if not, it is read back alike."""
        old, new = self.ids(text)
        if not set(old) <= self.places.keys():
            assert self.new_tokenizer.decode(new) == self.old_tokenizer.decode(old)
            return False
        assert new == [self.places[i] for i in old]
        if new:
            before, after = logits(self.old, old), logits(self.new, new)
            torch.testing.assert_close(after, before[:, self.kept_K], atol=1e-6, rtol=1e-6)
        return True


def tiny_load(path: Path) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    graph = read_graph(open_checkpoint(path))
    auto = getattr(transformers, f"AutoModelFor{graph.family.auto_class}")
    return auto.from_pretrained(path, config=config, dtype=torch.float64).eval()


@torch.no_grad()
def logits(model: Any, ids: Sequence[int]) -> Tensor:
    ids_1L = torch.tensor([ids[:200]])
    more = {"decoder_input_ids": ids_1L} if model.config.is_encoder_decoder else {}
    found: Tensor = model(input_ids=ids_1L, **more).logits[0]
    return found


def with_tokenizer(folder: Path, model_type: str, text: str, **config: Any) -> Checkpoint:
    rows = max(Tokenizer.from_str(text).get_vocab(with_added_tokens=True).values()) + 1
    tiny.tiny(model_type, folder, vocab=rows, bos_token_id=None, eos_token_id=None, pad_token_id=None, **config)
    (folder / "tokenizer.json").write_text(text, "utf-8")
    return open_checkpoint(folder)


def sentences(assets: Path, count: int) -> list[str]:
    text = (assets / "data" / "tinystories" / "sample.txt").read_text("utf-8")
    return [line for line in text.splitlines() if line and "<|" not in line][:count]


@pytest.mark.parametrize("model", ["stories-3m", "house-llama", "house-qwen3"])
def test_trained_models_compute_what_they_did_for_texts_whose_tokens_stay(
    model: str, assets: Path, tmp_path: Path
) -> None:
    texts = sentences(assets, 400)
    pair = Pair(open_checkpoint(assets / "models" / model), tmp_path / "small", texts[:200], coverage=0.97)
    assert pair.tied == (model != "house-llama")
    found = [pair.check(text) for text in texts[150:260]]
    assert 10 < sum(found) < len(found)


@pytest.mark.parametrize("model", ["house-llama", "house-qwen3"])
def test_a_trimmed_model_is_cut_and_computed_alike_in_llama_cpp(
    model: str, assets: Path, tmp_path: Path, llama: Any
) -> None:
    """Any text: ids by the trimmed tokenizer, logits by transformers in float32."""
    wide = tmp_path / "wide"
    shutil.copytree(assets / "models" / model, wide, copy_function=shutil.copyfile)
    import transformers

    transformers.AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32).save_pretrained(wide)
    texts = sentences(assets, 120)
    Pair(open_checkpoint(wide), tmp_path / "small", texts[:60], coverage=0.95)
    write_gguf(tmp_path / "small", tmp_path / "small.gguf")
    tokenizer: Any = load_tokenizer(tmp_path / "small")
    network: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    with llama(tmp_path / "small.gguf") as theirs:
        for text in (*texts[60:100], "Ünïcödé, 東京 and 🙂 were not counted: 12345"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert [i for i in theirs.tokens(text) if i not in tokenizer.all_special_ids] == ids
        with torch.no_grad():
            ours = network(torch.tensor([ids])).logits[0]
        found = theirs.logits(ids)
    assert float((found - ours).abs().max()) < 1e-3 * float(ours.abs().max())


@pytest.mark.parametrize(("model_type", "kind"), [("bert", "wordpiece"), ("t5", "unigram"), ("gpt2", "suffix")])
def test_other_kinds_of_tokenizers_and_heads_do_too(model_type: str, kind: str, tmp_path: Path) -> None:
    source = with_tokenizer(tmp_path / "model", model_type, text_of(kind))
    corpus = ["the quick brown fox jumps over the lazy dog", "a tokenizer cuts words into pieces", "words and pieces"]
    pair = Pair(source, tmp_path / "small", corpus, minimum_count=1)
    assert all(pair.check(text) for text in corpus)
    assert len(pair.kept_K) < read_graph(source).sizes["tokens"]


@pytest.fixture(scope="module", params=["llama-2", "gpt-2", "gpt-neox", "llama-3"])
def pair(request: pytest.FixtureRequest, assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A small random model behind a published tokenizer, trimmed to English stories."""
    folder = assets / "data" / "tokenizers"
    text = {
        "llama-2": lambda: (folder / "llama2-hf" / "tokenizer.json").read_text("utf-8"),
        "gpt-2": lambda: gpt2_json(folder / "gpt2" / "gpt2_vocab.json", folder / "gpt2" / "gpt2_merges.txt"),
        "gpt-neox": lambda: (folder / "gpt-neox-20b" / "20B_tokenizer.json").read_text("utf-8"),
        "llama-3": lambda: tiktoken_json(folder / "llama3" / "tokenizer.model", LLAMA_3),
    }[request.param]()
    place = tmp_path_factory.mktemp(request.param)
    source = with_tokenizer(place / "model", "llama", text, hidden_size=16, intermediate_size=24, blocks=1)
    return Pair(source, place / "small", sentences(assets, 200), minimum_count=1)


def test_published_tokenizers_cut_the_texts_that_were_counted_alike(pair: Pair, assets: Path) -> None:
    assert all(pair.check(text) for text in sentences(assets, 40))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=ANY_TEXT)
def test_any_text_is_cut_and_computed_as_before_or_read_back_alike(pair: Pair, text: str) -> None:
    pair.check(text)


def test_the_map_says_which_row_was_which(pair: Pair) -> None:
    plain = json.loads(pair.new_tokenizer.to_str())
    old = pair.old_tokenizer.get_vocab(with_added_tokens=True)
    for token, new in [*plain["model"]["vocab"].items()][:500]:
        assert old[token] == int(pair.kept_K[new])
