"""GGUF files: codes as they were, and llama.cpp computes and cuts texts as transformers does.

llama.cpp multiplies floats as we do, but rounds the inputs of quantized weights to 8 bits. So the arithmetic of a model
is compared in float32, closely; a compressed one is compared code for code, and in llama.cpp within what those 8 bits
cost: about 0.013 of the logits, where 4-bit weights cost 0.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from tersely.compression import compress
from tersely.errors import OutputError, TerselyError, UsageError
from tersely.export.gguf import write_gguf
from tersely.plan.reading import load_recipe
from tersely.results.gguf import GGUFReport
from tests.tiny import forward, inputs, load, tiny

THEIRS: Any = AutoTokenizer  # untyped in transformers
EIGHT_BITS = 0.03
"""More than what inputs of 8 bits cost, relative to the logits."""
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "rope_type": "longrope",
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "original_max_position_embeddings": 256,
}
POSITIONS = {"original_max_position_embeddings": 256, "max_position_embeddings": 512}
MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 32}),
    "llama-3.1": ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32}}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {}),
    "mixtral": ("mixtral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tied": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": YARN}),
    "qwen3-moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {"blocks": 7}),
    "phi3": ("phi3", {}),
    "phi3-long": ("phi3", {"rope_parameters": LONG, **POSITIONS}),
    "granite": ("granite", {}),
}


def theirs(llama: Any, file: Path, model_type: str) -> Tensor:
    """Logits of the fixed sequences by llama.cpp."""
    with llama(file) as model:
        return torch.stack([model.logits(row) for row in inputs(model_type)["input_ids"].tolist()])


def tensors_of(file: Path) -> dict[str, Tensor]:
    """By the gguf package's own reader and decoder, float32."""
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = torch.from_numpy(np.array(value, dtype=np.float32)).view(*reversed(tensor.shape.tolist()))
    return found


def kinds(report: GGUFReport) -> dict[str, str]:
    return {tensor.name: tensor.kind for tensor in report.tensors}


def error(found: Tensor, wanted: Tensor) -> float:
    """Of the typical token, relative: an expert that another takes the place of does not count."""
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median())


@pytest.mark.parametrize("case", MODELS)
def test_llama_cpp_computes_what_transformers_does(case: str, tmp_path: Path, llama: Any) -> None:
    model_type, overrides = MODELS[case]
    folder = tiny(model_type, tmp_path / "model", **overrides)
    report = write_gguf(folder, tmp_path / "model.gguf")
    assert report.exact
    assert set(kinds(report).values()) == {"F32"}
    ours, found = forward(folder), theirs(llama, tmp_path / "model.gguf", model_type)
    # llama.cpp looks gelu up in a table of 16 bits.
    close = 2e-4 if "gelu" in (folder / "config.json").read_text() else 3e-6
    assert (found - ours).abs().max() < close * ours.abs().max()
    # What a wrong order of rows, a wrong RoPE or a lost bias would do.
    plain = forward(tiny(model_type, tmp_path / "other", seed=1))
    assert (found - plain).abs().max() > 100 * close * ours.abs().max()
    if "rope_parameters" in overrides:
        overrides = {key: value for key, value in overrides.items() if key not in ("rope_parameters", *POSITIONS)}
        unscaled = forward(tiny(model_type, tmp_path / "unscaled", **overrides))
        assert (found - unscaled).abs().max() > 100 * close * ours.abs().max()


SCHEMES = {
    "llama": ["group=32"],
    "mistral": ["group=0", "bits=8"],
    "mixtral": ["group=32", "bits=3"],
    "qwen2": ["group=32", "bits=5"],
    "qwen3": ["group=32", "symmetric=false"],
    "gemma2": ["group=0", "symmetric=false", "bits=6"],
    "gemma3_text": ["group=32"],
    "phi3": ["group=32", "bits=5", "symmetric=false"],
}


@pytest.mark.parametrize("model_type", SCHEMES)
def test_a_compressed_model_is_repacked_code_for_code(model_type: str, tmp_path: Path, llama: Any) -> None:
    """In float16, so that every scale is one that GGUF has."""
    source = tiny(model_type, tmp_path / "source", dtype=torch.float16)
    recipe = load_recipe("w4a16", SCHEMES[model_type])
    compress(source, recipe, tmp_path / "packed")
    compress(source, recipe, tmp_path / "dense", format="dense")
    report = write_gguf(tmp_path / "packed", tmp_path / "packed.gguf")
    write_gguf(tmp_path / "dense", tmp_path / "dense.gguf")
    packed, dense = tensors_of(tmp_path / "packed.gguf"), tensors_of(tmp_path / "dense.gguf")
    assert packed.keys() == dense.keys()
    offsets = [tensor.name for tensor in report.tensors if tensor.kind in ("Q4_1", "Q5_1")]
    assert all(tensor.kept and (tensor.change == 0 or tensor.name in offsets) for tensor in report.tensors)
    for name, kind in kinds(report).items():
        if name in offsets:
            assert (packed[name] - dense[name]).abs().max() < 2e-3 * dense[name].abs().max()
        else:
            # The dense checkpoint rounds scale * (code - zero) to float16.
            assert torch.equal(packed[name].half(), dense[name].half()), (name, kind)
    wanted = forward(tmp_path / "dense")
    found = error(theirs(llama, tmp_path / "packed.gguf", model_type), wanted)
    assert found < EIGHT_BITS
    if "4" in kinds(report)["blk.0.attn_output.weight"]:
        assert error(forward(source), wanted) > 3 * found


