"""Adapters of low-rank parts, read and run by PEFT itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from tersely.checkpoint import Checkpoint, open_checkpoint
from tersely.codecs import Encoded
from tersely.codecs.low_rank import LowRank
from tersely.compression import compress
from tersely.errors import UsageError
from tersely.export.adapter import write_adapter
from tersely.graph import Graph, read_graph
from tersely.measure import Statistics
from tersely.methods.encode.lqer import LQER
from tersely.methods.encode.rtn import RTN
from tersely.plan.recipe import Recipe, Step
from tests.plain import write_changed
from tests.tiny import FAMILIES, forward, inputs, load, tiny

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
GRID: dict[str, Any] = {"bits": 3, "group": 16}
KEPT = {"adapter_config.json", "adapter_model.safetensors"}


class Example:
    """A tiny checkpoint whose chosen weights are integers and a low-rank part, each of a rank of its own."""

    def __init__(self, model_type: str, folder: Path, where: str = "linear", **settings: Any) -> None:
        self.folder = folder
        self.source = tiny(model_type, folder / "source", **settings)
        self.checkpoint: Checkpoint = open_checkpoint(self.source)
        self.graph: Graph = read_graph(self.checkpoint)
        self.encoded: dict[str, Encoded] = {}
        for number, weight in enumerate(self.graph.select(where)):
            method = LQER(rank=2 + number % 5, scaled=False, factors="plain", **GRID)
            value = self.oriented(weight.name, self.checkpoint[weight.name])
            self.encoded[weight.name] = method(value, Statistics(weight.columns))

    def oriented(self, name: str, value: Tensor) -> Tensor:
        return (value.t() if self.graph.weight(name).transposed else value).contiguous()

    @property
    def low_rank(self) -> dict[str, LowRank]:
        parts = {name: encoded.parts[1] for name, encoded in self.encoded.items()}
        return {name: part for name, part in parts.items() if isinstance(part, LowRank)}

    def write(self, name: str, encoded: Mapping[str, Encoded]) -> Path:
        """An ordinary checkpoint with what these decode to."""
        decoded = {n: self.oriented(n, e.decode()) for n, e in encoded.items()}
        return write_changed(self.source, self.folder / name, {**self.checkpoint, **decoded})

    def write_base(self) -> Path:
        return self.write("base", {n: Encoded(e.parts[:1]) for n, e in self.encoded.items()})

    def write_adapter(self) -> Path:
        write_adapter(self.folder / "adapter", self.graph, self.low_rank, "base")
        return self.folder / "adapter"


@torch.no_grad()
def adapted(model: nn.Module, adapter: Path, model_type: str) -> Tensor:
    """Logits of the fixed sequences, with the adapter added by PEFT."""
    both: Any = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
    logits_BLV: Tensor = both(**inputs(model_type)).logits
    return logits_BLV.float()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_peft_adds_to_the_other_parts_what_the_low_rank_parts_decode_to(model_type: str, tmp_path: Path) -> None:
    example = Example(model_type, tmp_path)
    expected = forward(example.write("whole", example.encoded))
    base = example.write_base()
    logits = adapted(load(base), example.write_adapter(), model_type)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert float((forward(base) - expected).abs().max()) > 0.1, "without the adapter they are others"


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mixtral"])
def test_it_stands_beside_a_compressed_tensors_checkpoint(model_type: str, tmp_path: Path) -> None:
    example = Example(model_type, tmp_path)
    expected = forward(example.write("whole", example.encoded))
    out = tmp_path / "compressed"
    compress(example.source, Recipe((Step("linear", RTN(**GRID)),)), out, format="compressed-tensors")
    decoded = transformers.CompressedTensorsConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto", quantization_config=decoded)
    logits = adapted(model, example.write_adapter(), model_type)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "where", "settings"),
    [
        ("llama", "linear | head", {"tied": False}),
        ("mixtral", "router", {}),
        ("mixtral", "linear | router", {}),
        ("mixtral", "*.experts.1.w3", {}),
        ("mixtral", "*.w2 | *.experts.0.*", {}),
        ("qwen3_moe", "linear | router", {"mlp_only_layers": [0]}),
        ("deepseek_v3", "mlp", {}),
    ],
)
def test_routers_heads_and_some_of_the_experts_can_be_said_too(
    model_type: str, where: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    example = Example(model_type, tmp_path, where, **settings)
    expected = forward(example.write("whole", example.encoded))
    logits = adapted(load(example.write_base()), example.write_adapter(), model_type)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_are_stored_as_they_are_under_the_names_of_the_modules(dtype: torch.dtype, tmp_path: Path) -> None:
    example = Example("llama", tmp_path, dtype=dtype)
    folder = example.write_adapter()
    assert {path.name for path in folder.iterdir()} == KEPT
    stored = load_file(folder / "adapter_model.safetensors")
    assert len(stored) == 2 * len(example.low_rank)
    for name, part in example.low_rank.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        assert torch.equal(stored[f"{module}.lora_A.weight"], part.a_RI)
        assert torch.equal(stored[f"{module}.lora_B.weight"], part.b_OR)
        assert stored[f"{module}.lora_A.weight"].dtype == dtype
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == "base"
    assert config["alpha_pattern"] == config["rank_pattern"]
    for name, part in example.low_rank.items():
        rank = config["rank_pattern"].get(name.removesuffix(".weight"), config["r"])
        assert rank == part.form.rank
    assert config["r"] == config["lora_alpha"] == max(part.form.rank for part in example.low_rank.values())


def test_equal_parts_give_equal_bytes(tmp_path: Path) -> None:
    example = Example("mixtral", tmp_path)
    first = example.write_adapter()
    second = tmp_path / "again"
    write_adapter(second, example.graph, dict(reversed(example.low_rank.items())), "base")
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in KEPT)


def test_in_a_folder_of_its_own_it_leaves_the_model_beside_it_alone(tmp_path: Path) -> None:
    example = Example("llama", tmp_path)
    base = example.write_base()
    expected = forward(base)
    write_adapter(base / "adapter", example.graph, example.low_rank, "base")
    assert torch.equal(forward(base), expected)
    with pytest.raises(FileExistsError):
        write_adapter(base / "adapter", example.graph, example.low_rank, "base")


def test_what_peft_has_no_place_for_is_refused_by_name_and_nothing_is_written(tmp_path: Path) -> None:
    example = Example("llama", tmp_path)
    name, part = next(iter(example.low_rank.items()))
    graph = replace(
        example.graph,
        family=replace(
            example.graph.family,
            memory={"model.layers.{i}": {"self_attn.qk_proj.weight": "self_attn.q_proj + self_attn.k_proj"}},
        ),
    )
    for given, match in (({name: part}, "no place for the low-rank part of .*q_proj"), ({}, "no weight has")):
        with pytest.raises(UsageError, match=match):
            write_adapter(tmp_path / "adapter", graph, given, "base")
        assert not (tmp_path / "adapter").exists()
