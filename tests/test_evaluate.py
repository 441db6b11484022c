"""Loss, divergence and their standard errors."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tersely.calibrate import documents, read_text
from tersely.errors import CheckpointError, DataError, UsageError
from tersely.evaluation import Estimate, Evaluation, divergence, evaluate, perplexity, ratio
from tersely.runtime import generate, load_model, load_tokenizer, quiet

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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    drawn = torch.randint(0, len(WORDS), (12, 40), generator=torch.Generator().manual_seed(3)).tolist()
    stories = [" ".join(WORDS[i] for i in row[: 5 + 3 * n]) for n, row in enumerate(drawn)]
    file = tmp_path / "text.txt"
    file.write_text("\n<|endoftext|>\n".join(stories))
    return file


def plain(folder: Path, text: str, context: int) -> tuple[float, list[torch.Tensor]]:
    """Loss by transformers alone, one document at a time, and the log-probabilities."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    total, count, all_log_p = 0.0, 0, []
    for document in documents(text):
        ids = torch.tensor([tokenizer(document)["input_ids"][:context]])
        with torch.inference_mode():
            log_p = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        total -= log_p.gather(1, ids[0, 1:, None]).double().sum().item()
        count += ids.shape[1] - 1
        all_log_p.append(log_p)
    return total / count, all_log_p


def test_the_loss_equals_a_plain_computation(tiny: Path, text: Path) -> None:
    expected, _ = plain(tiny, read_text(text), 24)
    found = evaluate(tiny, text, context=24)
    assert found.loss.value == pytest.approx(expected, abs=1e-6)
    assert found.perplexity == perplexity(found.loss.value) == pytest.approx(math.exp(expected))
    assert found.documents == 12
    assert found.tokens == sum(min(5 + 3 * n, 23) for n in range(12))


def test_divergence_equals_a_plain_computation(tiny: Path, other: Path, text: Path) -> None:
    found = evaluate(tiny, text, against=other, context=24)
    mine, log_p = plain(tiny, read_text(text), 24)
    base, log_q = plain(other, read_text(text), 24)
    p, q = torch.cat(log_p), torch.cat(log_q)
    assert found.kl is not None
    assert found.base_loss is not None
    assert found.loss_difference is not None
    assert found.top1_agreement is not None
    assert found.kl.value == pytest.approx((q.exp() * (q - p)).sum(-1).mean().item(), rel=1e-5)
    assert found.base_loss.value == pytest.approx(base, abs=1e-6)
    assert found.loss_difference.value == pytest.approx(mine - base, abs=2e-6)
    agreement = (p.argmax(-1) == q.argmax(-1)).float().mean().item()
    assert found.top1_agreement.value == pytest.approx(agreement, abs=1e-6)


def test_a_model_does_not_diverge_from_itself(tiny: Path, text: Path) -> None:
    found = evaluate(tiny, text, against=tiny)
    assert (found.kl, found.top1_agreement) == (Estimate(0.0, 0.0), Estimate(1.0, 0.0))
    assert found.loss_difference == Estimate(0.0, 0.0)


