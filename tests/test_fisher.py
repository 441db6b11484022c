"""The squared gradients of the loss by the stored weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from tersely.checkpoint import Checkpoint, open_checkpoint
from tersely.errors import CheckpointError, UsageError
from tersely.fisher import fisher_bytes, fishers
from tersely.graph import Graph, read_graph
from tests import tiny

CPU = torch.device("cpu")
Opened = tuple[Checkpoint, Graph]


def sequences(count: int = 3) -> list[Tensor]:
    """Of different lengths."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 60, (5 + 3 * i,), generator=generator) for i in range(count)]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Opened]:
    @cache
    def open_(family: str) -> Opened:
        checkpoint = open_checkpoint(tiny.tiny(family, tmp_path_factory.mktemp(family)))
        return checkpoint, read_graph(checkpoint)

    return open_


def loss_of(model: Any, ids_L: Tensor) -> Tensor:
    """As transformers itself computes it."""
    loss: Tensor = model(input_ids=ids_L[None], labels=ids_L[None]).loss
    return loss


def by_hand(path: Path, names: dict[str, Callable[[Any], tuple[Tensor, Any]]]) -> dict[str, Tensor]:
    """Mean over sequences of squared gradients, a weight's parameter and the place of it in it given for each name."""
    model: Any = tiny.load(path)
    sums: dict[str, Tensor] = {}
    for ids_L in sequences():
        parameters = {name: where(model) for name, where in names.items()}
        gradients = torch.autograd.grad(loss_of(model, ids_L), [parameter for parameter, _ in parameters.values()])
        for (name, (_, place)), gradient in zip(parameters.items(), gradients, strict=True):
            own = place(gradient).square() / len(sequences())
            sums[name] = sums[name] + own if name in sums else own
    return sums


def check(opened: Opened, names: dict[str, Callable[[Any], tuple[Tensor, Any]]]) -> None:
    checkpoint, graph = opened
    found = fishers(checkpoint, graph, sequences(), list(names), CPU)
    expected = by_hand(checkpoint.path, names)
    assert found.keys() == names.keys()
    for name, fisher_OI in found.items():
        weight = graph.weight(name)
        assert fisher_OI.shape == (weight.rows, weight.columns)
        assert fisher_OI.dtype == torch.float32
        assert float(fisher_OI.max()) > 0
        torch.testing.assert_close(fisher_OI, expected[name], rtol=1e-3, atol=1e-5 * float(fisher_OI.max()))


def test_of_a_llama_they_are_what_autograd_gives(opened: Callable[[str], Opened]) -> None:
    check(
        opened("llama"),
        {
            "model.layers.0.self_attn.k_proj.weight": lambda m: (
                m.model.layers[0].self_attn.k_proj.weight,
                lambda g: g,
            ),
            "model.layers.1.mlp.down_proj.weight": lambda m: (m.model.layers[1].mlp.down_proj.weight, lambda g: g),
            "lm_head.weight": lambda m: (m.lm_head.weight, lambda g: g),
        },
    )


def test_of_a_gpt2_they_are_turned_as_outputs_by_inputs(opened: Callable[[str], Opened]) -> None:
    check(
        opened("gpt2"),
        {
            "transformer.h.0.attn.c_attn.weight": lambda m: (m.transformer.h[0].attn.c_attn.weight, lambda g: g.t()),
            "transformer.h.1.mlp.c_proj.weight": lambda m: (m.transformer.h[1].mlp.c_proj.weight, lambda g: g.t()),
        },
    )


def test_of_a_mixture_each_expert_has_its_own_rows_of_the_stacked_parameter(
    opened: Callable[[str], Opened],
) -> None:
    experts = "model.layers.1.block_sparse_moe.experts"

    def gate_up(model: Any) -> Tensor:
        stacked: Tensor = model.model.layers[1].mlp.experts.gate_up_proj
        return stacked

    check(
        opened("mixtral"),
        {
            f"{experts}.0.w1.weight": lambda m: (gate_up(m), lambda g: g[0, : tiny.MLP]),
            f"{experts}.2.w3.weight": lambda m: (gate_up(m), lambda g: g[2, tiny.MLP :]),
            f"{experts}.3.w2.weight": lambda m: (m.model.layers[1].mlp.experts.down_proj, lambda g: g[3]),
            "model.layers.0.self_attn.q_proj.weight": lambda m: (
                m.model.layers[0].self_attn.q_proj.weight,
                lambda g: g,
            ),
        },
    )


