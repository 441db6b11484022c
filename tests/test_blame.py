"""The laws of blame: what was changed is found, what was not costs nothing, and the models stay as they are."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from tersely.compression import compress
from tersely.errors import CheckpointError, DataError, OutputError, TerselyError, UsageError
from tersely.evaluation import blame as module
from tersely.evaluation import passes, schedule
from tersely.evaluation.blame import blame
from tersely.evaluation.store import Store
from tersely.plan.reading import load_recipe
from tersely.report.blame_tables import blame_table
from tersely.results import Blame
from tersely.runtime import load_model
from tests.plain import write_changed
from tests.tiny import FAMILIES, tiny
from tests.tokens import write_text, write_tokenizer

CAUSAL = tuple(family for family in FAMILIES if family not in ("bert", "t5"))
DOCUMENTS = 24


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """With tensors this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", documents=DOCUMENTS, words=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tiny("llama", tmp_path_factory.mktemp("base"), blocks=4))


def noisy(source: Path, folder: Path, noise: Mapping[str, float]) -> Path:
    """A copy in which each weight whose name holds a word has noise of that size, relative to the weight."""
    draw = torch.Generator().manual_seed(1)

    def change(name: str, tensor: Tensor) -> Tensor:
        size = sum(each for word, each in noise.items() if word in name)
        return tensor + size * tensor.std() * torch.randn(tensor.shape, generator=draw) if size else tensor

    tensors = load_file(source / "model.safetensors")
    write_changed(source, folder, {name: change(name, tensor) for name, tensor in tensors.items()})
    for file in source.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def costs(result: Blame) -> dict[str, float]:
    return {site.name: site.cost.value for site in result.sites}


def test_equal_models_cost_nothing_and_it_is_said(base: Path, text: Path) -> None:
    result = blame(base, text, against=base)
    assert result.sites == ()
    assert "equal" in result.notes[0]
    assert (result.kl.value, result.kl.low, result.kl.high) == (0, 0, 0)
    assert [(depth.error, depth.cosine) for depth in result.depth] == [(0, 1)] * 4


@pytest.mark.parametrize("direction", ["restore", "spoil"])
def test_one_changed_weight_costs_the_whole_kl_and_nothing_else_costs_anything(
    base: Path, text: Path, tmp_path: Path, direction: Any
) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    result = blame(noisy(base, tmp_path / "m", {name: 0.5}), text, against=base, direction=direction)
    assert result.kl.value > 1e-4
    # Restored it leaves exactly nothing, and spoiled it is exactly the model: not one other bit differs.
    assert costs(result) == {"model.layers.2": result.kl.value, name: result.kl.value}
    assert {site.cost for site in result.sites} == {result.sites[0].cost}
    assert {(site.level, site.block, site.role) for site in result.sites} == {
        ("block", 2, "block"),
        ("weight", 2, "mlp"),
    }
    assert [depth.error > 0 for depth in result.depth] == [False, False, True, True]
    assert [depth.cosine < 1 for depth in result.depth] == [False, False, True, True]
    assert result.notes == ()
    assert Blame.from_json(result.to_json()) == result


@pytest.mark.parametrize(
    ("family", "name", "role"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w3.weight", "expert"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", "router"),
        ("qwen3_moe", "model.layers.1.mlp.experts.1.down_proj.weight", "expert"),
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias", "router"),
        ("gpt2", "transformer.h.0.attn.c_attn.weight", "attention"),
        ("gpt2", "transformer.wte.weight", "embedding"),
        ("gpt2", "transformer.wpe.weight", "embedding"),
        ("phi3", "model.layers.0.mlp.gate_up_proj.weight", "mlp"),
        ("llama", "lm_head.weight", "head"),
        ("llama", "model.norm.weight", "norm"),
        ("llama", "model.embed_tokens.weight", "embedding"),
    ],
)
def test_the_changed_weight_is_found_wherever_transformers_has_it_in_memory(
    family: str, name: str, role: str, text: Path, tmp_path: Path
) -> None:
    source = write_tokenizer(tiny(family, tmp_path / "base"))
    result = blame(noisy(source, tmp_path / "m", {name: 0.5}), text, against=source)
    assert result.kl.value > 0
    assert set(costs(result).values()) == {result.kl.value}
    assert [site.role for site in result.sites if site.level == "weight"] == [role]
    assert name in costs(result)
    assert result.notes == ()


