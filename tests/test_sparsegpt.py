"""SparseGPT, by the letters of its card (d and e for all sparsity in test_sparsity.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.encode.gptq import GPTQ
from tersely.methods.encode.masks import kept_by_row
from tersely.methods.encode.sparsegpt import SparseGPT, refined
from tersely.methods.encode.wanda import Wanda

KINDS: tuple[dict[str, Any], ...] = ({}, {"sparsity": 0.7}, {"pattern": "2:4"}, {"pattern": "1:4"}, {"pattern": "4:8"})


def weights(rows: int = 24, columns: int = 64, seed: int = 0) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))


def measured(columns: int = 64, seed: int = 0, tokens: int = 512) -> Statistics:
    """Of correlated inputs of several sizes."""
    generator = torch.Generator().manual_seed(1000 + seed)
    mix = torch.randn((columns, columns), generator=generator) * torch.rand(columns, generator=generator) ** 2
    stats = Statistics(columns, needs=frozenset({"gram", "square"}))
    stats.add(torch.randn((tokens, columns), generator=generator) @ mix)
    return stats.finish()


def damped(stats: Statistics, damping: float = 0.01) -> Tensor:
    assert stats.gram_II is not None
    hessian = stats.gram_II.double()
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def loss(weight_OI: Tensor, decoded_OI: Tensor, stats: Statistics, damping: float = 0.01) -> float:
    delta = (weight_OI - decoded_OI).double()
    return float((delta @ damped(stats, damping) * delta).sum())


def published(weight_OI: Tensor, stats: Statistics, method: SparseGPT) -> Tensor:
    """The sweep as published, in float64: H^-1 = U^T U, and each column's error spread by a row of U."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(stats)))
    upper = torch.linalg.cholesky(inverse, upper=True)
    left, size = weight_OI.double().clone(), upper.diagonal()
    columns = left.shape[1]
    kept = torch.ones(left.shape, dtype=torch.bool)
    for k in range(columns):
        if method.pattern:
            m = int(method.pattern[-1])
            if k % m == 0:
                own = slice(k, k + m)
                kept[:, own] = kept_by_row(left[:, own].square() / size[own].square(), 0.5, method.pattern)
        elif k % method.block == 0:
            own = slice(k, min(k + method.block, columns))
            score = left[:, own].square() / size[own].square()
            cut = score.flatten().sort().values[int(score.numel() * method.sparsity + 1e-9) - 1]
            kept[:, own] = score > cut
        value = left[:, k] * kept[:, k]
        error = (left[:, k] - value) / size[k]
        left[:, k:] -= error[:, None] * upper[k, k:]
        left[:, k] = value
    return left.float()


@pytest.mark.parametrize("settings", [*KINDS, {"block": 32}], ids=str)
@pytest.mark.parametrize("columns", [64, 200])
def test_it_gives_the_mask_and_the_values_of_the_published_sweep(columns: int, settings: dict[str, Any]) -> None:
    weight_OI, stats, method = weights(columns=columns), measured(columns), SparseGPT(**settings)
    own, expected = method(weight_OI, stats).decode(), published(weight_OI, stats, method)
    assert torch.equal(own != 0, expected != 0)
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_a_the_costs_of_the_columns_add_up_to_the_loss(settings: dict[str, Any]) -> None:
    weight_OI, stats = weights(), measured()
    delta = (weight_OI - SparseGPT(**settings)(weight_OI, stats).decode()).double()
    upper = torch.linalg.cholesky(damped(stats).flip(0, 1)).flip(0, 1)
    torch.testing.assert_close((delta @ upper).square().sum(), (delta @ damped(stats) * delta).sum())


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_b_on_inputs_that_do_not_correlate_no_weight_moves_and_the_sizes_decide(settings: dict[str, Any]) -> None:
    weight_OI, squares_I = weights(), torch.linspace(0.5, 4, 64)
    stats = Statistics(64, tokens=512, gram_II=torch.diag(squares_I), squares_I=squares_I)
    own = SparseGPT(**settings, scope="row", damping=1e-6)(weight_OI, stats).decode()
    assert torch.equal(own[own != 0], weight_OI[own != 0])
    assert torch.equal(own, Wanda(**settings)(weight_OI, stats).decode())


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_c_the_update_loses_less_than_the_mask_alone_and_refining_less_still(settings: dict[str, Any]) -> None:
    weight_OI, stats = weights(), measured()
    mask, plain, some, many = (
        SparseGPT(**settings, **more)(weight_OI, stats).decode()
        for more in ({"update": False}, {}, {"refine": 4}, {"refine": 200})
    )
    assert all(torch.equal(each != 0, plain != 0) for each in (mask, some, many))
    assert torch.equal(mask[mask != 0], weight_OI[mask != 0])
    losses = [loss(weight_OI, each, stats) for each in (mask, plain, some, many)]
    assert losses == sorted(losses, reverse=True)
    assert losses[1] < 0.9 * losses[0]
    assert losses[3] < 0.9 * losses[1]


