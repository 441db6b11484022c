"""The Taylor importance of structures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import pytest
import torch
from torch import Tensor

from tersely.errors import UsageError
from tersely.methods.cut.llm_pruner import LLMPruner, Reduce, Saliency
from tersely.methods.cut.protocol import Member, Structures

COUNT = 7
SALIENCIES: tuple[Saliency, ...] = get_args(Saliency)
REDUCES: tuple[Reduce, ...] = get_args(Reduce)
WAYS = [(saliency, reduce) for saliency in SALIENCIES for reduce in REDUCES]


def members(seed: int = 0, widths: Sequence[int] = (3, 5, 4)) -> list[Member]:
    generator = torch.Generator().manual_seed(seed)

    def draw(width: int) -> Tensor:
        return torch.randn(COUNT, width, generator=generator)

    return [Member(draw(width), draw(width), draw(width).square()) for width in widths]


def scores(own: Sequence[Member], saliency: Saliency = "param_first", reduce: Reduce = "sum") -> Tensor:
    found = LLMPruner(saliency, reduce)(Structures("neurons", COUNT, own), 0)
    assert found.shape == (COUNT,)
    assert found.dtype == torch.float64
    assert bool((found >= 0).all())
    return found


@pytest.mark.parametrize(("saliency", "reduce"), WAYS)
def test_a_structure_without_weights_matters_nothing_and_least(saliency: Saliency, reduce: Reduce) -> None:
    own = members()
    for member in own:
        member.weight_GM[4] = 0
    found = scores(own, saliency, reduce)
    assert found[4] == 0
    assert bool((found[torch.arange(COUNT) != 4] > 0).all())


@pytest.mark.parametrize(("saliency", "reduce"), WAYS)
def test_scores_go_with_their_structures(saliency: Saliency, reduce: Reduce) -> None:
    own = members()
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1))
    moved = [Member(*(t[order] for t in (m.weight_GM, m.gradient_GM, m.fisher_GM) if t is not None)) for m in own]
    assert torch.equal(scores(moved, saliency, reduce), scores(own, saliency, reduce)[order])


@pytest.mark.parametrize("reduce", REDUCES)
def test_a_sum_before_the_absolute_value_is_never_above_one_after_it(reduce: Reduce) -> None:
    for seed in range(5):
        own = members(seed)
        assert bool((scores(own, "vectorize", reduce) <= scores(own, "param_first", reduce)).all())
    one_sign = [Member(m.weight_GM.abs(), m.gradient_GM.abs()) for m in own if m.gradient_GM is not None]
    torch.testing.assert_close(scores(one_sign, "vectorize", reduce), scores(one_sign, "param_first", reduce))


def test_the_second_order_takes_off_what_the_first_would_give_beyond_the_minimum() -> None:
    """Of a parabola per element, loss = h/2 (w - w*)^2, the score is the change of the loss, with h in the place of F.

    So the signs of both orders must stay as they are: where w* is beyond w/2, setting w to 0 makes the loss larger.
    """
    generator = torch.Generator().manual_seed(3)
    weight, best = (torch.randn(COUNT, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    bend = torch.rand(COUNT, 1, generator=generator, dtype=torch.float64) + 0.1
    found = scores([Member(weight, bend * (weight - best), bend)], "param_mix")
    change = bend / 2 * best.square() - bend / 2 * (weight - best).square()
    torch.testing.assert_close(found, change.abs()[:, 0])
    assert 0 < int((change > 0).sum()) < COUNT


def test_the_loss_changes_by_the_scores_of_a_structure_that_is_scaled_a_little() -> None:
    """d loss / d scale = sum of w g, each neuron's weights scaled together, as finite differences give it."""
    generator = torch.Generator().manual_seed(5)
    gate, up, down = (torch.randn(COUNT, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    x, wanted = (torch.randn(20, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = [w.requires_grad_() for w in (gate, up, down)]

    def loss(scale: Tensor) -> Tensor:
        gate, up, down = (w * scale[:, None] for w in weights)
        return (torch.nn.functional.silu(x @ gate.t()) * (x @ up.t()) @ down - wanted).square().mean()

    one = torch.ones(COUNT, dtype=torch.float64)
    loss(one).backward()  # type: ignore[no-untyped-call]
    own = [Member(w.detach(), w.grad) for w in weights]
    step = 1e-5
    with torch.no_grad():
        for g in range(COUNT):
            more = step * torch.nn.functional.one_hot(torch.tensor(g), COUNT)
            change = float(loss(one + more) - loss(one - more)) / (2 * step)
            signed = sum(float((m.weight_GM * m.gradient_GM)[g].sum()) for m in own if m.gradient_GM is not None)
            assert change == pytest.approx(signed, rel=1e-6, abs=1e-9)
            for m, reduce in ((own[0], "first"), (own[2], "last")):
                assert m.gradient_GM is not None
                part = abs(float((m.weight_GM * m.gradient_GM)[g].sum()))
                assert float(scores(own, "vectorize", reduce)[g]) == pytest.approx(part)  # type: ignore[arg-type]


@pytest.mark.parametrize("saliency", SALIENCIES)
def test_weights_are_reduced_as_the_name_says(saliency: Saliency) -> None:
    own = members()
    each_NG = torch.stack([scores([member], saliency) for member in own])
    torch.testing.assert_close(scores(own, saliency, "sum"), each_NG.sum(0))
    torch.testing.assert_close(scores(own, saliency, "mean"), each_NG.mean(0))
    assert torch.equal(scores(own, saliency, "max"), each_NG.amax(0))
    assert torch.equal(scores(own, saliency, "prod").argsort(), each_NG.prod(0).argsort())
    assert torch.equal(scores(own, saliency, "first"), each_NG[0])
    assert torch.equal(scores(own, saliency, "last"), each_NG[-1])


def test_a_product_over_many_small_scores_still_ranks() -> None:
    own = [Member(1e-4 * m.weight_GM, 1e-4 * m.gradient_GM) for m in members() * 100 if m.gradient_GM is not None]
    found = scores(own, "param_first", "prod")
    assert len(set(found.tolist())) == COUNT
    assert torch.equal(found.argsort(), scores(members(), "param_first", "prod").argsort())


@pytest.mark.parametrize("saliency", SALIENCIES)
def test_what_is_not_asked_to_be_measured_is_not_read(saliency: Saliency) -> None:
    needs = LLMPruner(saliency).needs
    assert needs
    assert needs <= {"gradient", "fisher"}
    own = members()
    bare = [
        Member(
            m.weight_GM,
            m.gradient_GM if "gradient" in needs else None,
            m.fisher_GM if "fisher" in needs else None,
        )
        for m in own
    ]
    assert torch.equal(scores(bare, saliency), scores(own, saliency))


@pytest.mark.parametrize(("field", "value"), [("saliency", "third"), ("reduce", "median")])
def test_a_setting_that_is_not_known_is_named_with_those_that_are(field: str, value: str) -> None:
    with pytest.raises(UsageError, match=rf"{field}='{value}': expected "):
        LLMPruner(**{field: value})  # type: ignore[arg-type]