@pytest.mark.parametrize(
    ("family", "direction"),
    [*((family, "restore") for family in CAUSAL), *((family, "spoil") for family in ("gpt2", "opt", "qwen3_moe"))],
)
def test_replay_is_bit_exact_and_all_sites_together_explain_everything(
    family: str, direction: Any, text: Path, tmp_path: Path
) -> None:
    """Both are checked in every run, and a failure is a note."""
    source = write_tokenizer(tiny(family, tmp_path / "base", blocks=3))
    model = noisy(source, tmp_path / "m", {"proj": 0.2, "weight": 0.1})
    result = blame(model, text, against=source, direction=direction, samples=2, weights=1)
    assert [note for note in result.notes if "norms differ" not in note and "not asked for" not in note] == []
    assert {site.block for site in result.sites if site.level == "block"} == {0, 1, 2}


def test_one_block_with_all_that_differs_leaves_nothing(base: Path, text: Path, tmp_path: Path) -> None:
    result = blame(noisy(base, tmp_path / "m", {"layers.1.": 0.2}), text, against=base)
    assert costs(result)["model.layers.1"] == result.kl.value
    assert "norms differ as well in block 1" in result.notes[0]
    assert {site.role for site in result.sites} == {"block", "attention", "mlp", "norm"}


@pytest.mark.parametrize("part", ["self_attn.o_proj", "mlp.down_proj"])
def test_sites_of_a_noise_ladder_are_ranked_by_noise(base: Path, text: Path, tmp_path: Path, part: str) -> None:
    """Alone in the base; in the compressed model the errors of small sites drown in those of large ones."""
    ladder = {1: 0.8, 3: 0.1, 0: 0.01, 2: 0.001}
    model = noisy(base, tmp_path / "m", {f"layers.{n}.{part}": noise for n, noise in ladder.items()})
    spoiled = blame(model, text, against=base, direction="spoil")
    restored = blame(model, text, against=base)
    for level in ("block", "weight"):
        assert [site.block for site in spoiled.sites if site.level == level] == list(ladder)
        assert next(site.block for site in restored.sites if site.level == level) == 1
    assert spoiled.kl == restored.kl


def test_the_head_of_a_tied_model_is_swapped_with_its_embedding(text: Path, tmp_path: Path) -> None:
    source = write_tokenizer(tiny("llama", tmp_path / "base", tied=True))
    result = blame(noisy(source, tmp_path / "m", {"embed_tokens": 0.2}), text, against=source)
    assert costs(result) == {"model.embed_tokens.weight": result.kl.value}


def test_a_head_that_only_the_model_has_is_a_site_of_its_own(text: Path, tmp_path: Path) -> None:
    source = write_tokenizer(tiny("llama", tmp_path / "base", tied=True))
    model = noisy(source, tmp_path / "m", {})
    tensors = load_file(source / "model.safetensors")
    draw = torch.Generator().manual_seed(2)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 0.05 * torch.randn(64, 64, generator=draw)
    write_changed(source, model, tensors)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    result = blame(model, text, against=source)
    assert costs(result) == {"lm_head.weight": result.kl.value}
    assert result.kl.value > 0
    spoiled = blame(model, text, against=source, direction="spoil")
    assert spoiled.sites == ()
    assert "lm_head.weight cannot be swapped alone" in " ".join(spoiled.notes)


