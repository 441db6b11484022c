"""Weights that stay packed, and the folders that hold them, in plain transformers."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import linear

from tersely.calibrate import MicroBatch
from tersely.calibrated import running
from tersely.checkpoint import Checkpoint, open_checkpoint
from tersely.codecs import Encoded, Scheme
from tersely.codecs.entrance import Entrance
from tersely.compression import compress
from tersely.errors import CheckpointError, UsageError
from tersely.evaluation.blame import blame
from tersely.evaluation.engines.transformers import TransformersEngine
from tersely.evaluation.swapping import Direction, differences, replaced
from tersely.graph import Graph, read_graph
from tersely.hadamard import hadamard
from tersely.measure import Statistics
from tersely.methods.encode.lqer import LQER
from tersely.methods.encode.rtn import RTN
from tersely.plan.reading import recipe_from_toml
from tersely.plan.recipe import Recipe, Step
from tersely.registration import when_imported
from tersely.runtime import load_model
from tersely.runtime.held import Cell, Held
from tersely.runtime.packed import Packed
from tersely.stored import Entry, open_stored
from tersely.stream import Stop, stream
from tersely.verify import verify
from tests.plain import arguments, logits_of, write_changed
from tests.tiny import forward, inputs, load

CALIBRATION = "[calibration]\nsamples = 12\ncontext = 24\n"


def step(where: str, method: str, **settings: Any) -> str:
    lines = {"where": where, "method": method, **settings}
    return "[[steps]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items())


RECIPES = {
    "integers of several widths": step("linear", "gptq", bits=3, group=16, symmetric=False)
    + step("attention", "rtn", bits=8, group=0),
    "nf4": step("linear", "nf4") + step("attention", "gptq", bits=4, group=16),
    "int4 behind a rotation": step("linear", "gptq", bits=4, group=16, activations="int4", hadamard=16),
    "a low rank beside int8": step("linear", "aser", rank=4, group=16, activations="int8"),
    "a low rank that meets full inputs": step("linear", "lqer", rank=4, group=16, activations="int8", inputs="full"),
    "fp8 with a static scale": step("linear", "fp8", scales="tensor", activations="fp8-static"),
    "two factors": step("linear", "svd_llm", ratio=0.4),
    "two factors of int8 inputs beside integers": step("linear", "asvd", ratio=0.4, activations="int8", hadamard=16)
    + step("*.[gw][a1]*", "rtn", group=16, activations="int8", hadamard=16),
    "two factors, embeddings too": step("linear | embedding", "svd_llm", ratio=0.4),
    "outliers of both": step("linear", "llm_int8", activations="int8-outliers"),
}
CASES = [
    *(("llama", name) for name in RECIPES),
    ("gpt2", "integers of several widths"),
    ("gpt2", "a low rank that meets full inputs"),
    ("mixtral", "int4 behind a rotation"),
    ("mixtral", "a low rank that meets full inputs"),
    ("qwen3_moe", "fp8 with a static scale"),
    ("t5", "nf4"),
    ("t5", "int4 behind a rotation"),
    ("bert", "fp8 with a static scale"),
    ("phi3", "a low rank beside int8"),
    ("phi3", "two factors"),
    ("gpt2", "two factors"),
    ("mixtral", "two factors"),
    ("t5", "two factors"),
    ("mixtral", "two factors of int8 inputs beside integers"),
    ("gpt2", "two factors, embeddings too"),
    ("t5", "two factors, embeddings too"),
    ("gemma2", "two factors, embeddings too"),
]


@pytest.fixture(scope="module")
def mixture(source: Callable[[str], Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a little of everything."""
    out = tmp_path_factory.mktemp("mixture") / "out"
    recipe = (
        step("linear", "nf4")
        + step("attention", "gptq", bits=4, group=16, activations="int8", hadamard=16)
        + step("blocks 1 mlp", "aser", rank=4, group=16, activations="int8")
    )
    compress(source("llama"), recipe_from_toml(recipe + CALIBRATION), out, calibration=text, format="tersely")
    return out


def packed_of(network: nn.Module) -> dict[str, Packed]:
    weights: dict[str, Any] = dict(network.named_parameters())
    return {name: weight for name, weight in weights.items() if isinstance(weight, Packed)}