def test_of_an_encoder_and_decoder_the_decoder_gives_the_sequence_back(opened: Callable[[str], Opened]) -> None:
    checkpoint, graph = opened("t5")
    name = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    found = fishers(checkpoint, graph, sequences(1), [name], CPU)[name]
    model: Any = tiny.load(checkpoint.path)
    weight = model.get_parameter(name)
    (ids_L,) = sequences(1)
    (gradient,) = torch.autograd.grad(loss_of(model, ids_L), [weight])
    torch.testing.assert_close(found, gradient.square(), rtol=1e-3, atol=1e-5 * float(found.max()))


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "opt", "qwen3_moe", "deepseek_v3", "gemma2"])
def test_every_linear_weight_of_the_blocks_gets_one_in_its_shape(family: str, opened: Callable[[str], Opened]) -> None:
    checkpoint, graph = opened(family)
    names = [w.name for w in graph.select("linear")]
    found = fishers(checkpoint, graph, sequences(), names, CPU)
    assert sorted(found) == sorted(names)
    for name, fisher_OI in found.items():
        assert fisher_OI.shape == (graph.weight(name).rows, graph.weight(name).columns)
        assert bool((fisher_OI >= 0).all())
    assert sum(float(fisher_OI.sum()) > 0 for fisher_OI in found.values()) > 0.9 * len(found)


def test_gradients_are_squared_before_they_are_averaged(opened: Callable[[str], Opened]) -> None:
    """The mean over sequences is that of each alone, and not the square of a mean gradient."""
    checkpoint, graph = opened("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    together = fishers(checkpoint, graph, sequences(), [name], CPU)[name]
    alone = [fishers(checkpoint, graph, [ids_L], [name], CPU)[name] for ids_L in sequences()]
    torch.testing.assert_close(together, sum(alone) / len(alone), rtol=1e-5, atol=0)
    model: Any = tiny.load(checkpoint.path)
    losses = [loss_of(model, ids_L) for ids_L in sequences()]
    (mean,) = torch.autograd.grad(torch.stack(losses).mean(), [model.get_parameter(name)])
    assert float(mean.square().sum()) < 0.8 * float(together.sum())


def test_the_estimate_holds_a_block_and_the_results_and_grows_with_the_text(opened: Callable[[str], Opened]) -> None:
    for family in ("llama", "mixtral"):
        _, graph = opened(family)
        names = [w.name for w in graph.select("linear")]
        block = max(sum(w.spec.nbytes for w in graph.unit(unit)) for unit in graph.units)
        results = sum(4 * graph.weight(name).rows * graph.weight(name).columns for name in names)
        assert fisher_bytes(graph, names, [10]) > block + results
        step = fisher_bytes(graph, names, [20]) - fisher_bytes(graph, names, [10])
        assert step == pytest.approx(fisher_bytes(graph, names, [30]) - fisher_bytes(graph, names, [20]), abs=8)
        assert step > fisher_bytes(graph, names, [10, 10]) - fisher_bytes(graph, names, [10]) > 0


def test_a_masked_model_is_refused(opened: Callable[[str], Opened]) -> None:
    checkpoint, graph = opened("bert")
    names = [w.name for w in graph.select("linear")]
    with pytest.raises(UsageError, match="bert model predicts masked tokens"):
        fishers(checkpoint, graph, sequences(), names, CPU)
    with pytest.raises(UsageError, match="bert model predicts masked tokens"):
        fisher_bytes(graph, names, [10])


def test_without_text_there_are_no_gradients(opened: Callable[[str], Opened]) -> None:
    checkpoint, graph = opened("llama")
    with pytest.raises(UsageError, match="at least one sequence"):
        fishers(checkpoint, graph, [], ["lm_head.weight"], CPU)


def test_a_loss_that_is_not_finite_is_the_checkpoints_fault(tmp_path: Path) -> None:
    folder = tiny.tiny("llama", tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match="sequence 0 is nan"):
        fishers(checkpoint, read_graph(checkpoint), sequences(), ["lm_head.weight"], CPU)


def test_the_loss_is_the_mean_over_predicted_tokens(opened: Callable[[str], Opened]) -> None:
    """So that long sequences count as much as short ones: by the head, whose gradient has a closed form.

    d loss / d W = mean over tokens of (p - onehot) h^T
    """
    checkpoint, graph = opened("llama")
    model: Any = tiny.load(checkpoint.path)
    (ids_L,) = sequences(1)
    with torch.no_grad():
        output = model(input_ids=ids_L[None], output_hidden_states=True)
        hidden_LD, logits_LV = output.hidden_states[-1][0, :-1], output.logits[0, :-1]
        excess_LV = logits_LV.softmax(-1) - torch.nn.functional.one_hot(ids_L[1:], logits_LV.shape[1])
        gradient = excess_LV.t() @ hidden_LD / (len(ids_L) - 1)
        assert float(cross_entropy(logits_LV, ids_L[1:])) > 0
    found = fishers(checkpoint, graph, [ids_L], ["lm_head.weight"], CPU)["lm_head.weight"]
    torch.testing.assert_close(found, gradient.square(), rtol=1e-3, atol=1e-5 * float(found.max()))
