"""Laws of tuning whole models and single blocks, on tiny ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersely.checkpoint import open_checkpoint
from tersely.codecs import Encoded
from tersely.codecs.ternary import Ternary, TernaryForm, ternarize
from tersely.errors import DataError, UsageError
from tersely.graph import Graph, read_graph
from tersely.measure import Statistics
from tersely.methods.encode.aqlm import AQLM
from tersely.methods.encode.rtn import RTN
from tersely.methods.tune import (
    PV,
    TUNES,
    Descent,
    Distill,
    SignRound,
    Tuned,
    rounding_work,
    tune_block,
    tune_model,
    tuning_work,
)
from tersely.methods.tune.divergence import divergence
from tersely.methods.tune.text import write_texts
from tersely.methods.tune.trainable import trainable
from tests.tiny import load, tiny

GROUP = 16
FEW: dict[str, Any] = {"tokens": 600, "batch": 150, "own_texts": 4, "held_out": 4, "checks": 4}


def texts(count: int = 16, length: int = 14) -> list[Tensor]:
    draw = torch.Generator().manual_seed(4)
    return [torch.randint(3, 60, (length - i % 3,), generator=draw) for i in range(count)]


def rounded(weight_OI: Tensor, bits: int = 3) -> Encoded:
    return RTN(bits=bits, group=GROUP)(weight_OI, Statistics(weight_OI.shape[1]))


def ternary(weight_OI: Tensor) -> Encoded:
    codes, scale = ternarize(weight_OI, GROUP)
    return Encoded((Ternary(codes, scale, TernaryForm(GROUP, "trits")),))


def vectors(weight_OI: Tensor) -> Encoded:
    return AQLM(codebooks=2, bits=3, group=4, rounds=1)(weight_OI, Statistics(weight_OI.shape[1]))


@dataclasses.dataclass(frozen=True)
class Case:
    network: nn.Module
    graph: Graph
    encoded: Mapping[str, Encoded]
    weights: Mapping[str, Tensor]

    def tune(self, settings: Any, **more: Any) -> Descent[Tuned]:
        return tune_model(self.network, self.graph, self.encoded, texts(), settings, **more)


def case(folder: Path, model_type: str = "llama", encode: Any = rounded, **settings: Any) -> Case:
    checkpoint = open_checkpoint(tiny(model_type, folder, blocks=1, **settings))
    graph = read_graph(checkpoint)
    weights = {w.name: checkpoint[w.name].t() if w.transposed else checkpoint[w.name] for w in graph.select("linear")}
    return Case(load(checkpoint.path).float(), graph, {n: encode(w) for n, w in weights.items()}, weights)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(tmp_path_factory.mktemp("llama"))


def codes(found: Descent[Tuned]) -> dict[str, Tensor]:
    return {name: own.parts[0].codes_OI for name, own in found.best.encoded.items()}  # type: ignore[attr-defined]


def same(one: Mapping[str, Encoded], other: Mapping[str, Encoded]) -> bool:
    return all(
        torch.equal(tensor, other[name].tensors()[leaf])
        for name, own in one.items()
        for leaf, tensor in own.tensors().items()
    )


def measured(parent: nn.Module, folder: Path, own: Case, tuned: Tuned) -> float:
    """KL to the parent on the last four texts, of an ordinary checkpoint with the decoded weights."""
    student = load(folder).float()
    state = student.state_dict()
    for name, value in {**{n: e.decode() for n, e in tuned.encoded.items()}, **tuned.vectors}.items():
        state[name].copy_(value.t() if name in own.encoded and own.graph.weight(name).transposed else value)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for ids_L in texts()[-4:]:
            logits = [model(ids_L[None, :-1]).logits[0] for model in (parent, student)]
            total += float(divergence(*logits))
            tokens += len(ids_L) - 1
    return total / tokens


# Whole models


@pytest.mark.parametrize("encode", [rounded, ternary, vectors])
@pytest.mark.parametrize("settings", [Distill(rate=0.02, value_rate=0.01, **FEW), PV(value_rate=0.01, **FEW)])
def test_tuning_brings_a_model_nearer_to_its_parent_and_the_score_is_that_of_what_is_stored(
    settings: Any, encode: Any, tmp_path: Path
) -> None:
    own = case(tmp_path, encode=encode)
    found = own.tune(settings)
    assert found.after < 0.98 * found.before
    assert found.after == pytest.approx(measured(own.network, tmp_path, own, found.best), rel=1e-4)
    assert {n: e.forms for n, e in found.best.encoded.items()} == {n: e.forms for n, e in own.encoded.items()}


def test_the_parent_stays_as_it_is(llama: Case) -> None:
    before = {name: p.clone() for name, p in llama.network.named_parameters()}
    llama.tune(Distill(norm_rate=0.01, **FEW))
    assert all(torch.equal(p, before[name]) for name, p in llama.network.named_parameters())
    assert all(p.grad is None for p in llama.network.parameters())


@pytest.mark.parametrize("settings", [Distill(**FEW), PV(**FEW)])
def test_equal_seeds_give_equal_bytes_and_other_seeds_others(llama: Case, settings: Any) -> None:
    first, again, other = (llama.tune(settings, seed=seed).best.encoded for seed in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize("method", [Distill, PV])
def test_without_rates_nothing_moves(llama: Case, method: Any) -> None:
    """PV (d)."""
    found = llama.tune(method(rate=0.0, value_rate=0.0, **FEW))
    assert same(found.best.encoded, llama.encoded)
    assert found.after == found.before
    assert not found.losses


@pytest.mark.parametrize("method", [Distill, PV])
def test_without_a_rate_of_codes_only_scales_move(llama: Case, method: Any) -> None:
    """PV (c)."""
    found = llama.tune(method(rate=0.0, value_rate=0.01, **FEW))
    assert found.after < found.before
    assert all(torch.equal(own, llama.encoded[n].parts[0].codes_OI) for n, own in codes(found).items())  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", [Distill, PV])
def test_a_descent_that_goes_astray_gives_its_start_back(llama: Case, method: Any) -> None:
    """PV (f): the score of what is kept never rises."""
    found = llama.tune(method(rate=50.0, value_rate=5.0, **FEW))
    assert found.after <= found.before
    assert same(found.best.encoded, llama.encoded)


def test_in_every_step_of_pv_at_most_its_share_of_codes_changes(llama: Case) -> None:
    """PV (b), over whole descents of one step."""
    step = {**FEW, "tokens": 1, "checks": 1}
    found = llama.tune(PV(rate=0.6, value_rate=0.0, change=0.02, **step))
    free = llama.tune(Distill(rate=0.6, value_rate=0.0, **step))
    moved = {n: (own != llama.encoded[n].parts[0].codes_OI).float().mean() for n, own in codes(found).items()}  # type: ignore[attr-defined]
    assert len(found.losses) == len(free.losses) == 1
    assert max(moved.values()) <= 0.02


def test_norms_move_only_when_they_are_told_to(llama: Case, tmp_path: Path) -> None:
    assert not llama.tune(Distill(**FEW)).best.vectors
    own = case(tmp_path, dtype=torch.bfloat16)
    found = own.tune(Distill(rate=0.02, norm_rate=0.02, **FEW))
    norms = {w.name for w in own.graph.weights if w.role == "norm"}
    assert found.best.vectors.keys() == norms
    assert all(v.dtype == torch.bfloat16 for v in found.best.vectors.values())
    assert found.after == pytest.approx(measured(own.network, tmp_path, own, found.best), rel=1e-3)


@pytest.mark.parametrize("norm_rate", [0.0, 0.02])
def test_a_second_tuning_begins_where_the_first_ended(llama: Case, norm_rate: float) -> None:
    first = llama.tune(Distill(rate=0.02, norm_rate=0.02, **FEW))
    after = dataclasses.replace(llama, encoded=first.best.encoded)
    second = after.tune(Distill(rate=0.02, norm_rate=norm_rate, **FEW), vectors=first.best.vectors, seed=1)
    assert second.before == pytest.approx(first.after, rel=1e-5)
    assert second.after <= second.before
    assert second.best.vectors.keys() == first.best.vectors.keys()
    assert norm_rate or all(torch.equal(v, first.best.vectors[n]) for n, v in second.best.vectors.items())


@pytest.mark.parametrize("model_type", ["gpt2", "phi3", "mixtral", "gpt_neox"])
def test_weights_are_found_wherever_transformers_holds_them(model_type: str, tmp_path: Path) -> None:
    """Transposed, fused, and stacked by expert: with nothing tuned, the score is that of the decoded checkpoint."""
    own = case(tmp_path, model_type)
    found = own.tune(Distill(rate=0.0, value_rate=0.02, **{**FEW, "own_texts": 0}))
    assert found.after < found.before
    whole = load(tmp_path)
    from safetensors.torch import save_file

    values = dict(open_checkpoint(tmp_path).items())
    for name, encoded in found.best.encoded.items():
        decoded = encoded.decode()
        values[name] = (decoded.t() if own.graph.weight(name).transposed else decoded).contiguous()
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    save_file(values, tmp_path / "model.safetensors", {"format": "pt"})
    whole = load(tmp_path)
    total = tokens = 0.0
    with torch.no_grad():
        for ids_L in texts()[-4:]:
            total += float(divergence(own.network(ids_L[None, :-1]).logits[0], whole(ids_L[None, :-1]).logits[0]))
            tokens += len(ids_L) - 1
    assert found.after == pytest.approx(total / tokens, rel=1e-4)


def test_from_a_parents_weights_ternary_tuning_ends_lower_than_from_random_ones(tmp_path: Path) -> None:
    """Ternary: at equal steps."""
    own = case(tmp_path, encode=ternary)
    draw = torch.Generator().manual_seed(0)
    chance = {n: ternary(torch.randn(w.shape, generator=draw) * w.std()) for n, w in own.weights.items()}
    settings = Distill(rate=0.02, value_rate=0.01, **FEW)
    from_parent, from_chance = own.tune(settings), dataclasses.replace(own, encoded=chance).tune(settings)
    assert from_parent.after < from_chance.after


def test_models_that_do_not_predict_the_next_token_are_refused(tmp_path: Path) -> None:
    own = case(tmp_path, "bert")
    with pytest.raises(UsageError, match="bert; use signround"):
        own.tune(Distill(**FEW))


def test_one_text_is_too_few(llama: Case) -> None:
    with pytest.raises(DataError, match="1 calibration sequences; give 2"):
        tune_model(llama.network, llama.graph, llama.encoded, texts(1), Distill(**FEW))


def test_the_estimate_grows_with_the_text_and_with_what_is_tuned(llama: Case) -> None:
    tuned = [llama.graph.weight(name) for name in llama.encoded]
    base = tuning_work(llama.graph, tuned, Distill(tokens=1000), context=32, texts=16)
    assert tuning_work(llama.graph, tuned, Distill(tokens=9000), context=32, texts=16).flops > base.flops
    assert tuning_work(llama.graph, tuned[:1], Distill(tokens=1000), context=32, texts=16).memory < base.memory


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_estimate_of_learned_rounding_holds_a_block_what_moves_of_it_and_what_is_recorded(
    model_type: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    graph = read_graph(open_checkpoint(tiny(model_type, tmp_path)))
    tuned = [w for w in graph.weights if w.kind == "linear" and w.unit]
    sequences = (12, 20, 20)

    def memory(sequences: tuple[int, ...], micro: int) -> int:
        return rounding_work(graph, tuned, SignRound(), sequences=sequences, micro=micro, dtype=dtype).memory

    held = []
    for unit in graph.units:
        draw = torch.Generator().manual_seed(0)
        weights = {w.name: torch.randn(w.rows, w.columns, generator=draw) for w in tuned if w.unit == unit}
        parts = {name: rounded(weight_OI) for name, weight_OI in weights.items()}
        views = [view for name, part in parts.items() for view in trainable(part, weights[name], 0.5)]
        # Weights, where latents began, codes; the block; codes as stored, and the best; what moves, and gradients.
        numel = sum(weight_OI.numel() for weight_OI in weights.values())
        moving = sum(t.numel() for view in views for t in (*view.latents, *view.values))
        grams = {w.statistics: w.columns**2 for w in tuned if w.unit == unit}
        held.append((12 + dtype.itemsize + 2) * numel + 8 * moving + 4 * sum(grams.values()))
    recorded = 3 * sum(sequences) * graph.sizes["residual"] * dtype.itemsize
    assert memory(sequences, 20) >= max(held) + recorded
    assert memory(sequences * 2, 20) - memory(sequences, 20) == recorded
    assert memory(sequences, 40) > memory(sequences, 20)


# Text that the parent writes


def test_a_parent_writes_equal_texts_for_equal_seeds_as_long_as_asked(llama: Case) -> None:
    first, again, other = (
        write_texts(llama.network, [7, 9], count=5, length=12, together=3, seed=s) for s in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert [int(text[0]) for text in first] == [7, 9, 7, 9, 7]
    assert all(2 <= len(text) <= 12 for text in first)
    assert all(1 not in text[2:] for text in first), "the end token ends a text"


def test_texts_that_end_early_leave_those_that_go_on_as_they_are(llama: Case) -> None:
    """What is drawn from the model's own predictions is as likely as their entropy says."""
    written = write_texts(llama.network, [7], count=64, length=12, together=64, seed=0)
    assert len({len(text) for text in written}) > 1
    total = entropy = 0.0
    with torch.no_grad():
        for text in written:
            if len(text) > 2:
                logits = llama.network(text[None, :-1]).logits[0]
                total += float(nn.functional.cross_entropy(logits, text[1:], reduction="sum"))
                entropy -= float((logits.softmax(-1) * logits.log_softmax(-1)).sum())
    assert total == pytest.approx(entropy, rel=0.1)