def names_of(weight: Packed) -> list[str]:
    """Of the stored weights that it holds."""
    return [cell.held.name for cell in weight.cells if isinstance(cell.held, Held)]


@pytest.mark.parametrize(("model_type", "name"), CASES, ids=lambda value: value.replace(" ", "-"))
def test_a_folder_loads_as_the_model_that_compress_had_in_memory(
    model_type: str,
    name: str,
    source: Callable[[str], Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every logit of the last step of the paged forward, bit for bit."""
    logits: list[Tensor] = []
    data: list[MicroBatch] = []

    def watched(c: Checkpoint, g: Graph, batches: tuple[MicroBatch, ...], **settings: Any) -> Iterator[Stop]:
        data.extend(batches)
        return stream(c, g, batches, logits=logits.append, **settings)

    monkeypatch.setattr("tersely.calibrated.stream", watched)
    recipe = recipe_from_toml(RECIPES[name] + CALIBRATION)
    report = compress(source(model_type), recipe, tmp_path / "out", calibration=text, format="tersely")
    found = logits_of(tmp_path / "out", data)
    assert logits
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits, found, strict=True))
    model: Any = load(tmp_path / "out")
    with torch.inference_mode():
        inferred = [model(**arguments(model, batch)).logits for batch in data]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits, inferred, strict=True))
    before = logits_of(source(model_type), data)
    assert any((ours - theirs).abs().max() > 1e-3 for ours, theirs in zip(logits, before, strict=True))
    names = {name for weight in packed_of(model).values() for name in names_of(weight)}
    assert names == {row.name for row in report.rows}
    if model_type == "llama":
        assert verify(tmp_path / "out").ran


def dense_copy(out: Path, source: Path, folder: Path) -> Path:
    """What a folder decodes to, as an ordinary checkpoint."""
    return write_changed(source, folder, dict(open_stored(out)))


@pytest.mark.parametrize(
    ("model_type", "where"),
    [
        ("gpt_neox", "head"),
        ("gpt_neox", "linear | head"),
        ("mixtral", "*.w1"),
        ("mixtral", "blocks 1 experts"),
        ("deepseek_v3", "linear"),
        ("qwen2", "linear"),
        ("opt", "blocks 0"),
        ("llama", "attention"),
    ],
)
def test_a_part_of_a_model_is_packed_and_the_rest_loads_as_it_was(
    model_type: str, where: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    path = source(model_type)
    compress(path, Recipe((Step(where, RTN(bits=3, group=16)),)), tmp_path / "out", format="tersely")
    expected: Any = load(dense_copy(tmp_path / "out", path, tmp_path / "dense"))
    if read_graph(open_checkpoint(path)).has_experts:
        expected.set_experts_implementation("eager")
    with torch.no_grad():
        assert torch.equal(forward(tmp_path / "out"), expected(**inputs(model_type)).logits)
    packed = packed_of(load(tmp_path / "out"))
    plain = dict(expected.named_parameters())
    assert {*packed} < {*plain}
    assert all(torch.equal(weight.dense(), plain[name]) for name, weight in packed.items())


def test_a_table_and_sparse_values_load_as_what_they_decode_to(
    source: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    recipe = recipe_from_toml(step("linear", "squeezellm", bits=3) + CALIBRATION)
    compress(source("llama"), recipe, tmp_path / "out", calibration=text, format="tersely")
    kinds = {part["kind"] for part in stored_groups(tmp_path / "out")[0]["parts"]}
    assert kinds == {"lookup", "sparse"}
    dense = dense_copy(tmp_path / "out", source("llama"), tmp_path / "dense")
    assert torch.equal(forward(tmp_path / "out"), forward(dense))


def stored_groups(out: Path) -> list[Any]:
    groups: list[Any] = json.loads((out / "config.json").read_text())["quantization_config"]["groups"]
    return groups


def test_codes_in_bytes_named_as_the_weight_are_not_taken_for_it(source: Callable[[str], Path], tmp_path: Path) -> None:
    """Their stored name is that of the parameter itself."""
    recipe = recipe_from_toml(step("blocks 0", "rtn", bits=8, group=0, activations="int8"))
    compress(source("llama"), recipe, tmp_path / "ct")
    compress(source("llama"), recipe, tmp_path / "out", format="tersely")
    assert torch.equal(forward(tmp_path / "out"), forward(tmp_path / "ct"))


def test_a_model_without_its_head_loads_too(mixture: Path) -> None:
    whole: Any = load(mixture)
    bare: Any = transformers.AutoModel.from_pretrained(mixture)
    ids_BL = inputs("llama")["input_ids"]
    with torch.no_grad():
        assert torch.equal(bare(ids_BL).last_hidden_state, whole.model(ids_BL).last_hidden_state)


def test_packed_models_generate_move_copy_and_change_their_dtype(mixture: Path) -> None:
    network: Any = load(mixture)
    ids_BL = inputs("llama")["input_ids"]
    with torch.no_grad():
        expected = network(ids_BL).logits
        assert network.generate(ids_BL, max_new_tokens=5, do_sample=False, eos_token_id=None).shape == (2, 14)
        copied = copy.deepcopy(network)
        assert torch.equal(copied(ids_BL).logits, expected)
        half = copied.to(torch.bfloat16)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        assert (half(ids_BL).logits - expected).abs().max() < 1
        assert torch.equal(network(ids_BL).logits, expected)
    assert packed_of(half).keys() == packed_of(network).keys()
    away = half.to("meta")
    assert all(leaf.is_meta for p in packed_of(away).values() for cell in p.cells for leaf in cell.leaves())
    asked: Any = transformers.AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.bfloat16, device_map="auto")
    assert {p.dtype for p in asked.parameters()} == {torch.bfloat16}


def test_packed_models_say_what_they_hold(mixture: Path, source: Callable[[str], Path]) -> None:
    network: Any = load(mixture)
    plain: Any = load(source("llama"))
    assert network.num_parameters() == plain.num_parameters()
    assert {n: (p.shape, p.dtype) for n, p in network.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in plain.named_parameters()
    }
    assert list(network.state_dict()) == list(plain.state_dict())
    packed = packed_of(network)
    assert not any(weight.requires_grad for weight in packed.values())
    stored = open_stored(mixture)
    for weight in packed.values():
        names = [leaf for name in names_of(weight) for leaf in stored.stored_names(name)]
        assert weight.packed_bytes == sum(stored.written.spec(name).nbytes for name in names)
    assert "nf4" in repr(network.model.layers[0].mlp.up_proj.weight)
    hidden = torch.randn(1, 3, 64, requires_grad=True)
    network(inputs_embeds=hidden).logits.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0


def test_what_cannot_be_done_is_refused(mixture: Path, tmp_path: Path) -> None:
    network: Any = load(mixture)
    with pytest.raises(ValueError, match="not serializable"):
        network.save_pretrained(tmp_path / "saved")
    with pytest.raises(UsageError, match="packed experts run one by one"):
        transformers.AutoModelForCausalLM.from_pretrained(mixture, experts_implementation="grouped_mm")
    with pytest.raises(UsageError, match="cannot be offloaded"):
        transformers.AutoModelForCausalLM.from_pretrained(mixture, device_map={"model": "cpu", "lm_head": "disk"})
    weight = network.model.layers[0].self_attn.q_proj.weight
    with pytest.raises(RuntimeError, match="in place"):
        weight.add_(1)
    x = weights(3, 64)
    for misled in (lambda: torch.bmm(x[None], weight[None].mT), lambda: weight[3:9], lambda: weight.t().mv(x[0])):
        with pytest.raises(RuntimeError, match="linear, addmm and matmul only"):
            misled()
    damaged = tmp_path / "damaged"
    shutil.copytree(mixture, damaged)
    config = json.loads((damaged / "config.json").read_text())
    stored = config["quantization_config"]["groups"][0]["weights"]
    name = next(iter(stored))
    stored[name] = [32, 32]
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=name):
        load_model(damaged)


# The tensor itself


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))


def cell(value_OI: Tensor, *, transposed: bool = False, order: int = 0, activations: str = "") -> tuple[Cell, Encoded]:
    """A weight in 4 bits and a low rank that meets full inputs, and what it is encoded as."""
    method = LQER(rank=3, scaled=False, factors="plain", inputs="full", bits=4, group=16)
    encoded = method(hadamard(value_OI, order) if order else value_OI, Statistics(value_OI.shape[1]))
    scheme = Scheme(encoded.forms, activations, order)
    entry = Entry(scheme, value_OI.shape[0], value_OI.shape[1], value_OI.dtype, transposed)
    return Cell(Held("w", entry, encoded.tensors()), entry.shape), encoded


@pytest.mark.parametrize("order", [0, 16])
@pytest.mark.parametrize("activations", ["", "int8"])
def test_products_are_those_of_the_paged_forward(activations: str, order: int) -> None:
    x, bias = weights(5, 32, 1)[None], weights(1, 24, 2)[0]
    entrance = Entrance(order, activations)
    for transposed in (False, True):
        own, encoded = cell(weights(24, 32), transposed=transposed, order=order, activations=activations)
        packed, value = Packed(((own,),), torch.float32), running(encoded, entrance)
        seen = entrance.transformed(x)
        met = value.rounded(seen) if value.rounded is not None else seen
        rest = 0 if value.full is None else (seen - met) @ value.full.t()
        if transposed:
            weight_IO = value.tensor.t().contiguous()
            flat = torch.addmm(bias, met[0], weight_IO) + (rest if isinstance(rest, int) else rest[0])
            assert torch.equal(torch.addmm(bias, x[0], packed), flat)
            assert torch.equal(x @ packed, met @ weight_IO + rest)
            assert torch.equal(torch.matmul(x, packed.t().t()), met @ weight_IO + rest)
        else:
            assert torch.equal(linear(x, packed, bias), linear(met, value.tensor, bias) + rest)
            assert torch.equal(x @ packed.t(), met @ value.tensor.t() + rest)
            assert torch.equal(torch.mm(x[0], packed.T), (met @ value.tensor.t() + rest)[0])


def test_the_parts_of_a_fused_parameter_may_see_different_inputs() -> None:
    parts = [
        cell(weights(8, 32, 1), activations="int8"),
        cell(weights(16, 32, 2), order=8),
        (Cell(weights(4, 32, 3), (4, 32)), None),
    ]
    packed = Packed((tuple(own for own, _ in parts),), torch.float32)
    x, bias = weights(5, 32, 4), weights(1, 28, 5)[0]
    found = linear(x, packed, bias)
    alone = [linear(x, Packed(((own,),), torch.float32)) for own, _ in parts]
    assert torch.allclose(found, torch.cat(alone, 1) + bias, atol=1e-6)
    assert torch.equal(alone[2], linear(x, weights(4, 32, 3)))


@pytest.mark.parametrize("order", [0, 8])
def test_slots_slices_and_values_are_those_of_the_dense_tensor(order: int) -> None:
    rows = [(cell(weights(8, 32, 2 * e))[0], cell(weights(16, 32, 2 * e + 1), order=order)[0]) for e in range(3)]
    packed: Any = Packed(tuple(rows), torch.float32, stacked=True)
    dense = packed.dense()
    assert packed.shape == dense.shape == (3, 24, 32)
    assert packed.stride() == dense.stride()
    views = [
        *((packed[index], dense[index]) for index in (1, torch.tensor(2), -1)),
        (packed[0][8:24], dense[0, 8:24]),
        (packed[1:], dense[1:]),
        (packed.transpose(1, 2), dense.mT),
        (packed[0].t().t(), dense[0]),
    ]
    for ours, theirs in views:
        assert isinstance(ours, Packed)
        assert torch.equal(ours.dense(), theirs)
    assert torch.equal(packed.double() + 1, dense.double() + 1)
    # In the basis of the source, up to rounding.
    assert (packed[0][8:24].dense() - weights(16, 32, 1)).abs().max() < 0.4
    if not order:
        assert type(packed[0][3:9]) is Tensor
        assert torch.equal(packed[0][3:9], dense[0, 3:9])
        assert torch.equal(packed[:, 0, 3], dense[:, 0, 3])
        x = weights(5, 32, 9).expand(3, 5, 32)
        assert torch.equal(torch.bmm(x, packed.mT), torch.bmm(x, dense.mT))
        assert torch.equal(torch.stack([packed[0], packed[1]]), dense[:2])


def test_other_numbers_can_be_put_in_and_what_was_there_back() -> None:
    pair = (cell(weights(8, 32, 0), activations="int8")[0], cell(weights(8, 32, 1))[0])
    packed = Packed((pair,), torch.float32)
    x, other = weights(5, 32, 2), weights(8, 32, 3)
    before, dense = linear(x, packed), packed.dense()
    region = packed.detach()[:8]
    saved = region.clone()
    region.copy_(other)
    assert torch.equal(packed.dense(), torch.cat([other, dense[8:]]))
    assert torch.allclose(linear(x, packed)[:, :8], x @ other.t(), atol=1e-5)
    region.copy_(saved)
    assert torch.equal(linear(x, packed), before)
    target = torch.zeros(16, 32)
    assert torch.equal(target.copy_(packed), dense)


@pytest.mark.parametrize("name", [name for name in RECIPES if "low rank" not in name] + ["sparse"])
def test_large_weights_are_decoded_some_rows_at_a_time(
    name: str, source: Callable[[str], Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_from_toml(RECIPES.get(name, step("linear", "squeezellm", bits=3)) + CALIBRATION)
    compress(source("llama"), recipe, tmp_path / "out", calibration=text, format="tersely")
    whole = forward(tmp_path / "out")
    monkeypatch.setattr("tersely.runtime.held._BLOCK", 64 * 10)
    assert torch.equal(forward(tmp_path / "out"), whole)


# What measures models


@pytest.mark.parametrize("direction", ["restore", "spoil"])
def test_blame_swaps_packed_weights(
    direction: Direction, mixture: Path, source: Callable[[str], Path], text: Path
) -> None:
    """With every weight of the base put in, nothing is lost; with none, all of it."""
    folders = [mixture, source("llama")]
    networks = [load_model(folder) for folder in folders]
    ids_BL = inputs("llama")["input_ids"]
    graph = read_graph(open_stored(mixture))
    found = differences(graph, networks, folders, direction, "cpu")
    assert {swap.name for swap in found.weights} == set(open_stored(mixture).entries)
    running, other = found.networks.running, found.networks.other
    with torch.no_grad():
        before = running(ids_BL).logits
        with replaced([region for swap in found.weights for region in swap.regions]):
            swapped = running(ids_BL).logits
        assert torch.equal(running(ids_BL).logits, before)
        if direction == "restore":
            assert torch.allclose(swapped, other(ids_BL).logits, atol=1e-5)
    measured = blame(mixture, text, against=source("llama"), direction=direction, context=16, samples=2)
    assert {site.name for site in measured.sites} >= {"model.layers.0", "model.layers.1"}


def test_speed_says_that_they_stay_packed(mixture: Path) -> None:
    assert TransformersEngine(load_model(mixture), "cpu").ready.format == "tersely"


# Known to transformers


def test_tersely_first_or_transformers_first() -> None:
    """Here it was tersely, as in every test above; its finder has gone, and the module has the loader that it had."""
    auto = sys.modules["transformers.quantizers.auto"]
    assert type(auto.__loader__).__name__ == "SourceFileLoader"
    assert auto.__spec__ is not None
    assert auto.__spec__.loader is auto.__loader__
    assert not waiting()
    code = "import transformers.quantizers.auto as auto, tersely; print('tersely' in auto.AUTO_QUANTIZER_MAPPING)"
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "True\n"


def waiting() -> list[Any]:
    return [finder for finder in sys.meta_path if type(finder).__module__ == "tersely.registration"]


def test_what_waits_for_a_module_acts_once_and_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tersely_waits_for.py").write_text("done = []\nif flaw: raise ValueError\n")
    (tmp_path / "tersely_other.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    name, did = "tersely_waits_for", list[str]()
    when_imported(name, lambda: did.append("first"))
    importlib.import_module("tersely_other")
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert len(waiting()) == 1
    with pytest.raises(NameError):
        importlib.import_module(name)
    assert not did
    (tmp_path / f"{name}.py").write_text("done = []\n")
    importlib.invalidate_caches()
    module = importlib.import_module(name)
    assert did == ["first"]
    assert not waiting()
    assert module.__spec__ is not None
    assert type(module.__spec__.loader).__name__ == "SourceFileLoader"
    when_imported(name, lambda: did.append("second"))
    assert did == ["first", "second"]
    for made in (name, "tersely_other"):
        del sys.modules[made]
