"""Laws of Compresso: hard concrete gates, what they act on, and their training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tersely.bases import selected
from tersely.calibrate import sequences
from tersely.checkpoint import Checkpoint, open_checkpoint
from tersely.errors import DataError, UsageError
from tersely.graph import Graph, read_graph
from tersely.methods.cut.compresso import LIMIT, Compresso
from tersely.methods.cut.protocol import Kind
from tersely.methods.tune.text import write_texts
from tersely.runtime import load_tokenizer
from tersely.shape.config import resized
from tersely.shape.gate_training import TrainedGates, gates_work, train_gates
from tersely.shape.gates import check_gates, expected_parameters, masked, touches
from tersely.shape.prepared import gated_checkpoint
from tersely.shape.setup import Setup
from tersely.shape.structures import Place, places_of
from tests.tiny import forward, load, tiny

LEGAL: tuple[tuple[str, tuple[Kind, ...]], ...] = (
    ("llama", ("neurons", "heads", "hidden")),
    ("gpt2", ("neurons",)),
    ("gpt_neox", ("neurons",)),
    ("phi3", ("neurons", "heads", "hidden")),
    ("gemma2", ("neurons", "heads")),
    ("mixtral", ("neurons", "heads", "hidden")),
)
PLAIN, SOFT = Compresso(), Compresso(soft=True)
FEW: dict[str, Any] = {"tokens": 600, "batch": 64, "recovery_tokens": 200, "rate": 1e-3}


@dataclass(frozen=True)
class Case:
    checkpoint: Checkpoint
    graph: Graph
    network: nn.Module

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: self.checkpoint[name] for name in self.checkpoint}

    def places(self, *kinds: Kind) -> list[Place]:
        return [place for kind in kinds for place in places_of(self.graph, kind)]

    def train(self, keep: Mapping[Place, int], settings: Compresso, **more: Any) -> TrainedGates:
        return train_gates(self.network, self.graph, keep, more.pop("sequences", texts()), settings, **more)


def case(folder: Path, model_type: str = "llama", **config: Any) -> Case:
    checkpoint = open_checkpoint(tiny(model_type, folder, **config))
    return Case(checkpoint, read_graph(checkpoint), load(checkpoint.path).float())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(tmp_path_factory.mktemp("llama"))


def texts(count: int = 24, length: int = 12) -> list[Tensor]:
    draw = torch.Generator().manual_seed(4)
    return [torch.randint(3, 60, (length - i % 3,), generator=draw) for i in range(count)]


def three_quarters(places: Sequence[Place]) -> dict[Place, int]:
    return {place: max(1, place.count * 3 // 4) for place in places}


def some_gates(places: Sequence[Place], seed: int = 0) -> dict[Place, Tensor]:
    """About three quarters of them open, between a half and one."""
    draw = torch.Generator().manual_seed(seed)
    keep = three_quarters(places)
    return {p: SOFT.settled(torch.rand(p.count, generator=draw) * 4, keep[p]) for p in places}


def write(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(config)))
    return folder


def sliced(folder: Path, own: Case, tensors: Mapping[str, Tensor], gates: Mapping[Place, Tensor]) -> Path:
    """Without the structures whose gates are zero; norms of fewer coordinates as the page says."""
    graph = own.graph
    kept = {place: gate.nonzero()[:, 0] for place, gate in gates.items()}
    wanted = {s: len(kept[place]) * each for place in kept for s, each in place.spaces.items() if s in graph.sizes}
    groups = next((len(kept[p]) for p in kept if p.kind == "heads"), graph.sizes["kv_heads"])
    heads = graph.sizes["heads"] // graph.sizes["kv_heads"] * groups
    config = resized(graph, own.checkpoint.config, {**wanted, "kv_heads": groups, "heads": heads}, "", check=False)
    after = {}
    for name, tensor in tensors.items():
        w = graph.weight(name)
        index = {s: each for place, k in kept.items() if place.holds(w) for s, each in place.index(k).items()}
        after[name] = selected(graph, w, tensor, index, heads) if index else tensor
        if w.kind == "norm" and len(after[name]) < len(tensor):
            after[name] = after[name] * (len(tensor) / len(after[name])) ** 0.5
            config["rms_norm_eps"] = own.checkpoint.config["rms_norm_eps"] * len(tensor) / len(after[name])
    return write(folder, after, config)


def test_gates_have_the_chances_that_the_formula_says() -> None:
    uniform_T = torch.rand(200_000, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    for log_alpha in (-3.0, -1.0, 0.0, 1.3, 4.0):
        gates_T = PLAIN.drawn(torch.full_like(uniform_T, log_alpha), uniform_T)
        assert float(gates_T.min()) >= 0
        assert float(gates_T.max()) <= 1
        chance = float(PLAIN.open_chance(torch.tensor(log_alpha)))
        assert float((gates_T > 0).float().mean()) == pytest.approx(chance, abs=0.005)


def test_gates_that_stand_still_are_near_what_they_were_on_average() -> None:
    uniform_T = torch.rand(100_000, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    for log_alpha in (-1.0, 0.0, 1.0, 2.5, LIMIT):
        mean = float(PLAIN.drawn(torch.full_like(uniform_T, log_alpha), uniform_T).mean())
        assert float(SOFT.settled(torch.tensor([log_alpha]), 1)) == pytest.approx(mean, abs=0.07)


def test_as_many_stay_as_shall_and_they_are_those_that_matter_most() -> None:
    log_alpha_G = torch.tensor([0.5, -2.0, 3.0, 0.5, -4.0])
    assert PLAIN.settled(log_alpha_G, 2).tolist() == [1, 0, 1, 0, 0]
    soft_G = SOFT.settled(log_alpha_G, 2)
    assert (soft_G > 0).tolist() == [True, False, True, False, False]
    assert float(soft_G[0]) < float(soft_G[2]) < 1
    assert float(SOFT.settled(torch.tensor([math.inf]), 1)) == 1


@pytest.mark.parametrize(("model_type", "kinds"), LEGAL, ids=lambda x: x if isinstance(x, str) else "")
def test_open_gates_leave_every_weight_as_it_is(model_type: str, kinds: tuple[Kind, ...], tmp_path: Path) -> None:
    own = case(tmp_path / "model", model_type)
    changed = masked(own.graph, own.tensors, {p: torch.ones(p.count) for p in own.places(*kinds)})
    assert changed
    assert all(torch.equal(value, own.tensors[name]) for name, value in changed.items())


@pytest.mark.parametrize(("model_type", "kinds"), LEGAL, ids=lambda x: x if isinstance(x, str) else "")
def test_a_sliced_model_is_the_masked_model(model_type: str, kinds: tuple[Kind, ...], tmp_path: Path) -> None:
    own = case(tmp_path / "model", model_type)
    gates = some_gates(own.places(*kinds))
    tensors = {**own.tensors, **masked(own.graph, own.tensors, gates)}
    whole = forward(write(tmp_path / "masked", tensors, own.checkpoint.config))
    small = sliced(tmp_path / "sliced", own, tensors, gates)
    assert open_checkpoint(small).parameters < own.checkpoint.parameters
    torch.testing.assert_close(forward(small), whole, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(forward(own.checkpoint.path), whole, atol=1e-2)


def test_a_closed_expert_adds_nothing_and_the_others_are_as_before(tmp_path: Path) -> None:
    own = case(tmp_path / "model", "mixtral")
    first, second = own.places("experts")
    changed = masked(own.graph, own.tensors, {first: torch.tensor([1.0, 0.0, 0.5, 1.0]), second: torch.ones(4)})
    for name, value in changed.items():
        factor = {1: 0.0, 2: 0.5}.get(own.graph.weight(name).expert or 0, 1.0) if ".0.block" in name else 1.0
        assert torch.equal(value, own.tensors[name] * factor)
    assert {own.graph.weight(name).reads.spaces for name in changed} == {("expert",)}


def test_the_expected_size_is_the_mean_size_of_models_that_are_drawn(llama: Case) -> None:
    places = llama.places("neurons", "heads", "hidden")
    own, draw = touches(llama.graph, places), torch.Generator().manual_seed(0)
    everything = expected_parameters(llama.graph, own, {p: torch.ones(p.count) for p in places})
    assert float(everything) == llama.checkpoint.parameters
    chances = {p: 0.3 + 0.7 * torch.rand(p.count, generator=draw) for p in places}
    sizes = [
        float(
            expected_parameters(llama.graph, own, {p: torch.bernoulli(c, generator=draw) for p, c in chances.items()})
        )
        for _ in range(300)
    ]
    expected = float(expected_parameters(llama.graph, own, chances))
    assert sum(sizes) / len(sizes) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("model_type", "kinds"), LEGAL, ids=lambda x: x if isinstance(x, str) else "")
def test_the_expected_size_of_gates_that_are_open_or_closed_is_the_size_of_the_sliced_model(
    model_type: str, kinds: tuple[Kind, ...], tmp_path: Path
) -> None:
    own = case(tmp_path / "model", model_type)
    gates = some_gates(own.places(*kinds))
    parts = touches(own.graph, gates)
    lost = sum(
        sign * expected_parameters(own.graph, parts, {p: chance(g) for p, g in gates.items()})
        for sign, chance in ((1, torch.ones_like), (-1, lambda g: (g > 0).float()))
    )
    small = open_checkpoint(sliced(tmp_path / "sliced", own, own.tensors, gates))
    assert own.checkpoint.parameters - float(lost) == pytest.approx(small.parameters, rel=1e-6)


def test_the_share_that_gates_expect_to_cut_is_driven_to_what_was_asked_for(tmp_path: Path) -> None:
    own = case(tmp_path / "model", blocks=1)
    keep = three_quarters(own.places("neurons", "hidden"))
    found = own.train(keep, Compresso(tokens=20_000, batch=48, recovery_tokens=0, rank=0, penalty_rate=0.3))
    assert len(found.closed) == 2
    for place, share in found.closed.items():
        assert share == pytest.approx(1 - keep[place] / place.count, abs=0.005)


def test_pressure_to_close_gates_grows_while_too_few_are_closed(llama: Case) -> None:
    keep = three_quarters(llama.places("neurons"))
    shares = []
    for penalty_rate in (0.0, 1.0, 10.0):
        settings = Compresso(tokens=1500, batch=128, recovery_tokens=0, rank=0, warm_up=0, penalty_rate=penalty_rate)
        shares.append(sum(llama.train(keep, settings).closed.values()))
    assert shares == sorted(shares)
    assert shares[0] < 0.9 * shares[-1]


def test_neurons_that_do_nothing_are_closed_first(tmp_path: Path) -> None:
    own = case(tmp_path / "model", blocks=1)
    dead = torch.arange(96) % 3 == 0
    with torch.no_grad():
        for block in own.network.model.layers:  # type: ignore[union-attr]
            block.mlp.down_proj.weight.mul_(15)
            block.mlp.down_proj.weight[:, dead] = 0
    written = write_texts(own.network, [3], count=64, length=16, together=64, seed=0)
    keep = dict.fromkeys(own.places("neurons"), 64)
    found = own.train(keep, Compresso(tokens=16_000, batch=64, recovery_tokens=0, rank=0), sequences=written)
    for values_G in found.values.values():
        assert float((values_G[dead] == 0).float().mean()) > 0.9


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_adapters_change_queries_and_values_by_a_matrix_of_low_rank(model_type: str, tmp_path: Path) -> None:
    own = case(tmp_path / "model", model_type)
    found = own.train(three_quarters(own.places("neurons")), Compresso(**FEW, rank=4))
    assert found.weights.keys() == {
        w.name for w in own.graph.weights if w.kind == "linear" and {"q", "v"} & set(w.writes.spaces)
    }
    for name, value in found.weights.items():
        assert 1 <= int(torch.linalg.matrix_rank(value - own.tensors[name], atol=1e-6)) <= 4
    everywhere = own.train(three_quarters(own.places("neurons")), Compresso(**FEW, all_linear=True))
    assert everywhere.weights.keys() == {w.name for w in own.graph.select("linear")}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_adapters_that_are_tuned_afterwards_lower_the_loss_of_the_cut_model(model_type: str, tmp_path: Path) -> None:
    own = case(tmp_path / "model", model_type)
    written = write_texts(own.network, [3], count=8, length=12, together=8, seed=0)
    settings = Compresso(tokens=64, batch=128, recovery_tokens=4000, recovery_rate=0.02)
    keep = three_quarters(own.places("neurons", "heads"))
    found = own.train(keep, settings, sequences=written)

    def loss(weights: Mapping[str, Tensor], folder: str) -> float:
        tensors = {**own.tensors, **weights}
        tensors |= masked(own.graph, tensors, found.values)
        model: Any = load(write(tmp_path / folder, tensors, own.checkpoint.config))
        with torch.no_grad():
            losses = [cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="sum") for ids in written]
        return float(sum(losses)) / sum(len(ids) - 1 for ids in written)

    after = loss(found.weights, "after")
    assert after < 0.9 * loss({}, "before")
    assert after == pytest.approx(found.losses[-1], rel=0.02)


def test_equal_seeds_give_equal_gates_and_weights(llama: Case) -> None:
    keep = three_quarters(llama.places("neurons", "heads"))
    before = {name: value.clone() for name, value in llama.network.state_dict().items()}
    one, same, other = (llama.train(keep, Compresso(**FEW), seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(one.scores[p], same.scores[p]) and torch.equal(one.values[p], same.values[p]) for p in keep)
    assert all(torch.equal(value, same.weights[name]) for name, value in one.weights.items())
    assert not all(torch.equal(one.scores[p], other.scores[p]) for p in keep)
    assert all(torch.equal(value, before[name]) for name, value in llama.network.state_dict().items())
    assert all(int((one.values[p] > 0).sum()) == kept for p, kept in keep.items())
    assert all(float(one.scores[p].abs().max()) <= LIMIT for p in keep)


def test_a_prompt_stands_before_each_sequence_and_is_not_predicted(llama: Case) -> None:
    keep = {place: place.count for place in llama.places("neurons")}
    settings = Compresso(tokens=1, batch=10_000, recovery_tokens=0)
    sequences = [torch.tensor([1, 20, 21, 22, 23, 24, 25, 26]), torch.tensor([1, 30, 31])]
    found = llama.train(keep, settings, sequences=sequences, prompt=[1, 9, 8])
    model: Any = llama.network
    total = tokens = 0.0
    for ids in ([1, 9, 8, 20, 21, 22, 23, 24], [1, 9, 8, 30, 31]):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]])).logits[0, 2:]
        total += float(cross_entropy(logits, torch.tensor(ids[3:]), reduction="sum"))
        tokens += len(ids) - 3
    assert len(found.losses) == 1
    assert found.losses[0] == pytest.approx(total / tokens, rel=1e-5)
    assert all(torch.equal(found.values[p], torch.ones(p.count)) for p in keep)
    with pytest.raises(UsageError, match="12 tokens leave no room in sequences of 8"):
        llama.train(keep, settings, sequences=sequences, prompt=range(12))


def test_what_no_gate_stands_for_is_refused(llama: Case, tmp_path: Path) -> None:
    for model_type, kind, reason in (
        ("gpt2", "hidden", "subtract the mean over all coordinates"),
        ("olmo2", "heads", "divides by the size of all heads together"),
    ):
        graph = read_graph(open_checkpoint(tiny(model_type, tmp_path / model_type)))
        with pytest.raises(UsageError, match=reason):
            check_gates(graph, places_of(graph, kind))  # type: ignore[arg-type]
    own = case(tmp_path / "t5", "t5")
    with pytest.raises(UsageError, match="trains causal language models"):
        own.train(three_quarters(own.places("neurons")), Compresso())
    with pytest.raises(DataError, match="no calibration sequences"):
        llama.train(three_quarters(llama.places("neurons")), Compresso(), sequences=[])
    wrongs: list[dict[str, Any]] = [{"tokens": 0}, {"rank": -1}, {"warm_up": 1.5}, {"gate_rate": -1.0}, {"start": 9.0}]
    for wrong in (*wrongs, {"rank": 0}):
        with pytest.raises(UsageError):
            Compresso(**wrong)


def test_the_estimate_grows_with_the_tokens_and_with_what_is_gated(llama: Case) -> None:
    neurons, more = llama.places("neurons"), llama.places("neurons", "heads")
    least = gates_work(llama.graph, neurons, Compresso(), context=128)
    assert gates_work(llama.graph, neurons, Compresso(tokens=10**6), context=128).flops > least.flops
    assert gates_work(llama.graph, more, Compresso(), context=128).memory > least.memory
    assert least.memory > 4 * llama.checkpoint.parameters


def test_what_is_written_is_the_model_with_gates_and_is_taken_when_a_job_goes_on(
    source: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(source("llama"))
    graph = read_graph(checkpoint)
    own = Case(checkpoint, graph, load(checkpoint.path).float())
    data = sequences(text.read_text(), load_tokenizer(checkpoint.path), context=16, samples=12)
    keep = three_quarters(own.places("neurons", "hidden"))
    settings = Compresso(**FEW, prompt="the cat")

    def make(place: Path, *, resume: bool) -> tuple[Checkpoint, tuple[Tensor, ...], str]:
        setup = Setup(data, {"job": "test"}, torch.float32, torch.device("cpu"), 0, resume, lambda *_: None)
        return gated_checkpoint(checkpoint, graph, keep, settings, place / "gated", setup)

    made, scores, note = make(tmp_path / "one", resume=False)
    again, same, told = make(tmp_path / "one", resume=True)
    other, equal, _ = make(tmp_path / "other", resume=False)
    assert note == told
    assert all(torch.equal(made[name], again[name]) and torch.equal(made[name], other[name]) for name in checkpoint)
    gates = {}
    for place, one, two, three in zip(keep, scores, same, equal, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
        gates[place] = PLAIN.settled(one, keep[place])
    whole = forward(made.path)
    small = sliced(tmp_path / "sliced", own, {name: made[name] for name in made}, gates)
    torch.testing.assert_close(forward(small), whole, atol=1e-4, rtol=1e-4)