def test_divergence_is_the_same_whole_and_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    parent, student = torch.randn((10, 7), generator=draw), torch.randn((10, 7), generator=draw)
    grads = []
    for elements in (1 << 24, 21):
        monkeypatch.setattr("tersely.methods.tune.divergence._ELEMENTS", elements)
        own = student.clone().requires_grad_()
        total = divergence(parent, own)
        total.backward()  # type: ignore[no-untyped-call]
        grads.append((total.detach(), own.grad))
    expected = (parent.softmax(-1) * (parent.log_softmax(-1) - student.log_softmax(-1))).sum()
    torch.testing.assert_close(grads[0], grads[1])
    torch.testing.assert_close(grads[0][0], expected)


# Blocks


def block_case(bits: int = 3) -> tuple[Any, list[Tensor], list[Tensor], dict[str, Tensor], dict[str, Encoded]]:
    draw = torch.Generator().manual_seed(0)
    weights = {"up": torch.randn((48, 32), generator=draw), "down": torch.randn((32, 48), generator=draw)}
    mix = torch.randn((32, 32), generator=draw)
    inputs = [torch.randn((20, 32), generator=draw) @ mix for _ in range(12)]

    def forward(own: Mapping[str, Tensor], x_TI: Tensor) -> Tensor:
        return x_TI + torch.tanh(x_TI @ own["up"].t() / 40) @ own["down"].t()

    targets = [forward(weights, x) for x in inputs]
    return forward, inputs, targets, weights, {n: rounded(w, bits) for n, w in weights.items()}


