"""Loading a checkpoint with plain transformers, and writing with it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tersely.checkpoint import open_checkpoint
from tersely.codecs.low_rank import LowRank
from tersely.compression import compress
from tersely.encoding import Format
from tersely.errors import CheckpointError, UsageError
from tersely.export.adapter import write_adapter
from tersely.graph import read_graph
from tersely.measure import Statistics
from tersely.methods.encode.lqer import LQER
from tersely.methods.encode.rtn import RTN
from tersely.plan.recipe import Recipe, Step
from tersely.runtime import generate, load_model, load_tokenizer, quiet
from tersely.stored import open_stored
from tests import tiny as families
from tests.plain import write_changed
from tests.tiny import inputs, load
from tests.words import write_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


def edited(tiny: Path, folder: Path, change: dict[str, torch.Tensor | None]) -> Path:
    shutil.copytree(tiny, folder)
    tensors: dict[str, Any] = {**load_file(tiny / "model.safetensors"), **change}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


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


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
@pytest.mark.parametrize("format", ["dense", "compressed-tensors"])
def test_an_adapter_beside_the_weights_is_added(
    format: Format, model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PEFT adds it to an ordinary checkpoint of the same values."""
    source = families.tiny(model_type, tmp_path / "source")
    checkpoint = open_checkpoint(source)
    graph = read_graph(checkpoint)
    compress(source, Recipe((Step("linear", RTN(bits=3, group=16)),)), tmp_path / "out", format=format)
    method = LQER(rank=2, scaled=False, factors="plain", bits=3, group=16)
    encoded = {w.name: method(checkpoint[w.name], Statistics(w.columns)) for w in graph.select("linear")}
    low_rank = {name: part for name, e in encoded.items() if isinstance(part := e.parts[1], LowRank)}
    write_adapter(tmp_path / "out" / "adapter", graph, low_rank, "base")
    plain: Any = load(write_changed(source, tmp_path / "plain", dict(open_stored(tmp_path / "out"))))
    plain.load_adapter(str(tmp_path / "out" / "adapter"))
    with torch.no_grad():
        found = load_model(tmp_path / "out")(**inputs(model_type)).logits
        assert torch.equal(found, plain(**inputs(model_type)).logits)
        (tmp_path / "out" / "adapter").rename(tmp_path / "adapter")
        assert not torch.allclose(found, load_model(tmp_path / "out")(**inputs(model_type)).logits, atol=1e-3)
    (tmp_path / "adapter").rename(tmp_path / "out" / "adapter")
    monkeypatch.setattr("tersely.runtime.loading.find_spec", lambda _name: None)
    with pytest.raises(UsageError, match=r"pip install 'tersely\[adapter\]'"):
        load_model(tmp_path / "out")


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


def test_only_causal_models_generate(tmp_path: Path) -> None:
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
