"""Scores of structures, what is fitted anew when some go, and which blocks go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tersely.calibrate import Sequences
from tersely.checkpoint import open_checkpoint
from tersely.errors import UsageError
from tersely.graph import read_graph
from tersely.measure import Statistics
from tersely.methods.cut import CUTS, Importance, Member, Structures
from tersely.methods.cut.minitron import Minitron
from tersely.methods.cut.routed import Routed
from tersely.methods.cut.slicegpt import SliceGPT
from tersely.methods.cut.weight_norm import WeightNorm
from tersely.methods.drop import Blocks
from tersely.methods.drop.block_loss import BlockLoss
from tersely.methods.drop.block_search import BlockSearch
from tersely.methods.drop.block_similarity import BlockSimilarity
from tersely.shape.refit import refitted
from tersely.shape.scoring import score
from tersely.shape.setup import Setup
from tersely.shape.structures import places_of
from tests.tiny import load, tiny

CPU = torch.device("cpu")


def gram(x_TI: Tensor) -> Statistics:
    stats = Statistics(x_TI.shape[1], needs=frozenset({"gram", "mean"}))
    stats.add(x_TI)
    return stats.finish()


def correlated(tokens: int, inputs: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(tokens, inputs // 2, generator=generator)
    mix = torch.randn(inputs // 2, inputs, generator=generator)
    return few @ mix + 0.3 * torch.randn(tokens, inputs, generator=generator)


def test_a_refit_is_the_least_squares_solution_on_what_is_kept() -> None:
    x_TI, weight_OI = correlated(4000, 16), torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    kept = torch.tensor([0, 2, 3, 5, 8, 9, 11, 12, 14])
    found = refitted(weight_OI, None, gram(x_TI), kept).weight_OK
    best = torch.linalg.lstsq(x_TI[:, kept].double(), (x_TI @ weight_OI.t()).double()).solution.t()
    assert found.shape == (5, len(kept))

    def lost(kept_OK: Tensor) -> float:
        return float((x_TI @ weight_OI.t() - x_TI[:, kept] @ kept_OK.float().t()).square().mean())

    # Damping of 1 % of the mean square costs little, and cutting without a refit much.
    assert lost(best) <= lost(found) < 1.05 * lost(best)
    assert lost(found) < 0.5 * lost(weight_OI[:, kept])


def test_inputs_that_are_not_correlated_leave_the_others_as_they_are() -> None:
    x_TI = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    x_TI = torch.linalg.qr(x_TI).Q * 16
    weight_OI, kept = torch.randn(4, 16), torch.arange(0, 16, 2)
    assert torch.allclose(refitted(weight_OI, None, gram(x_TI), kept).weight_OK, weight_OI[:, kept], atol=1e-5)


def test_a_bias_takes_up_the_mean_of_what_goes() -> None:
    x_TI = correlated(3000, 12) + torch.linspace(-3, 3, 12)
    weight_OI, bias_O, kept = torch.randn(4, 12), torch.randn(4), torch.arange(6)
    found = refitted(weight_OI, bias_O, gram(x_TI), kept)
    assert found.bias_O is not None
    before, after = x_TI @ weight_OI.t() + bias_O, x_TI[:, kept] @ found.weight_OK.t() + found.bias_O
    assert torch.allclose(before.mean(0), after.mean(0), atol=1e-3)


def test_too_few_tokens_only_cut_and_it_is_said() -> None:
    found = refitted(torch.ones(2, 8), None, gram(torch.randn(7, 8)), torch.arange(4))
    assert found.note == "7 calibration tokens for 8 inputs: not refitted"
    assert torch.equal(found.weight_OK, torch.ones(2, 4))


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
def test_principal_directions_are_orthogonal_and_the_first_have_the_most_energy(centred: bool) -> None:
    x_TD = correlated(500, 24)
    if centred:
        x_TD = x_TD - x_TD.mean(1, keepdim=True)
    basis_DD = SliceGPT().basis(x_TD.t() @ x_TD, 10, centred=centred).double()
    assert torch.allclose(basis_DD @ basis_DD.t(), torch.eye(24).double(), atol=1e-5)
    turned = x_TD.double() @ basis_DD
    energy = turned.square().sum(0)
    best = torch.linalg.eigvalsh((x_TD.t() @ x_TD).double()).flip(0)
    if centred:
        ones = torch.ones(24).double()
        assert torch.allclose(ones @ basis_DD, ones, atol=1e-5)
        # A LayerNorm over the kept coordinates removes the one direction that is not theirs.
        own = turned[:, :10] - turned[:, :10].mean(1, keepdim=True)
        assert torch.isclose(own.square().sum(), best[:9].sum(), rtol=1e-5)
    else:
        assert torch.allclose(energy, best, rtol=1e-4, atol=1e-3)


def test_what_lies_in_a_subspace_is_sliced_without_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(300, 6, generator=generator) @ torch.randn(6, 20, generator=generator)
    basis_DD = SliceGPT().basis(x_TD.t() @ x_TD, 6, centred=False)
    assert (x_TD @ basis_DD)[:, 6:].abs().max() < 1e-3


PLACES = [("llama", "neurons"), ("llama", "heads"), ("llama", "hidden"), ("mixtral", "experts")]
MEASURED = [
    (model_type, kind, method)
    for method in CUTS
    for model_type, kind in PLACES
    if kind in method().kinds and not method().needs & {"second_moments", "gates"}
]


@pytest.mark.parametrize(("model_type", "kind", "method"), MEASURED, ids=lambda value: getattr(value, "name", value))
def test_what_is_measured_of_a_model_is_what_its_hooks_see(
    model_type: Any, kind: Any, method: Callable[[], Importance], tmp_path: Path
) -> None:
    folder = tiny(model_type, tmp_path / "model")
    checkpoint = open_checkpoint(folder)
    graph = read_graph(checkpoint)
    ids = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    data = Sequences(tuple(ids), "documents", (0,) * len(ids), "")
    setup = Setup(data, {}, torch.float32, CPU, 0, False, lambda *_: None)
    places = places_of(graph, kind)
    found = score(checkpoint, graph, places, method(), setup)
    assert all(
        len(own) == place.count and bool(own.isfinite().all()) for own, place in zip(found.scores, places, strict=True)
    )
    again = score(checkpoint, graph, places, method(), setup)
    assert all(torch.equal(one, other) for one, other in zip(found.scores, again.scores, strict=True))
    if method is Minitron and kind == "neurons":
        seen: list[Tensor] = []
        model: Any = load(folder)
        down = model.get_submodule(f"{places[0].unit}.mlp.down_proj")
        down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            model(ids)
        wanted = seen[0].abs().mean(1).square().sum(0).sqrt()
        assert torch.allclose(found.scores[0].float(), wanted, rtol=1e-4)
    if method is Routed:
        outputs = torch.zeros(4)
        model = load(folder)
        model.set_experts_implementation("eager")
        block = model.get_submodule(places[0].unit).mlp

        def watch(module: Any, args: Any, _: Any) -> None:
            hidden, index, weights = args
            for e in range(4):
                tokens, place = (index == e).nonzero(as_tuple=True)
                gate, up = torch.nn.functional.linear(hidden[tokens], module.gate_up_proj[e]).chunk(2, -1)
                own = torch.nn.functional.linear(module.act_fn(gate) * up, module.down_proj[e])
                outputs[e] += (own * weights[tokens, place, None]).norm(dim=-1).sum()

        block.experts.register_forward_hook(watch)
        with torch.no_grad():
            model(ids)
        assert torch.allclose(found.scores[0].float(), outputs, rtol=1e-3)


def structures(weight_GM: Tensor) -> Structures:
    return Structures("neurons", len(weight_GM), [Member(weight_GM), Member(2 * weight_GM)])


def test_the_norm_of_a_structure_is_that_of_all_its_weights() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    assert torch.allclose(WeightNorm()(structures(weight), 0), torch.tensor([5.0, 0.0, 1.0]).double() * 5**0.5)


def fake(losses: Callable[[frozenset[int]], float], candidates: Sequence[int] = range(6)) -> tuple[Blocks, list[int]]:
    asked: list[int] = []

    def ask(sets: Sequence[frozenset[int]]) -> list[float]:
        asked.append(len(sets))
        return [losses(own) for own in sets]

    return Blocks(tuple(candidates), None, ask), asked


def test_a_search_sees_that_two_blocks_stand_in_for_each_other() -> None:
    """Without 1 or without 2 nothing is lost; without both, much."""

    def losses(gone: frozenset[int]) -> float:
        return sum({1: 0.0, 2: 0.01, 3: 0.2}.get(b, 1.0) for b in gone) + 5.0 * ({1, 2} <= gone)

    blocks, asked = fake(losses)
    assert BlockLoss()(blocks, 2) == {1, 2}
    assert BlockSearch()(blocks, 2) == {1, 3}
    assert sum(asked) == BlockLoss().losses(6, 2) + BlockSearch().losses(6, 2)


def test_a_beam_finds_what_a_greedy_search_does_not() -> None:
    table = {frozenset({0}): 0.1, frozenset({1}): 0.2, frozenset({2}): 0.3, frozenset({1, 2}): 0.35}

    def losses(gone: frozenset[int]) -> float:
        return table.get(gone, 1.0 + sum(gone))

    blocks, _ = fake(losses, range(3))
    assert 0 in BlockSearch()(blocks, 2)
    assert BlockSearch(beam=3)(blocks, 2) == {1, 2}


def test_blocks_that_change_least_go_and_spans_lie_in_a_row() -> None:
    alike = torch.zeros(7, 7, dtype=torch.float64)
    for block, cosine in enumerate((0.2, 0.9, 0.5, 0.95, 0.6, 0.1)):
        alike[block, block + 1] = cosine
    alike[2, 4], alike[1, 3], alike[3, 5] = 0.4, 0.3, 0.8
    blocks = Blocks(tuple(range(6)), alike, lambda _: [])
    assert BlockSimilarity()(blocks, 2) == {1, 3}
    assert BlockSimilarity(span=True)(blocks, 2) == {3, 4}
    # No run of candidates is as long: the blocks by themselves.
    assert BlockSimilarity(span=True)(Blocks((1, 3), alike, lambda _: []), 2) == {1, 3}


def test_a_beam_of_none_is_refused() -> None:
    with pytest.raises(UsageError, match="beam=0"):
        BlockSearch(beam=0)
