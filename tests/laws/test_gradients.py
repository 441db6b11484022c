"""Gradients that come block by block are those of the whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tersely.calibrate import MicroBatch
from tersely.checkpoint import Checkpoint, open_checkpoint
from tersely.graph import Graph, read_graph, slot
from tersely.stream import build
from tersely.stream.gradients import gradient_bytes, gradients
from tersely.stream.paged import Paged
from tersely.stream.sums import Gradient
from tests.plain import arguments
from tests.tiny import FAMILIES, HIDDEN, load, tiny

CPU = torch.device("cpu")
LENGTHS = (9, 5, 2, 7)
Source = tuple[Checkpoint, Graph]


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 60, (n,), generator=generator) for n in LENGTHS]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Source]:
    """The tiny checkpoint of a family, written once."""
    made: dict[str, Source] = {}

    def get(model_type: str, **settings: Any) -> Source:
        key = f"{model_type}-{sorted(settings.items())}"
        if key not in made:
            checkpoint = open_checkpoint(tiny(model_type, tmp_path_factory.mktemp(model_type), **settings))
            made[key] = checkpoint, read_graph(checkpoint)
        return made[key]

    return get


def measured(source: Source, **settings: Any) -> tuple[list[str], dict[str, Gradient]]:
    """The units in the order in which they come, and the gradients; of all stored weights if none are named."""
    checkpoint, graph = source
    wanted = settings.pop("wanted", [w.name for w in graph.weights])
    units: list[str] = []
    found: dict[str, Gradient] = {}
    for unit, own in gradients(checkpoint, graph, sequences(), wanted=wanted, device=CPU, **settings):
        units.append(unit)
        assert own
        assert not found.keys() & own.keys()
        found |= own
    assert found.keys() == set(wanted)
    return units, found


def of_the_whole_model(source: Source) -> dict[str, tuple[Tensor, Tensor]]:
    """By autograd alone: means over sequences of gradients and of their squares, as (outputs, inputs)."""
    checkpoint, graph = source
    model: Any = load(checkpoint.path)
    named = dict(model.named_parameters(remove_duplicate=False))
    means = {w.name: (torch.zeros(()), torch.zeros(())) for w in graph.weights}
    for ids_L in sequences():
        model.zero_grad()
        logits_LV = model(**arguments(model, MicroBatch((0,), ids_L[None], None)), use_cache=False).logits[0]
        both = (logits_LV, ids_L) if model.config.is_encoder_decoder else (logits_LV[:-1], ids_L[1:])
        cross_entropy(*both).backward()  # type: ignore[no-untyped-call]
        for unit in ("", *graph.units):
            for name, pieces in graph.parameters(unit).items():
                parameter = named.get(f"{unit}.{name}" if unit else name)
                for piece in pieces:
                    if parameter is None or parameter.grad is None:
                        own = torch.zeros(piece.weight.spec.shape)
                    else:
                        own = slot(parameter.grad, piece)
                    own = own.t() if piece.weight.transposed else own
                    mean, square = means[piece.weight.name]
                    means[piece.weight.name] = (mean + own / len(LENGTHS), square + own.square() / len(LENGTHS))
    return means


@pytest.mark.parametrize("model_type", [t for t in FAMILIES if t != "bert"])
def test_paged_gradients_are_those_of_plain_autograd(model_type: str, source: Callable[..., Source]) -> None:
    """Of every stored weight, with few sequences in the model at a time and few positions at the head."""
    _, found = measured(source(model_type), stored_bytes=2 * HIDDEN * 4 * 14, logits_bytes=4 * 64 * 3)
    expected = of_the_whole_model(source(model_type))
    # Some are zero but for rounding, such as of the biases of keys, which no softmax sees.
    noise = 1e-6 * max(float(mean.abs().max()) for mean, _ in expected.values())
    assert found.keys() == expected.keys()
    for name, (mean, square) in expected.items():
        gradient = found[name]
        assert gradient.mean is not None
        assert gradient.square is not None
        atol = 1e-5 * float(mean.abs().max()) + noise
        torch.testing.assert_close(gradient.mean, mean, rtol=0, atol=atol)
        torch.testing.assert_close(gradient.square, square, rtol=0, atol=1e-5 * float(square.max()) + noise**2)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_the_embedding_gathers_the_gradients_of_both(tied: bool, source: Callable[..., Source]) -> None:
    checkpoint, _ = source("llama", tied=tied)
    units, found = measured(source("llama", tied=tied))
    assert units == ([] if tied else [""]) + ["model.layers.1", "model.layers.0", ""]
    model: Any = load(checkpoint.path)
    for ids_L in sequences():
        (model(input_ids=ids_L[None], labels=ids_L[None]).loss / len(LENGTHS)).backward()
    table = model.model.embed_tokens.weight.grad
    atol = 1e-5 * float(table.abs().max())
    torch.testing.assert_close(found["model.embed_tokens.weight"].mean, table, rtol=0, atol=atol)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "t5"])
def test_every_call_gives_the_same_bits_and_groups_change_nothing(
    model_type: str, source: Callable[..., Source]
) -> None:
    """Whether sequences go together or one by one, of all weights or of some, one measure or both."""
    units, once = measured(source(model_type))
    _, again = measured(source(model_type))
    apart_units, apart = measured(source(model_type), stored_bytes=1)
    assert apart_units == units
    _, fishers = measured(source(model_type), needs={"fisher"})
    some = [name for i, name in enumerate(once) if i % 3 == 0]
    _, fewer = measured(source(model_type), wanted=some, needs={"gradient"})
    for name, gradient in once.items():
        assert gradient.mean is not None
        assert gradient.square is not None
        assert torch.equal(again[name].mean, gradient.mean)  # type: ignore[arg-type]
        assert torch.equal(again[name].square, gradient.square)  # type: ignore[arg-type]
        torch.testing.assert_close(apart[name].mean, gradient.mean, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(apart[name].square, gradient.square, rtol=1e-5, atol=1e-7)
        assert fishers[name].mean is None
        assert torch.equal(fishers[name].square, gradient.square)  # type: ignore[arg-type]
        if name in fewer:
            assert fewer[name].square is None
            torch.testing.assert_close(fewer[name].mean, gradient.mean, rtol=1e-4, atol=1e-6)


def test_a_bfloat16_model_gives_float32_gradients(source: Callable[..., Source]) -> None:
    _, found = measured(source("llama"), dtype=torch.bfloat16)
    for name, (mean, _) in of_the_whole_model(source("llama")).items():
        gradient = found[name].mean
        assert gradient is not None
        assert gradient.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), mean.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "t5"])
def test_one_block_is_in_memory_at_a_time(
    model_type: str, source: Callable[..., Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever a layer of a block runs, forth or back, no other block has weights, nor gradients that it keeps."""
    _, graph = source(model_type)
    ran: list[str] = []

    def built(*args: Any) -> Any:
        model = build(*args)

        def look(unit: str) -> Callable[..., None]:
            def before(*_: Any) -> None:
                ran.append(unit)
                for other in graph.units:
                    for parameter in model.get_submodule(other).parameters():
                        assert parameter.is_meta == (other != unit)
                        assert parameter.grad is None

            return before

        for unit in graph.units:
            for layer in model.get_submodule(unit).modules():
                if isinstance(layer, nn.Linear):
                    layer.register_forward_pre_hook(look(unit))
        return model

    monkeypatch.setattr("tersely.stream.paged.build", built)
    measured(source(model_type))
    order = [unit for i, unit in enumerate(ran) if i == 0 or ran[i - 1] != unit]
    back = list(reversed(graph.units))
    assert order == [*graph.units, *(back[1:] if back[0] == graph.units[-1] else back)]


