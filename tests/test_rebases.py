"""Changes of basis before encoding: alone they change nothing; measured, they are what their papers say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tersely.bases import Diagonal
from tersely.checkpoint import open_checkpoint
from tersely.compression import compress
from tersely.errors import UsageError
from tersely.graph import read_graph
from tersely.measure import Statistics
from tersely.methods import REBASES
from tersely.methods.encode.gptq import GPTQ
from tersely.methods.encode.rtn import RTN
from tersely.methods.rebase.aser_smooth import ASERSmooth
from tersely.methods.rebase.awq import AWQ
from tersely.methods.rebase.rotate import Rotate
from tersely.methods.rebase.smooth import Smooth
from tersely.plan.assignment import spaces
from tersely.plan.reading import recipe_from_toml
from tersely.plan.recipe import Calibration, Change, Recipe, Step
from tersely.rotation import rotate
from tests.tiny import forward, tiny
from tests.tokens import write_tokenizer

TEXT = Calibration(samples=16, context=40)
TURNED = Recipe((Change("residual", Rotate()), Step("linear", RTN(bits=8, group=16))))
NEAR = 2e-4


def activations(columns: int = 64, *, outliers: bool = True) -> Tensor:
    x_TI = torch.randn((256, columns), generator=torch.Generator().manual_seed(5))
    if outliers:
        x_TI[:, ::16] *= 40
    return x_TI


def measured(x_TI: Tensor, *needs: str) -> Statistics:
    stats = Statistics(x_TI.shape[1], needs=frozenset(needs))
    stats.add(x_TI)
    return stats.finish()


def weight(rows: int = 32, columns: int = 64) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(6))


def scale_of(basis: Any) -> Tensor:
    """What the weights are multiplied by."""
    assert isinstance(basis, Diagonal)
    return 1 / basis.scale_N


# In a job: with 8 bits, what the change costs is at most what rounding costs


CASES = [
    pytest.param(model_type, where, method, id=f"{model_type}-{method.name}-{where}".replace(" ", ""))
    for model_type, where in (
        ("llama", "normed"),
        ("llama", "normed | mlp | attn"),
        ("qwen2", "normed | mlp | attn"),
        ("qwen3", "normed | mlp"),
        ("gemma2", "normed | mlp"),
        ("mixtral", "normed | expert"),
        ("gpt2", "normed"),
        ("opt", "normed"),
        ("phi3", "normed | mlp | attn"),
    )
    for method in (Smooth(), AWQ(group=16, bits=8), ASERSmooth(outliers=4))
]


@pytest.mark.parametrize(("model_type", "where", "method"), CASES)
def test_a_smoothed_model_computes_what_it_did(
    model_type: str, where: str, method: Any, source: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    recipe = Recipe((Change(where, method), Step("linear", RTN(bits=8, group=16))), TEXT)
    report = compress(source(model_type), recipe, tmp_path / "out", calibration=text, format="dense")
    plain = forward(source(model_type))
    torch.testing.assert_close(forward(tmp_path / "out"), plain, rtol=0, atol=0.02 * float(plain.abs().max()))
    assert len(report.rows) > 0
    before, after = open_checkpoint(source(model_type)), open_checkpoint(tmp_path / "out")
    norms = [w.name for w in read_graph(before).weights if w.kind == "norm" and w.block is not None]
    assert any(not torch.equal(before[n], after[n]) for n in norms)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mixtral", "phi3"])
@pytest.mark.parametrize("where", ["residual", "residual | v"])
def test_a_rotated_model_computes_what_it_did(
    model_type: str, where: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(source(model_type))
    rotated = rotate(checkpoint, [Change(where, Rotate())], 0, tmp_path / "rotated", {}, resume=False)
    torch.testing.assert_close(forward(rotated.path), forward(checkpoint.path), rtol=0, atol=NEAR)
    changed = [name for name in checkpoint if not torch.equal(rotated[name], checkpoint[name])]
    linear = [w.name for w in read_graph(checkpoint).weights if w.kind == "linear"]
    assert set(linear) <= set(changed)
    # Energy is kept where no gain was folded in: what writes the residual stream.
    writers = [w for w in read_graph(checkpoint).writers("residual") if w.kind == "linear"]
    for each in writers:
        torch.testing.assert_close(rotated[each.name].norm(), checkpoint[each.name].norm())


def test_a_tied_head_is_stored_on_its_own_when_the_residual_stream_turns(tmp_path: Path) -> None:
    path = write_tokenizer(tiny("llama", tmp_path / "source", tied=True))
    report = compress(path, TURNED, tmp_path / "out", format="dense")
    out = open_checkpoint(tmp_path / "out")
    assert out.config["tie_word_embeddings"] is False
    assert "lm_head.weight" in out
    assert report.bytes_after == out.nbytes
    plain = forward(path)
    torch.testing.assert_close(forward(tmp_path / "out"), plain, rtol=0, atol=0.02 * float(plain.abs().max()))
    assert not list(tmp_path.glob("out.rotated*"))


@pytest.mark.parametrize("model_type", ["gemma2", "gpt2"])
def test_a_rotation_that_would_change_the_model_is_refused_before_anything_is_written(
    model_type: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="residual"):
        compress(source(model_type), TURNED, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_steps_stand_in_an_order_and_name_spaces_that_exist(source: Callable[[str], Path]) -> None:
    graph = read_graph(open_checkpoint(source("llama")))
    assert spaces(Change("normed", Smooth()), graph) == ("attn_in", "mlp_in")
    with pytest.raises(UsageError, match="did you mean mlp_in"):
        spaces(Change("mlp_inn", Smooth()), graph)
    with pytest.raises(UsageError, match="come before"):
        Recipe((Step("linear", RTN()), Change("normed", Smooth())), TEXT)
    with pytest.raises(UsageError, match="at least one step that encodes"):
        Recipe((Change("normed", Smooth()),), TEXT)
    toml = Recipe((Change("normed", Smooth(0.7)), Step("linear", GPTQ(), "int8", 16)), TEXT, 3).to_toml()
    assert recipe_from_toml(toml).to_toml() == toml


@pytest.mark.parametrize("method", REBASES)
def test_a_method_without_data_leaves_a_space_alone_or_needs_none(method: type[Any]) -> None:
    basis = method()([weight()], Statistics(64, needs=frozenset()), 0)
    if method.needs:
        assert bool((scale_of(basis) == 1).all())
    else:
        assert torch.allclose(basis.basis_NN @ basis.basis_NN.T, torch.eye(64).double(), atol=1e-12)


# Online


@pytest.mark.parametrize("hadamard", [16, 32])
def test_an_online_hadamard_product_leaves_the_model_as_it_is(
    hadamard: int, source: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    """In memory, where the weights run as they are encoded: 8 bits in another basis are as near as 8 bits in this."""
    plain = Recipe((Step("*.down_proj", GPTQ(bits=8, group=16)),), TEXT)
    turned = Recipe((Step("*.down_proj", GPTQ(bits=8, group=16), hadamard=hadamard),), TEXT)
    one = compress(source("llama"), plain, tmp_path / "plain", calibration=text)
    other = compress(source("llama"), turned, tmp_path / "turned", calibration=text, format="tersely")
    assert [row.name for row in one.rows] == [row.name for row in other.rows]
    assert all(row.error < 0.02 for row in other.rows)
    with pytest.raises(UsageError, match="work for when the model runs"):
        compress(source("llama"), turned, tmp_path / "dense", calibration=text, format="dense")
    few = Recipe((Step("*.down_proj", GPTQ(group=16)), Step("*.q_proj", GPTQ(group=16), hadamard=16)), TEXT)
    with pytest.raises(UsageError, match=r"differs among .*q_proj.*k_proj.*v_proj"):
        compress(source("llama"), few, tmp_path / "bad", calibration=text)
    fused = Recipe((Step("*.w1", RTN(group=16), "int8"), Step("*.w3 | *.w2", RTN(group=16))))
    with pytest.raises(UsageError, match="which transformers holds as one"):
        compress(source("mixtral"), fused, tmp_path / "bad")
    bad = Recipe((Step("*.down_proj", GPTQ(group=16), hadamard=24),), TEXT)
    with pytest.raises(UsageError, match="power of two that divides"):
        compress(source("llama"), bad, tmp_path / "bad", calibration=text)


# SmoothQuant, by the letters of its card


def test_smooth_b_the_ranges_of_activations_and_weights_become_equal() -> None:
    x_TI, weight_OI = activations(), weight()
    scale_I = scale_of(Smooth(alpha=0.5)([weight_OI], measured(x_TI, "absmax"), 0))
    torch.testing.assert_close((x_TI / scale_I).abs().amax(0), (weight_OI * scale_I).abs().amax(0))
    scale_I = scale_of(Smooth(alpha=1.0)([weight_OI], measured(x_TI, "absmax"), 0))
    torch.testing.assert_close((x_TI / scale_I).abs().amax(0), torch.ones(64))
    scale_I = scale_of(Smooth(alpha=0.0)([weight_OI], measured(x_TI, "absmax"), 0))
    torch.testing.assert_close((weight_OI * scale_I).abs().amax(0), torch.ones(64))


def test_smooth_c_int8_products_of_activations_with_outliers_lose_less() -> None:
    from tersely.codecs.activations import ACTIVATIONS

    x_TI, weight_OI = activations(), weight()
    scale_I = scale_of(Smooth()([weight_OI], measured(x_TI, "absmax"), 0))
    exact = x_TI @ weight_OI.t()

    def error(x: Tensor, w: Tensor) -> float:
        rounded = RTN(bits=8, group=0)(w, Statistics(64)).decode()
        return float((ACTIVATIONS["int8"](x) @ rounded.t() - exact).norm())

    assert error(x_TI / scale_I, weight_OI * scale_I) < 0.6 * error(x_TI, weight_OI)


# AWQ, by the letters of its card


def test_awq_b_the_loss_is_not_above_that_of_rounding_alone() -> None:
    for seed in range(4):
        x_TI = activations() * torch.rand(64, generator=torch.Generator().manual_seed(seed))
        stats, weight_OI = measured(x_TI, "gram", "absmean"), weight()
        method = AWQ(bits=3, group=16)
        scale_I = scale_of(method([weight_OI], stats, 0))
        assert stats.gram_II is not None
        chosen = method._loss(weight_OI, scale_I, stats.gram_II)
        assert chosen <= method._loss(weight_OI, torch.ones(64), stats.gram_II)
        assert chosen < 0.9 * method._loss(weight_OI, torch.ones(64), stats.gram_II)


def test_awq_c_inputs_of_one_size_are_left_alone() -> None:
    x_TI = activations(outliers=False).sign()
    scale_I = scale_of(AWQ(group=16)([weight()], measured(x_TI, "gram", "absmean"), 0))
    torch.testing.assert_close(scale_I, torch.ones(64))


def test_awq_d_scaled_activations_have_the_same_scale() -> None:
    one = scale_of(AWQ(group=16)([weight()], measured(activations(), "gram", "absmean"), 0))
    other = scale_of(AWQ(group=16)([weight()], measured(activations() * 8, "gram", "absmean"), 0))
    torch.testing.assert_close(one, other)


def test_statistics_of_scaled_activations_are_scaled_statistics() -> None:
    x_TI, scale_I = activations(), torch.linspace(0.1, 3, 64)
    ours = measured(x_TI, "gram", "absmax", "absmean").rescaled(scale_I)
    theirs = measured(x_TI * scale_I, "gram", "absmax", "absmean")
    for name in ("gram_II", "absmax_I", "abssum_I"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=0.1)
