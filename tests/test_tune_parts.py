"""Laws of what moves: views of parts begin where they are told, run what would be stored, and move as they say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tersely.codecs import Encoded, Integers, Part
from tersely.codecs.affine import Affine
from tersely.codecs.codebook import Lookup, LookupForm, nearest_labels
from tersely.codecs.ternary import Ternary, TernaryForm, ternarize
from tersely.codecs.vectors import Vectors
from tersely.measure import Statistics
from tersely.methods.encode.aqlm import AQLM
from tersely.methods.encode.hqq import HQQ
from tersely.methods.encode.lqer import LQER
from tersely.methods.encode.rtn import RTN
from tersely.methods.tune.trainable import Grid, Trainable, farthest, nearer_codes, trainable, weight
from tersely.methods.tune.trainable import encoded as stored

GROUP = 16


def weights(rows: int = 24, columns: int = 64, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)).to(dtype)


def nothing() -> Statistics:
    return Statistics(64)


def ternary(weight_OI: Tensor) -> Encoded:
    codes, scale = ternarize(weight_OI, GROUP)
    return Encoded((Ternary(codes, scale, TernaryForm(GROUP, "trits")),))


def lookup(weight_OI: Tensor) -> Encoded:
    table = weight_OI.float().quantile(torch.linspace(0.05, 0.95, 8), dim=1).t().contiguous().to(weight_OI.dtype)
    return Encoded((Lookup(nearest_labels(weight_OI, table), table, LookupForm(3)),))


def aqlm(weight_OI: Tensor, codebooks: int = 2) -> Encoded:
    return AQLM(codebooks=codebooks, bits=3, group=4, rounds=1)(weight_OI, nothing())


ENCODED: dict[str, Callable[[Tensor], Encoded]] = {
    "symmetric": lambda w: RTN(bits=3, group=GROUP)(w, nothing()),
    "asymmetric": lambda w: RTN(bits=3, group=GROUP, symmetric=False)(w, nothing()),
    "affine": lambda w: HQQ(bits=3, group=GROUP)(w, nothing()),
    "ternary": ternary,
    "vectors": aqlm,
    "tables": lookup,
    "with low rank": lambda w: LQER(bits=3, group=GROUP, rank=4)(w, nothing()),
}
GRIDS = ("symmetric", "asymmetric", "affine", "ternary")


def codes_of(part: Part) -> Tensor:
    assert isinstance(part, Integers | Affine | Ternary | Vectors | Lookup)
    if isinstance(part, Lookup):
        return part.labels_OI
    return part.codes_ONM if isinstance(part, Vectors) else part.codes_OI


def push(view: Trainable, by: float, seed: int = 5) -> None:
    """Move all latents of a view at random, by steps of their grids."""
    draw = torch.Generator().manual_seed(seed)
    for latent in view.latents:
        with torch.no_grad():
            latent += by * torch.randn(latent.shape, generator=draw)


@pytest.mark.parametrize("reach", [math.inf, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ENCODED)
def test_views_begin_at_exactly_what_they_are_given(name: str, dtype: torch.dtype, reach: float) -> None:
    weight_OI = weights(dtype=dtype)
    given = ENCODED[name](weight_OI)
    views = trainable(given, weight_OI, reach)
    for view in views:
        view.settle(1.0, 0.0)
    now = stored(views)
    assert now.tensors().keys() == given.tensors().keys()
    assert all(torch.equal(t, now.tensors()[leaf]) for leaf, t in given.tensors().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ENCODED)
def test_what_runs_is_what_would_be_stored_bit_for_bit_wherever_it_has_moved(name: str, dtype: torch.dtype) -> None:
    """PV (a): codes and codebooks reconstruct exactly the weight that ran; (g): in as many bytes as the form says."""
    weight_OI = weights(dtype=dtype)
    given = ENCODED[name](weight_OI)
    views = trainable(given, weight_OI)
    for view in views:
        push(view, 1.0)
        for value in view.values:
            value.data += 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
        view.settle(1.0, 0.0)
    assert torch.equal(weight(views), stored(views).decode().float())
    assert not torch.equal(stored(views).decode(), given.decode())
    forms = zip(stored(views).parts, given.parts, strict=True)
    for part, before in forms:
        again = part.form.read(part.tensors(), 24, 64, dtype)
        assert sum(t.nbytes for t in part.tensors().values()) == part.form.nbytes(24, 64, dtype)
        assert part.form == before.form
        assert torch.equal(again.decode(), part.decode())


@pytest.mark.parametrize("name", GRIDS)
def test_inside_the_grid_the_gradient_of_a_weight_is_that_of_its_latent(name: str) -> None:
    """STE: of a linear loss sum(c w_hat), the gradient by a latent is c times the step of its grid, its scale."""
    weight_OI = weights()
    (view,) = trainable(ENCODED[name](weight_OI), weight_OI)
    cost_OI = weights(seed=9)
    (weight((view,)) * cost_OI).sum().backward()  # type: ignore[no-untyped-call]
    part: Any = view.part()
    step = part.scale_RG if isinstance(part, Ternary) else part.scale_OG
    expected = (cost_OI.view(24, -1, GROUP) * step[:, :, None]).flatten(1)
    grad = view.latents[0].grad
    assert grad is not None
    torch.testing.assert_close(grad.flatten(1), expected)


@pytest.mark.parametrize("name", ["symmetric", "asymmetric", "affine", "ternary", "vectors", "tables"])
def test_the_gradients_of_values_are_the_true_ones_for_fixed_codes(name: str) -> None:
    """By central differences: with the codes held, the weight is smooth in scales and codebooks."""
    weight_OI = weights()
    (view,) = trainable(ENCODED[name](weight_OI), weight_OI)
    cost_OI = weights(seed=9)
    (view.smooth() * cost_OI).sum().backward()  # type: ignore[no-untyped-call]
    for value in view.values:
        direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(2))
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                value += sign * 1e-2 * direction
                ends.append((view.smooth().double() * cost_OI.double()).sum())
                value -= sign * 1e-2 * direction
        assert value.grad is not None
        slope = (ends[0] - ends[1]) / 2e-2
        torch.testing.assert_close((value.grad * direction).sum().double(), slope, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("limit", [0.0, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("name", ["symmetric", "affine", "ternary", "vectors", "tables"])
def test_no_more_codes_change_than_the_limit_allows(name: str, limit: float) -> None:
    """PV (b)."""
    weight_OI = weights()
    (view,) = trainable(ENCODED[name](weight_OI), weight_OI)
    before = codes_of(view.part())
    push(view, 2.0)
    view.settle(limit, 0.0)
    changed = codes_of(view.part()) != before
    groups = changed.flatten(0, 1).any(-1) if name == "vectors" else changed.flatten()
    assert groups.float().mean() <= limit
    assert bool(groups.any()) == (limit > 0)


@pytest.mark.parametrize("name", ENCODED)
def test_moving_values_alone_never_changes_codes(name: str) -> None:
    """PV (c): the P step."""
    weight_OI = weights()
    views = trainable(ENCODED[name](weight_OI), weight_OI)
    before = [codes_of(v.part()) for v in views if v.latents]
    for view in views:
        for value in view.values:
            value.data += 0.2 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
        view.settle(1.0, 0.0)
    assert all(torch.equal(codes_of(v.part()), b) for v, b in zip([v for v in views if v.latents], before, strict=True))


def test_with_one_codebook_a_search_finds_the_nearest_entry() -> None:
    """PV (e)."""
    draw = torch.Generator().manual_seed(0)
    points, books = torch.randn((50, 4), generator=draw), torch.randn((1, 16, 4), generator=draw)
    found = nearer_codes(points, torch.zeros((50, 1), dtype=torch.int32), books)
    assert torch.equal(found[:, 0].long(), torch.cdist(points, books[0]).argmin(1))


def test_with_several_codebooks_a_search_never_ends_farther_away() -> None:
    draw = torch.Generator().manual_seed(0)
    points, books = torch.randn((50, 4), generator=draw), torch.randn((3, 8, 4), generator=draw)
    codes = torch.randint(0, 8, (50, 3), generator=draw, dtype=torch.int32)

    def distance(codes_PM: Tensor) -> Tensor:
        return (points - sum(books[m][codes_PM[:, m]] for m in range(3))).square().sum(1)

    found = nearer_codes(points, codes, books)
    assert bool((distance(found) <= distance(codes) + 1e-6).all())
    assert distance(found).sum() < 0.5 * distance(codes).sum()


def test_latents_that_forget_everything_lie_on_their_codes_again() -> None:
    weight_OI = weights()
    for name in ("symmetric", "vectors", "tables"):
        (view,) = trainable(ENCODED[name](weight_OI), weight_OI)
        push(view, 2.0)
        view.settle(0.05, 1.0)
        after = codes_of(view.part())
        view.settle(1.0, 1.0)
        assert torch.equal(codes_of(view.part()), after)


def test_the_farthest_are_chosen_and_what_has_not_moved_never_is() -> None:
    distance = torch.tensor([0.0, 3.0, 1.0, 0.0, 2.0])
    assert farthest(distance, 0.4).tolist() == [False, True, False, False, True]
    assert farthest(distance, 1.0).tolist() == [False, True, True, False, True]
    assert not farthest(distance, 0.1).any()


def test_trits_stay_trits_and_latents_come_back_from_beyond_them() -> None:
    """Ternary: three values a group; nothing is stuck outside the grid."""
    weight_OI = weights()
    (view,) = trainable(ternary(weight_OI), weight_OI)
    push(view, 100.0)
    view.settle(1.0, 0.0)
    decoded = view.part().decode().view(24, -1, GROUP)
    assert all(len(group.unique()) <= 3 for row in decoded for group in row)
    before = codes_of(view.part()).long()
    view.latents[0].data -= 1.0 * (before.view(view.latents[0].shape) - 1)
    view.settle(1.0, 0.0)
    assert bool((codes_of(view.part()) != before)[before != 1].all())


@pytest.mark.parametrize("name", GRIDS)
def test_rounding_offsets_of_at_most_a_half_change_codes_by_at_most_one_step(name: str) -> None:
    weight_OI = weights()
    (view,) = trainable(ENCODED[name](weight_OI), weight_OI, 0.5)
    before = codes_of(view.part()).int()
    push(view, 10.0)
    view.settle(1.0, 0.0)
    assert isinstance(view, Grid)
    assert float(view.latents[0].detach().abs().max()) <= 0.5
    change = (codes_of(view.part()).int() - before).abs()
    assert int(change.max()) == 1


def test_a_step_on_few_codes_descends_where_a_step_on_all_overshoots() -> None:
    """PV (h): of a quadratic, the smoothness on few coordinates is smaller, so a step there may be longer.

    phi(x) = (x - x*)^T A (x - x*) / 2, A with a large eigenvalue along (1, ..., 1): codes that all move together
    overshoot, while the 1% that should move most bring phi down.
    """
    size = 400
    draw = torch.Generator().manual_seed(3)
    target = torch.randn((1, size), generator=draw)
    matrix = torch.eye(size) + torch.ones((size, size)) / 2
    given = RTN(bits=4, group=size)(target, Statistics(size))

    def phi(x_1I: Tensor) -> float:
        return float((x_1I - target) @ matrix @ (x_1I - target).t() / 2)

    def after(limit: float) -> float:
        (view,) = trainable(given, target)
        moved = float(phi(weight((view,)).detach()))
        value = weight((view,))
        ((value - target) @ matrix @ (value - target).t() / 2).sum().backward()  # type: ignore[no-untyped-call]
        (latent,) = view.latents
        assert latent.grad is not None
        part: Any = view.part()
        step = float(part.scale_OG)
        # The smoothness on 4 coordinates is 1 + 4 / 2, on all of them 1 + size / 2.
        latent.data -= latent.grad / step**2 / 3
        view.settle(limit, 0.0)
        return phi(weight((view,)).detach()) - moved

    assert after(0.01) < 0
    assert after(1.0) > 0