def test_blocks_before_the_first_wanted_weight_run_once(
    source: Callable[..., Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    paged: list[str] = []
    page_in = Paged.page_in

    def noted(self: Paged, unit: str, replaced: Any) -> None:
        paged.append(unit)
        page_in(self, unit, replaced)

    monkeypatch.setattr(Paged, "page_in", noted)
    blocks = [f"model.layers.{i}" for i in range(2)]
    measured(source("llama"), wanted=["model.layers.1.mlp.up_proj.weight"])
    assert paged == [*blocks, blocks[1]]
    paged.clear()
    measured(source("llama"), wanted=["lm_head.weight"])
    assert paged == blocks


def test_a_run_that_is_left_early_or_fails_leaves_nothing_switched(
    source: Callable[..., Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    def modes() -> tuple[int, bool]:
        return torch._C._len_torch_function_stack(), torch.is_grad_enabled()

    checkpoint, graph = source("llama")
    names = [w.name for w in graph.weights]
    before = modes()
    running = gradients(checkpoint, graph, sequences(), wanted=names, device=CPU)
    for _ in range(2):
        next(running)
        assert modes() == before
    running.close()  # type: ignore[attr-defined]
    assert modes() == before

    def built(*args: Any) -> Any:
        model = build(*args)
        model.get_submodule("model.layers.1.mlp.up_proj").register_forward_pre_hook(lambda *_: 1 / 0)
        return model

    monkeypatch.setattr("tersely.stream.paged.build", built)
    with pytest.raises(ZeroDivisionError):
        measured((checkpoint, graph))
    assert modes() == before


def test_the_estimate_holds_all_results_only_where_sequences_go_in_groups(source: Callable[..., Source]) -> None:
    _, graph = source("llama", blocks=6)
    names = [w.name for w in graph.select("linear")]
    results = sum(4 * graph.weight(name).rows * graph.weight(name).columns for name in names)
    together = gradient_bytes(graph, names, LENGTHS, needs={"fisher"})
    assert gradient_bytes(graph, names, LENGTHS, needs={"fisher"}, held=True) > together
    assert gradient_bytes(graph, names, LENGTHS) > together
    assert gradient_bytes(graph, names, LENGTHS, needs={"fisher"}, stored_bytes=1) > results
    assert gradient_bytes(graph, names, (9,) * 100) < gradient_bytes(graph, names, (9,) * 200)
    few, many = (gradient_bytes(graph, names, (9,) * count, stored_bytes=100_000) for count in (100, 200))
    assert few == many