OTHERS = {
    "ternary": ("TQ1_0", ""),
    "mxfp4": ("MXFP4", 'scale = "ceil"\nrounding = "nearest"'),
    "hqq": ("Q4_1", "group = 64"),
    "nf4": ("Q8_0", ""),
}


@pytest.mark.parametrize("method", OTHERS)
def test_other_forms_run_in_llama_cpp_too(method: str, tmp_path: Path, llama: Any) -> None:
    kind, settings = OTHERS[method]
    source = tiny("llama", tmp_path / "source", hidden_size=256, intermediate_size=256, head_dim=64)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[[steps]]\nwhere = "linear"\nmethod = "{method}"\n{settings}\n')
    compress(source, recipe, tmp_path / "own", format="tersely")
    compress(source, recipe, tmp_path / "dense", format="dense")
    report = write_gguf(tmp_path / "own", tmp_path / "own.gguf")
    assert kinds(report)["blk.0.attn_q.weight"] == kind
    reasons = {tensor.reason for tensor in report.tensors if not tensor.kept}
    assert reasons == ({"no type holds nf4; Q8_0 is the nearest"} if method == "nf4" else set())
    wanted = forward(tmp_path / "dense")
    found = error(theirs(llama, tmp_path / "own.gguf", "llama"), wanted)
    assert found < EIGHT_BITS
    assert error(forward(source), wanted) > 3 * found


def test_experts_of_a_block_become_one_tensor(tmp_path: Path) -> None:
    source = tiny("mixtral", tmp_path / "source")
    report = write_gguf(source, tmp_path / "model.gguf")
    stacked = next(tensor for tensor in report.tensors if tensor.name == "blk.1.ffn_gate_exps.weight")
    assert stacked.sources == 4
    network: Any = load(source)
    found = tensors_of(tmp_path / "model.gguf")[stacked.name]
    assert torch.equal(found, network.model.layers[1].mlp.experts.gate_up_proj[:, : found.shape[1]])


def test_experts_that_are_stored_in_several_ways_get_the_type_with_most_bits(tmp_path: Path) -> None:
    source, recipe = tiny("mixtral", tmp_path / "source", dtype=torch.float16), tmp_path / "recipe.toml"
    steps = {"experts": 4, "*.experts.1.*": 3, "*.experts.2.w1": 8}
    text = "[[steps]]\nwhere = {!r}\nmethod = 'rtn'\nbits = {}\ngroup = 32\n"
    recipe.write_text("".join(text.format(where, bits) for where, bits in steps.items()))
    compress(source, recipe, tmp_path / "own", format="tersely")
    compress(source, recipe, tmp_path / "dense", format="dense")
    rows = {row.name: row for row in write_gguf(tmp_path / "own", tmp_path / "own.gguf").tensors}
    write_gguf(tmp_path / "dense", tmp_path / "dense.gguf")
    mixed, alike = "blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"
    assert (rows[mixed].kind, rows[mixed].kept, rows[alike].kind, rows[alike].kept) == ("Q8_0", False, "Q4_0", True)
    assert rows[mixed].reason == "its experts are stored in several ways, and a tensor has one type"
    found, wanted = (tensors_of(tmp_path / f"{name}.gguf") for name in ("own", "dense"))
    assert torch.equal(found[alike].half(), wanted[alike].half())
    assert torch.equal(found[mixed][2].half(), wanted[mixed][2].half())
    assert (found[mixed] - wanted[mixed]).abs().max() < 0.005 * wanted[mixed].abs().max()


def test_floats_keep_their_precision(tmp_path: Path) -> None:
    for dtype, kind in ((torch.float16, "F16"), (torch.bfloat16, "BF16")):
        folder = tiny("llama", tmp_path / kind, dtype=dtype)
        report = write_gguf(folder, tmp_path / f"{kind}.gguf")
        assert report.exact
        # llama.cpp wants vectors in float32.
        assert {k for n, k in kinds(report).items() if "norm" not in n} == {kind}
        assert {k for n, k in kinds(report).items() if "norm" in n} == {"F32"}
        found = tensors_of(tmp_path / f"{kind}.gguf")["blk.1.ffn_down.weight"]
        network: Any = load(folder)
        assert torch.equal(found, network.model.layers[1].mlp.down_proj.weight.float())