@pytest.mark.parametrize("tokens", [1, 30, 10_000])
def test_batching_and_chunking_do_not_move_the_result(
    tiny: Path, other: Path, text: Path, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluate(tiny, text, against=other)
    monkeypatch.setattr(divergence, "_CHUNK_BYTES_CPU", 4 * 32 * 7)
    found = evaluate(tiny, text, against=other, tokens_per_batch=tokens)
    assert found.kl is not None
    assert expected.kl is not None
    assert found.loss.value == pytest.approx(expected.loss.value, rel=1e-6)
    assert found.kl.value == pytest.approx(expected.kl.value, rel=1e-5)
    assert found.loss.stderr == pytest.approx(expected.loss.stderr, rel=1e-5)


def test_progress_counts_every_document(tiny: Path, text: Path) -> None:
    seen: list[tuple[int, int]] = []
    evaluate(tiny, text, tokens_per_batch=64, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (12, 12)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_an_evaluation_survives_json(tiny: Path, other: Path, text: Path) -> None:
    for found in (evaluate(tiny, text), evaluate(tiny, text, against=other)):
        assert Evaluation.from_json(found.to_json()) == found
        assert replace(found, seconds=99.0) == found
    one = evaluate(tiny, f"{text}[:1]")
    assert one.loss.stderr == math.inf
    assert json.loads(one.to_json())["loss"]["stderr"] is None
    assert Evaluation.from_json(one.to_json()) == one
    with pytest.raises(DataError, match="not an evaluation"):
        Evaluation.from_json('{"model": "m"}')


def test_other_vocabularies_and_tokenizers_cannot_be_compared(tiny: Path, text: Path, tmp_path: Path) -> None:
    wide = write_model(tmp_path / "wide", vocabulary=40)
    with pytest.raises(DataError, match="a vocabulary of 40 and"):
        evaluate(wide, text, against=tiny)
    reordered = write_model(tmp_path / "reordered")
    write_tokenizer(reordered, WORDS[::-1])
    with pytest.raises(DataError, match="tokenizers"):
        evaluate(reordered, text, against=tiny)


def test_a_context_beyond_the_positions_is_refused(tiny: Path, text: Path) -> None:
    with pytest.raises(UsageError, match="64 positions"):
        evaluate(tiny, text, context=65)


def edited(tiny: Path, folder: Path, change: dict[str, torch.Tensor | None]) -> Path:
    shutil.copytree(tiny, folder)
    tensors: dict[str, Any] = {**load_file(tiny / "model.safetensors"), **change}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_model_that_gives_nan_is_an_error(tiny: Path, text: Path, tmp_path: Path) -> None:
    broken = edited(tiny, tmp_path / "nan", {"model.norm.weight": torch.full((32,), math.nan)})
    with pytest.raises(CheckpointError, match="gives NaN"):
        evaluate(broken, text)


def test_missing_left_over_and_misshapen_weights_are_errors(tiny: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=f"missing: {name}"):
        load_model(edited(tiny, tmp_path / "missing", {name: None}))
    with pytest.raises(CheckpointError, match=r"unexpected: stray\.weight"):
        load_model(edited(tiny, tmp_path / "stray", {"stray.weight": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=rf"wrong shape: {name} \(2, 2\)"):
        load_model(edited(tiny, tmp_path / "cut", {name: torch.zeros(2, 2)}))


def test_compressed_tensors_of_mixed_widths_load_as_what_was_compressed(tiny: Path, tmp_path: Path) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
    )

    def group(bits: int, target: str) -> QuantizationScheme:
        weights = QuantizationArgs(num_bits=bits, symmetric=True, strategy="group", group_size=16)
        return QuantizationScheme(targets=[target], weights=weights, format="pack-quantized")

    groups = {"narrow": group(4, "re:.*(q|k|v|o|gate|down)_proj"), "wide": group(8, "re:.*up_proj")}
    frozen = QuantizationStatus.FROZEN
    config = QuantizationConfig(config_groups=groups, ignore=["lm_head"], quantization_status=frozen)
    ids_BL = torch.arange(20)[None]
    with quiet(), torch.no_grad():
        model: Any = load_model(tiny)
        apply_quantization_config(model, config)
        for module in model.modules():
            if (scheme := getattr(module, "quantization_scheme", None)) is not None:
                largest = module.weight.reshape(module.weight.shape[0], -1, 16).abs().amax(-1)
                module.weight_scale.copy_(largest / (2 ** (scheme.weights.num_bits - 1) - 0.5))
        expected = model(input_ids=ids_BL).logits
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(tmp_path / "mixed")
        compressor.update_config(tmp_path / "mixed")
    found: Any = load_model(tmp_path / "mixed")
    assert isinstance(found, torch.nn.Module)
    with torch.inference_mode():
        assert torch.equal(found(input_ids=ids_BL).logits, expected)
        assert not torch.allclose(load_model(tiny)(input_ids=ids_BL).logits, expected, atol=1e-3)


def test_what_is_no_checkpoint_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_model(tmp_path / "none")
    bare = tmp_path / "bare"
    shutil.copytree(tiny, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load_tokenizer(bare)
    (bare / "config.json").write_text('{"model_type": "llama", "architectures": ["Unheard"]}')
    with pytest.raises(CheckpointError, match="Unheard"):
        load_model(bare)


def test_only_causal_models_are_evaluated_and_generate(text: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    BertForMaskedLM(BertConfig(vocab_size=32, **sizes)).save_pretrained(tmp_path / "bert")
    assert not load_model(tmp_path / "bert").training
    with pytest.raises(UsageError, match="this one is masked"):
        evaluate(tmp_path / "bert", text)
    with pytest.raises(UsageError, match="this one is masked"):
        generate(tmp_path / "bert", "the", max_new_tokens=1)


def test_generation_repeats_with_its_seed_and_streams_what_it_returns(tiny: Path) -> None:
    state = torch.get_rng_state()
    pieces: list[str] = []
    greedy = generate(tiny, "the cat", max_new_tokens=8, stream=pieces.append)
    assert "".join(pieces) == greedy == generate(tiny, "the cat", max_new_tokens=8, seed=5)
    drawn = [generate(tiny, "the cat", max_new_tokens=20, temperature=2.0, seed=s) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(state, torch.get_rng_state())


def test_generation_beyond_the_positions_is_refused(tiny: Path) -> None:
    with pytest.raises(UsageError, match="64 positions"):
        generate(tiny, "the cat", max_new_tokens=64)


def test_loading_leaves_verbosity_bars_and_stderr_as_they_were(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.set_tqdm_hook(None)
    load_model(tiny)
    assert (logging.get_verbosity(), logging.set_tqdm_hook(None)) == before
    assert capsys.readouterr() == ("", "")


def test_the_ratio_is_the_mean_over_tokens_and_one_cluster_shows_no_spread() -> None:
    assert ratio([2.0, 4.0], [1, 2]) == Estimate(2.0, 0.0)
    assert ratio([3.0], [2]) == Estimate(1.5, math.inf)
    assert ratio([1.0, 2.0, 3.0], [1, 1, 1]).stderr == pytest.approx(1 / math.sqrt(3))
    with pytest.raises(ValueError, match="sum positive"):
        ratio([1.0], [0])


def test_the_standard_error_is_the_spread_of_repeated_samples() -> None:
    """4,000 samples of 200 documents, whose lengths vary and whose tokens share a document effect."""
    draw = torch.Generator().manual_seed(0)
    repeats, clusters = 4000, 200
    sizes = torch.randint(20, 400, (repeats, clusters), generator=draw).double()
    shared = torch.randn(repeats, clusters, generator=draw, dtype=torch.float64) * 0.3
    noise = torch.randn(repeats, clusters, generator=draw, dtype=torch.float64)
    totals = sizes * (1.5 + shared - 0.001 * sizes) + noise * sizes.sqrt()
    found = [ratio(t.tolist(), n.tolist()) for t, n in zip(totals, sizes, strict=True)]
    spread = torch.tensor([f.value for f in found]).double().std().item()
    claimed = sum(f.stderr for f in found) / repeats
    assert claimed == pytest.approx(spread, rel=0.04)


def test_stories_3m_has_its_published_loss(assets: Path) -> None:
    model, text = assets / "models/stories-3m", f"{assets}/data/tinystories/sample.txt[-200:]"
    found = evaluate(model, text, context=512)
    assert found.loss.value == pytest.approx(1.2486, abs=1e-4)
    assert found.loss.value == pytest.approx(plain(model, read_text(text), 512)[0], abs=1e-6)
    assert (found.documents, found.tokens, found.kind) == (200, 65212, "documents")


def test_stories_3m_does_not_diverge_from_itself(assets: Path) -> None:
    model = assets / "models/stories-3m"
    found = evaluate(model, f"{assets}/data/tinystories/sample.txt[-40:]", against=model)
    assert found.kl is not None
    assert abs(found.kl.value) < 1e-6
    assert found.top1_agreement == Estimate(1.0, 0.0)
    assert found.loss_difference == Estimate(0.0, 0.0)


def test_a_house_model_is_evaluated_on_windows(assets: Path) -> None:
    found = evaluate(assets / "models/house-llama", assets / "data/books/valid.txt", context=256, samples=50)
    assert (found.kind, found.documents, found.tokens, found.dtype) == ("windows", 50, 50 * 255, "bfloat16")
    assert found.loss.value == pytest.approx(4.341, abs=4 * found.loss.stderr)