class Watched:
    """Stands before load_model and keeps what it loaded, with a copy of every tensor."""

    def __init__(self, load: Callable[..., Any]) -> None:
        self.load = load
        self.loaded: list[tuple[Any, dict[str, Tensor]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        network = self.load(*args, **kwargs)
        self.loaded.append((network, {name: tensor.clone() for name, tensor in network.state_dict().items()}))
        return network

    def unchanged(self) -> bool:
        return all(
            torch.equal(network.state_dict()[name], before)
            for network, tensors in self.loaded
            for name, before in tensors.items()
        ) and not any(
            "forward" in part.__dict__ or part._forward_hooks
            for network, _ in self.loaded
            for part in network.modules()
        )


class KilledError(Exception):
    pass


def killing(after: int) -> Callable[[str, float], None]:
    calls = iter(range(after))

    def progress(_what: str, _share: float) -> None:
        if next(calls, None) is None:
            raise KilledError

    return progress


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("direction", ["restore", "spoil"])
def test_the_models_are_bit_identical_before_and_after_also_after_an_exception(
    family: str, direction: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tokenizer(tiny(family, tmp_path / "base"))
    model = noisy(source, tmp_path / "m", {"weight": 0.1})
    files = {path: path.read_bytes() for folder in (source, model) for path in folder.iterdir()}
    watched = Watched(load_model)
    monkeypatch.setattr(module, "load_model", watched)
    blame(model, text, against=source, direction=direction, samples=2)
    assert watched.unchanged()
    divergences = passes._divergences
    calls = 0

    def failing(*args: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KilledError
        return divergences(*args)

    monkeypatch.setattr(passes, "_divergences", failing)
    with pytest.raises(KilledError):
        blame(model, text, against=source, direction=direction, samples=2)
    monkeypatch.setattr(passes, "_divergences", divergences)
    logits = passes._logits
    calls = 0

    def broken(*args: Any) -> Tensor:
        """Fails while a site is swapped."""
        nonlocal calls
        calls += 1
        if calls == 12:
            raise KilledError
        return logits(*args)

    monkeypatch.setattr(passes, "_logits", broken)
    with pytest.raises(KilledError):
        blame(model, text, against=source, direction=direction, samples=2)
    assert len(watched.loaded) == 6
    assert watched.unchanged()
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.parametrize("after", [4, 9, 40])
def test_a_run_that_was_killed_continues_and_ends_as_one_that_was_not(
    base: Path, text: Path, tmp_path: Path, after: int
) -> None:
    model = noisy(base, tmp_path / "m", {"weight": 0.1})
    kept: dict[str, bytes] = {}
    settings: dict[str, Any] = {"against": base, "tokens_per_batch": 100, "samples": 6}
    with pytest.raises(KilledError):
        blame(model, text, **settings, unfinished=kept, progress=killing(after))
    before = dict(kept)
    resumed = blame(model, text, **settings, unfinished=kept)
    assert resumed == blame(model, text, **settings)
    assert {name: kept[name] for name in before} == before
    assert len(before) < len(kept)


def test_what_is_kept_is_measured_only_once(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = noisy(base, tmp_path / "m", {"weight": 0.1})
    kept: dict[str, bytes] = {}
    first = blame(model, text, against=base, samples=4, unfinished=kept)
    made: list[Any] = []
    logits = passes._logits

    def counting(*args: Any) -> Tensor:
        made.append(args)
        return logits(*args)

    monkeypatch.setattr(passes, "_logits", counting)
    assert blame(model, text, against=base, samples=4, unfinished=kept) == first
    assert len(made) <= 7  # those of the check
    with pytest.raises(OutputError, match="another measurement"):
        blame(model, text, against=base, samples=4, direction="spoil", unfinished=kept)


def test_a_store_keeps_what_a_killed_run_had_and_then_the_result_alone(base: Path, text: Path, tmp_path: Path) -> None:
    model = noisy(base, tmp_path / "m", {"layers.1.mlp": 0.1})
    with Store(tmp_path / "runs.sqlite") as store:
        with pytest.raises(KilledError):
            blame(model, text, against=base, samples=4, store=store, progress=killing(4))
        result = blame(model, text, against=base, samples=4, store=store)
        assert [run.result for run in store.runs(kind="blame")] == [result]
        with pytest.raises(UsageError, match="one place"):
            blame(model, text, against=base, store=store, unfinished={})
    assert result == blame(model, text, against=base, samples=4)


def test_a_bound_on_memory_changes_nothing_but_time(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = noisy(base, tmp_path / "m", {"weight": 0.1})
    settings: dict[str, Any] = {"against": base, "tokens_per_batch": 100, "samples": 8}
    ample = blame(model, text, **settings)
    monkeypatch.setattr(passes, "KEPT_BYTES", 0)
    assert blame(model, text, **settings) == ample


class Time:
    """A clock that only computing moves on: a millisecond for each token of each block, and one to begin with."""

    def __init__(self, load: Callable[..., Any]) -> None:
        self.now = 1000.0
        self.load = load

    def __call__(self) -> float:
        return self.now

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        network = self.load(*args, **kwargs)
        for block in network.model.layers:
            own = block.forward

            def forward(hidden_BLD: Tensor, *args: Any, own: Any = own, **kwargs: Any) -> Any:
                self.now += 1e-3 * hidden_BLD.shape[0] * hidden_BLD.shape[1]
                return own(hidden_BLD, *args, **kwargs)

            block.forward = forward
        return network


def test_the_time_given_is_kept_and_what_was_not_reached_is_named(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = noisy(base, tmp_path / "m", {"proj": 0.1})
    time = Time(load_model)
    monkeypatch.setattr(schedule, "monotonic", time)
    monkeypatch.setattr(module, "load_model", time.load_model)
    measured: list[int] = []
    documents: list[int] = []
    for budget in (4.0, 8.0, 16.0, 32.0, 60.0, 500.0):
        start = time.now
        result = blame(model, text, against=base, budget=budget, tokens_per_batch=512)
        assert time.now - start <= 1.15 * budget
        assert result.seconds == pytest.approx(time.now - start)
        assert sum(site.level == "block" for site in result.sites) == 4
        measured.append(sum(site.level == "weight" for site in result.sites))
        documents.append(result.documents)
        reached = {site.block for site in result.sites if site.level == "weight"}
        said = " ".join(result.notes)
        for block in range(4):
            own = sum(site.block == block and site.level == "weight" for site in result.sites)
            if block not in reached:
                assert f"not reached in {budget:g} s; give more time" in said
            elif own < 7:
                assert f"{7 - own} of 7 weights of block {block} not reached" in said
        if documents[-1] < DOCUMENTS:
            assert f"{documents[-1]} of {DOCUMENTS} documents" in said
            assert time.now - start >= 0.75 * budget
        dearest = next(site.block for site in result.sites if site.level == "block")
        assert not reached or dearest in reached
    assert documents == sorted(documents)
    assert documents[0] < 16 <= documents[3]
    assert measured[0] < 28 == measured[-1]
    assert documents[-1] == DOCUMENTS
    assert result.notes == ()


def test_a_budget_too_small_for_one_document_says_which_blocks_it_did_not_reach(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = Time(load_model)
    monkeypatch.setattr(schedule, "monotonic", time)
    monkeypatch.setattr(module, "load_model", time.load_model)
    result = blame(noisy(base, tmp_path / "m", {"proj": 0.1}), text, against=base, budget=0.1)
    assert result.documents == 1
    assert result.kl.value > 0
    assert result.kl.stderr == math.inf
    assert "blocks 0, 1, 2, 3 not reached in 0.1 s; give more time" in result.notes


def test_a_run_with_a_budget_continues_with_the_sample_that_it_began_with(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = noisy(base, tmp_path / "m", {"proj": 0.1})
    time = Time(load_model)
    monkeypatch.setattr(schedule, "monotonic", time)
    monkeypatch.setattr(module, "load_model", time.load_model)
    kept: dict[str, bytes] = {}
    settings: dict[str, Any] = {"against": base, "budget": 16.0}
    with pytest.raises(KilledError):
        blame(model, text, **settings, unfinished=kept, progress=killing(12))
    resumed = blame(model, text, **settings, unfinished=kept)
    whole = blame(model, text, **settings)
    assert (resumed.sha256, resumed.kl, resumed.depth) == (whole.sha256, whole.kl, whole.depth)
    assert costs(whole).items() <= costs(resumed).items()


def test_where_blocks_cannot_be_replayed_whole_passes_give_the_same_and_it_is_noted(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose last block wants to know that the first one has run."""

    def load_entangled(*args: Any, **kwargs: Any) -> Any:
        network: Any = load_model(*args, **kwargs)
        first, last = network.model.layers[0], network.model.layers[-1]
        own_first, own_last = first.forward, last.forward
        fresh = [False]

        def run_first(*args: Any, **kwargs: Any) -> Any:
            fresh[0] = True
            return own_first(*args, **kwargs)

        def run_last(*args: Any, **kwargs: Any) -> Any:
            scale, fresh[0] = (1.0 if fresh[0] else 1.5), False
            return scale * own_last(*args, **kwargs)

        first.forward, last.forward = run_first, run_last
        return network

    name = "model.layers.2.mlp.up_proj.weight"
    model = noisy(base, tmp_path / "m", {name: 0.5})
    plain = blame(model, text, against=base)
    monkeypatch.setattr(module, "load_model", load_entangled)
    result = blame(model, text, against=base)
    assert "measured by a whole pass" in result.notes[0]
    assert costs(result) == costs(plain)


def test_what_differs_beside_the_weights_is_not_passed_over(base: Path, text: Path, tmp_path: Path) -> None:
    model = noisy(base, tmp_path / "m", {"layers.0.mlp": 0.1})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    result = blame(model, text, against=base, samples=2)
    assert any("not all that differs" in note for note in result.notes)


@pytest.mark.parametrize(("family", "inner"), [("llama", 48), ("mixtral", 48), ("mixtral", 72)])
@pytest.mark.parametrize("direction", ["restore", "spoil"])
def test_a_pruned_mlp_is_swapped_with_its_block_and_its_weights_are_named(
    text: Path, tmp_path: Path, family: str, inner: int, direction: Any
) -> None:
    source = write_tokenizer(tiny(family, tmp_path / "base", blocks=1))

    def cut(name: str, tensor: Tensor) -> Tensor:
        if name.endswith(("gate_proj.weight", "up_proj.weight", "w1.weight", "w3.weight")):
            return tensor[:inner]
        return tensor[:, :inner] if name.endswith(("down_proj.weight", "w2.weight")) else tensor

    model = noisy(source, tmp_path / "m", {})
    tensors = load_file(source / "model.safetensors")
    write_changed(source, model, {name: cut(name, tensor) for name, tensor in tensors.items()})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "intermediate_size": inner}))
    result = blame(model, text, against=source, direction=direction, samples=4)
    assert costs(result) == {"model.layers.0": result.kl.value}
    assert result.kl.value > 0
    assert "not swapped, their shapes differ" in result.notes[0]
    shapes = f"[64, {inner}], [64, 96]" if family == "llama" else f"[4, {2 * inner}, 64], [4, 192, 64]"
    assert shapes in result.notes[0]


def test_models_of_other_depth_or_width_say_that_their_blocks_do_not_correspond(
    base: Path, text: Path, tmp_path: Path
) -> None:
    shallow = write_tokenizer(tiny("llama", tmp_path / "shallow", blocks=3))
    result = blame(shallow, text, against=base, samples=2)
    assert any("has 3 blocks" in note for note in result.notes)
    assert result.depth == ()
    assert {site.name for site in result.sites} == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    narrow = write_tokenizer(tiny("llama", tmp_path / "narrow", blocks=4, hidden_size=32, head_dim=16))
    result = blame(narrow, text, against=base, samples=2)
    assert any("hidden states of 32" in note for note in result.notes)
    assert any("lm_head.weight [64, 32], [64, 64]" in note for note in result.notes)
    assert result.sites == ()


def test_bits_are_those_of_the_report_in_the_folder(base: Path, text: Path, tmp_path: Path) -> None:
    model = noisy(base, tmp_path / "m", {"layers.1.mlp": 0.1})
    assert {site.bits for site in blame(model, text, against=base, samples=2).sites} == {None}
    name = "model.layers.1.mlp.up_proj.weight"
    (model / "report.json").write_text(json.dumps({"rows": [{"name": name, "bytes_after": 3456, "parameters": 6144}]}))
    found = {site.name: site for site in blame(model, text, against=base, samples=2).sites}
    assert found[name].bits == 4.5
    assert found["model.layers.1.mlp.down_proj.weight"].bits is None
    block = found["model.layers.1"]
    assert block.parameters == 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96
    assert block.bits == (4.5 * 6144 + 32 * (block.parameters - 6144)) / block.parameters
    (model / "report.json").write_text('{"rows": [{"name": 3}]}')
    assert {site.bits for site in blame(model, text, against=base, samples=2).sites} == {None}


def test_weights_are_counted_from_the_dearest_block_on(base: Path, text: Path, tmp_path: Path) -> None:
    model = noisy(base, tmp_path / "m", {"layers.0.": 0.01, "layers.2.": 0.3})
    result = blame(model, text, against=base, weights=3)
    inner = [site for site in result.sites if site.level == "weight"]
    assert [site.block for site in inner] == [2, 2, 2]
    assert any(note.startswith("weights=3: 15 other") for note in result.notes)
    none = blame(model, text, against=base, weights=0)
    assert {site.level for site in none.sites} == {"block"}


def test_models_of_two_dtypes_run_in_the_wider(base: Path, text: Path, tmp_path: Path) -> None:
    model = noisy(base, tmp_path / "m", {})
    write_changed(base, model, {n: t.bfloat16() for n, t in load_file(base / "model.safetensors").items()})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    result = blame(model, text, against=base, samples=4, weights=0)
    assert (result.model.dtype, result.base.dtype) == ("float32", "float32")
    assert 0 < result.kl.value < 0.01
    assert {site.name for site in result.sites} >= {f"model.layers.{n}" for n in range(4)}


def test_progress_rises_to_one(base: Path, text: Path, tmp_path: Path) -> None:
    said: list[tuple[str, float]] = []
    model = noisy(base, tmp_path / "m", {"layers.1.mlp": 0.1})
    blame(model, text, against=base, samples=4, progress=lambda what, share: said.append((what, share)))
    shares = [share for _, share in said]
    assert shares == sorted(shares)
    assert said[0] == ("loading", 0.0)
    assert said[-1] == ("finished", 1.0)
    assert {"both models", "model.layers.1", "model.layers.1.mlp.up_proj.weight"} <= {what for what, _ in said}


@pytest.mark.parametrize(
    ("changed", "message", "error"),
    [
        ({"direction": "both"}, "expected 'restore'", UsageError),
        ({"budget": 0}, "budget=0: expected more than 0", UsageError),
        ({"samples": 0}, "samples=0", UsageError),
        ({"weights": -1}, "weights=-1", UsageError),
        ({"tokens_per_batch": 0}, "tokens_per_batch=0", UsageError),
        ({"context": 65}, "64 positions", UsageError),
        ({"context": 1}, "at least 2", UsageError),
        ({"samples": DOCUMENTS + 1}, f"only {DOCUMENTS}", DataError),
        ({"device": "tpu"}, "expected cpu", UsageError),
        ({"against": "nowhere"}, "nowhere: no config", CheckpointError),
    ],
)
def test_what_cannot_be_taken_is_refused(
    base: Path, text: Path, changed: dict[str, Any], message: str, error: type[TerselyError]
) -> None:
    with pytest.raises(error, match=message):
        blame(base, text, **{"against": base, **changed})


def test_models_that_cannot_be_compared_are_refused(base: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no config"):
        blame(tmp_path, text, against=base)
    with pytest.raises(DataError, match="no such text file"):
        blame(base, tmp_path / "none.txt", against=base)
    with pytest.raises(UsageError, match="this one is masked"):
        blame(tiny("bert", tmp_path / "bert"), text, against=base)
    wide = write_tokenizer(tiny("llama", tmp_path / "wide", blocks=4, vocab=72))
    with pytest.raises(DataError, match="a vocabulary of 72 and"):
        blame(wide, text, against=base)
    other = noisy(base, tmp_path / "other", {})
    plain = json.loads((other / "tokenizer.json").read_text())
    vocabulary = plain["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(plain))
    with pytest.raises(DataError, match="tokenizers"):
        blame(other, text, against=base)
    broken = noisy(base, tmp_path / "nan", {"model.norm.weight": math.nan})
    with pytest.raises(CheckpointError, match="NaN"):
        blame(broken, text, against=base)
    quantized = noisy(base, tmp_path / "quantized", {})
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": {}}))
    with pytest.raises(UsageError, match="quantized itself"):
        blame(base, text, against=quantized)


def test_a_compressed_model_is_blamed_and_shown(base: Path, text: Path, tmp_path: Path) -> None:
    compress(base, load_recipe("w3a16", ["group=32"]), tmp_path / "w3")
    result = blame(tmp_path / "w3", text, against=base, samples=8)
    blocks = [site for site in result.sites if site.level == "block"]
    assert len(blocks) == 4
    assert len(result.sites) == 4 + 28
    assert all(site.bits is not None and 3 < site.bits < 5 for site in result.sites)
    assert result.notes == ()
    console = Console(width=120, file=io.StringIO())
    with console.capture() as captured:
        console.print(blame_table(result))
    shown = captured.get()
    assert blocks[0].name in shown
    assert "nats" in shown


@pytest.mark.parametrize("name", ["stories-3m", "house-llama", "house-qwen3", "house-mixtral", "house-gpt2"])
def test_trained_models_are_replayed_bit_by_bit_and_wholly_explained(
    name: str, assets: Path, text: Path, tmp_path: Path
) -> None:
    source = assets / "models" / name
    model = noisy(source, tmp_path / "m", {"layers.": 0.02, ".h.": 0.02})
    result = blame(model, text, against=source, samples=2, weights=0)
    assert [note for note in result.notes if "norms differ" not in note] == []
    assert len(result.sites) == len(result.depth)
    assert all(site.cost.value > 0 for site in result.sites[:2])