def test_refining_ends_at_the_least_squares_of_every_row() -> None:
    weight_OI, stats = weights(4, 32), measured(32)
    sparse = SparseGPT()(weight_OI, stats).decode()
    assert stats.gram_II is not None
    own = refined(weight_OI, sparse, sparse != 0, stats.gram_II, 0.01, 200)
    hessian = damped(stats)
    for row, pruned, found in zip(weight_OI.double(), sparse, own, strict=True):
        kept = pruned != 0
        best = torch.linalg.solve(hessian[kept][:, kept], (hessian @ row)[kept])
        torch.testing.assert_close(found[kept].double(), best, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_f_on_correlated_inputs_it_loses_less_than_wanda_in_the_mean(settings: dict[str, Any]) -> None:
    own = wanda = 0.0
    for seed in range(8):
        weight_OI, stats = weights(seed=seed), measured(seed=seed)
        total = loss(weight_OI, torch.zeros_like(weight_OI), stats)
        own += loss(weight_OI, SparseGPT(**settings)(weight_OI, stats).decode(), stats, 0.0) / total
        wanda += loss(weight_OI, Wanda(**settings)(weight_OI, stats).decode(), stats, 0.0) / total
    assert own < wanda


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("settings", [{}, {"pattern": "2:4"}], ids=str)
def test_with_bits_it_is_the_chain_with_gptq(settings: dict[str, Any], bits: int) -> None:
    weight_OI, stats = weights(), measured()
    sparse = SparseGPT(**settings)(weight_OI, stats).decode()
    own = SparseGPT(**settings, bits=bits, group=16)(weight_OI, stats)
    stats.kept_OI = sparse != 0
    assert torch.equal(own.decode(), GPTQ(bits=bits, group=16)(sparse, stats).decode())
    assert not bool(own.decode()[sparse == 0].any())
    # The sweep on what is kept makes up for its rounding: that is better than rounding what is kept.
    nearest = GPTQ(bits=bits, group=16)(sparse, Statistics(64)).decode()
    assert loss(weight_OI, own.decode(), stats) < loss(weight_OI, nearest, stats)


def test_without_enough_tokens_the_smallest_go_and_the_note_says_so() -> None:
    weight_OI = weights()
    encoded = SparseGPT()(weight_OI, measured(tokens=63))
    assert "63 calibration tokens for 64 inputs" in encoded.note
    assert "pruned by magnitude" in encoded.note
    assert torch.equal(encoded.decode(), weight_OI * kept_by_row(weight_OI.abs(), 0.5, ""))


def test_zeros_of_the_source_stay_if_asked_and_count_among_those_removed() -> None:
    weight_OI, stats = weights(), measured()
    stats.kept_OI = torch.rand(weight_OI.shape, generator=torch.Generator().manual_seed(4)) > 0.3
    own = SparseGPT()(weight_OI * stats.kept_OI, stats).decode()
    assert not bool(own[~stats.kept_OI].any())
    assert int((own == 0).sum()) == own.numel() // 2


@pytest.mark.parametrize(
    "settings",
    [{"block": 0}, {"refine": -1}, {"refine": 1, "update": False}, {"damping": 0.0}, {"bits": 9}, {"scope": "all"}],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        SparseGPT(**settings)