def test_the_same_folder_gives_the_same_bytes_and_the_report_survives_json(tmp_path: Path) -> None:
    folder = tiny("llama", tmp_path / "model")
    reports = [write_gguf(folder, tmp_path / f"{n}.gguf") for n in (1, 2)]
    first, second = (Path(report.file).read_bytes() for report in reports)
    assert first == second
    assert reports[0].nbytes == len(first)
    assert GGUFReport.from_json(reports[0].to_json()) == reports[0]
    assert reports[0].lines() == (
        "F32: 21 tensors, 279808 bytes, exact",
        "left out: the tokenizer, of which the folder has none",
    )


def test_what_llama_cpp_does_otherwise_is_said(tmp_path: Path) -> None:
    report = write_gguf(tiny("mistral", tmp_path / "model", sliding_window=16), tmp_path / "model.gguf")
    assert report.notes == ("the model looks back 16 tokens; llama.cpp looks at all, so longer contexts differ",)


@pytest.mark.parametrize(
    ("model_type", "overrides", "message"),
    [
        ("opt", {}, "no GGUF for models of type opt; it does for gemma, gemma2, gemma3_text"),
        ("llama", {"hidden_act": "gelu"}, "takes hidden_act = silu for granted, and the config says gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "cannot scale positions by dynamic"),
        ("qwen2", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}}, "by llama3, only by linear"),
        ("qwen3_moe", {}, "takes norm_topk_prob = True for granted, and the config says False"),
        ("gemma2", {"query_pre_attn_scalar": 8}, "takes query_pre_attn_scalar = 16 for granted"),
        ("gemma2", {"tied": False}, "has no head but the embedding"),
        ("gemma2", {"attn_logit_softcapping": None}, "takes attn_logit_softcapping = True for granted"),
        ("phi3", {"head_dim": 32}, r"heads \* head size = hidden size"),
        ("qwen3", {"attention_bias": True}, "o_proj.bias: llama.cpp's qwen3 has no such tensor"),
    ],
)
def test_a_model_that_llama_cpp_does_not_run_is_an_error(
    model_type: str, overrides: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = tiny(model_type, tmp_path / "model", **overrides)
    with pytest.raises(UsageError, match=message):
        write_gguf(folder, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("model.gguf*"))


def test_what_inputs_went_through_is_said_or_undone(tmp_path: Path, llama: Any) -> None:
    source, recipe = tiny("llama", tmp_path / "source"), tmp_path / "recipe.toml"
    step = {"where": "linear", "method": "rtn", "bits": 8, "group": 32, "hadamard": 32, "activations": "int8"}
    recipe.write_text("[[steps]]\n" + "".join(f"{key} = {value!r}\n" for key, value in step.items()))
    compress(source, recipe, tmp_path / "own", format="tersely")
    report = write_gguf(tmp_path / "own", tmp_path / "own.gguf")
    assert report.notes == ("inputs of weights were quantized (int8); llama.cpp quantizes them as it does",)
    assert {tensor.reason for tensor in report.tensors if not tensor.kept} == {
        "no type holds integers behind a Hadamard matrix; Q8_0 is the nearest"
    }
    assert error(theirs(llama, tmp_path / "own.gguf", "llama"), forward(source)) < EIGHT_BITS


def test_an_existing_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(OutputError, match="never overwrites"):
        write_gguf(tiny("llama", tmp_path / "model"), tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_text() == "mine"


def test_a_file_that_cannot_be_finished_does_not_appear(tmp_path: Path) -> None:
    folder = tiny("llama", tmp_path / "model")
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size - 100)
    with pytest.raises(TerselyError):
        write_gguf(folder, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("model.gguf*"))


@pytest.mark.parametrize("name", ["stories-3m", "house-llama", "house-qwen3", "house-mixtral"])
def test_trained_models_run_in_llama_cpp_as_in_transformers(
    name: str, assets: Path, tmp_path: Path, llama: Any
) -> None:
    """Stored in bfloat16, they are widened: llama.cpp would round the inputs of such weights to bfloat16, too."""
    source = assets / "models" / name
    text = (assets / "data/tinystories/sample.txt").read_text("utf-8")[:1000]
    network: Any = load(source)
    ids = THEIRS.from_pretrained(source)(text)["input_ids"][:64]
    wide = tmp_path / name
    network.float().save_pretrained(wide)
    write_gguf(wide, tmp_path / "wide.gguf")
    compress(wide, load_recipe("w4a16", ["group=64"]), tmp_path / "packed", format="tersely")
    compress(wide, load_recipe("w4a16", ["group=64"]), tmp_path / "dense", format="dense")
    report = write_gguf(tmp_path / "packed", tmp_path / "packed.gguf")
    assert max(tensor.change for tensor in report.tensors) < 2**-10
    for written, folder, close in (("wide", wide, 1e-5), ("packed", tmp_path / "dense", EIGHT_BITS)):
        network = load(folder)
        with torch.no_grad():
            ours = network(torch.tensor([ids])).logits[0]
        with llama(tmp_path / f"{written}.gguf") as model:
            assert error(model.logits(ids), ours) < close, written