@pytest.mark.parametrize("held_out", [0, 4])
@pytest.mark.parametrize("bits", [2, 4])
def test_learned_rounding_brings_a_block_nearer_to_its_outputs(bits: int, held_out: int) -> None:
    forward, inputs, targets, weights, encoded = block_case(bits)
    found = tune_block(
        forward, inputs, targets, weights, encoded, SignRound(steps=60, batch=4, held_out=held_out, checks=6)
    )
    assert found.after < 0.9 * found.before
    decoded = {n: e.decode() for n, e in found.best.items()}
    pairs = list(zip(inputs, targets, strict=True))[-held_out if held_out else 0 :]
    error = sum(float((forward(decoded, x) - y).square().mean()) for x, y in pairs) / len(pairs)
    assert found.after == pytest.approx(error, rel=1e-5)


def test_learned_rounding_is_never_worse_than_its_start() -> None:
    forward, inputs, targets, weights, encoded = block_case()
    found = tune_block(forward, inputs, targets, weights, encoded, SignRound(steps=3, rate=0.5, held_out=0))
    assert found.after <= found.before


def test_learned_rounding_gives_equal_bytes_for_equal_seeds() -> None:
    forward, inputs, targets, weights, encoded = block_case()
    settings = SignRound(steps=10, batch=4)
    first, again = (tune_block(forward, inputs, targets, weights, encoded, settings, seed=3).best for _ in range(2))
    assert same(first, again)


def test_a_block_that_is_exact_stays_as_it_is() -> None:
    forward, inputs, _, weights, encoded = block_case()
    decoded = {n: e.decode() for n, e in encoded.items()}
    targets = [forward(decoded, x) for x in inputs]
    found = tune_block(forward, inputs, targets, weights, encoded, SignRound(steps=5))
    assert found.before == 0
    assert same(found.best, encoded)


# Settings


@pytest.mark.parametrize("method", TUNES)
def test_tuning_methods_are_frozen_dataclasses_with_defaults_and_a_docstring(method: Any) -> None:
    made: Any = method()
    assert method.__doc__
    assert method.name == method.name.lower()
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.batch = 1


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (Distill, {"tokens": 0}),
        (Distill, {"held_out": 0}),
        (Distill, {"rate": -1.0}),
        (Distill, {"norm_rate": float("nan")}),
        (PV, {"change": 1.5}),
        (PV, {"forget": -0.1}),
        (PV, {"own_texts": -1}),
        (SignRound, {"steps": 0}),
        (SignRound, {"held_out": -1}),
    ],
)
def test_settings_out_of_range_are_refused_by_name(method: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        method(**settings)
