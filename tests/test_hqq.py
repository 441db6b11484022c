"""HQQ by the invariants of its card, and integers with real-valued zero points."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tersely.codecs import Encoded, form_from_dict, form_to_dict
from tersely.codecs.affine import Affine, AffineForm, zero_dtype
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.encode.hqq import HQQ

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def student(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Student's t with 4 degrees of freedom: heavy tails."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn((5, rows, columns), generator=generator)
    return (normal[0] / normal[1:].square().mean(0).sqrt()).to(dtype)


def hqq(weight_OI: Tensor, **settings: Any) -> Affine:
    (part,) = HQQ(**settings)(weight_OI, Statistics(weight_OI.shape[1])).parts
    assert isinstance(part, Affine)
    return part


def mean_error(weight_OI: Tensor, decoded_OI: Tensor) -> float:
    return float((weight_OI.double() - decoded_OI.double()).abs().mean())


def rounded(weight_OI: Tensor, bits: int, group: int) -> Tensor:
    """Round to nearest on the span of each group, whose lowest weight is code 0, in float64."""
    w = weight_OI.double().view(len(weight_OI), -1, group)
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    scale = ((high - low) / ((1 << bits) - 1)).to(weight_OI.dtype).double()
    codes = ((w - low) / scale).round().clamp(0, (1 << bits) - 1)
    return (codes * scale + low).view(weight_OI.shape)


def published(w_I: Tensor, bits: int, turns: int) -> list[Tensor]:
    """What each turn of the published iteration makes of one group, in float64, in units of 1 / scale."""
    top, beta = (1 << bits) - 1, 10.0
    low, high = w_I.min(), w_I.max()
    inverse = 1 / ((high - low) / top).float().double()
    zero = (-low * inverse).float().double()
    found = []
    for _ in range(turns + 1):
        codes = (w_I * inverse + zero).round().clamp(0, top)
        reached = (codes - zero) / inverse
        found.append(reached)
        left = w_I - reached
        sparse = left.sign() * (left.abs() - left.abs().clamp(min=1e-30) ** (0.7 - 1) / beta).clamp(min=0)
        zero = (codes - (w_I - sparse) * inverse).mean().float().double()
        beta *= 1.01
    return found


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("scale", [0.02, 1.0, 30.0])
def test_each_group_is_the_best_turn_of_the_published_iteration(bits: int, scale: float) -> None:
    """On a small scale nothing is sparse, on a large one much is."""
    weight_OI = student(6, 64) * scale
    decoded = hqq(weight_OI, bits=bits, group=32).decode().double()
    for group, own in zip(weight_OI.double().view(-1, 32), decoded.view(-1, 32), strict=True):
        best = min(float((group - turn).abs().mean()) for turn in published(group, bits, 20))
        assert float((group - own).abs().mean()) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_group_has_a_greater_mean_error_than_rounding_to_nearest(bits: int, seed: int) -> None:
    weight_OI = student(16, 128, seed)
    own = (hqq(weight_OI, bits=bits, group=32).decode().double() - weight_OI).abs().view(-1, 32).mean(1)
    nearest = (rounded(weight_OI, bits, 32) - weight_OI).abs().view(-1, 32).mean(1)
    assert bool((own <= nearest * (1 + 1e-4)).all())


def test_on_heavy_tails_the_mean_error_falls_as_published() -> None:
    """To 0.951 of that of rounding, over 2 to 4 bits."""
    ratios = []
    for seed in range(4):
        weight_OI = student(64, 256, seed)
        for bits in (2, 3, 4):
            own = mean_error(weight_OI, hqq(weight_OI, bits=bits).decode())
            ratios.append(own / mean_error(weight_OI, rounded(weight_OI, bits, 64)))
    assert max(ratios) < 1
    assert sum(ratios) / len(ratios) == pytest.approx(0.951, abs=0.01)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_turning_the_signs_changes_no_error(bits: int) -> None:
    weight_OI = student(16, 128)
    own, turned = hqq(weight_OI, bits=bits).decode(), -hqq(-weight_OI, bits=bits).decode()
    errors = [(each - weight_OI).abs().view(-1, 64).mean(1) for each in (own, turned)]
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-4, atol=0)
    start, back = (hqq(sign * weight_OI, bits=bits, iterations=0) for sign in (1, -1))
    torch.testing.assert_close(back.zero_OG, (1 << bits) - 1 - start.zero_OG, rtol=1e-5, atol=1e-4)


def test_it_is_the_same_each_time_and_for_any_statistics() -> None:
    weight_OI = student(16, 128)
    stats = Statistics(128, tokens=9, gram_II=torch.eye(128), fisher_OI=torch.rand(16, 128))
    one, other = HQQ()(weight_OI, stats), HQQ()(weight_OI, Statistics(128))
    assert all(torch.equal(t, other.tensors()[name]) for name, t in one.tensors().items())
    assert HQQ.needs == frozenset()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 3.0, -0.0123, 1e-4])
def test_equal_weights_are_exact(value: float, dtype: torch.dtype) -> None:
    weight_OI = torch.full((4, 64), value).to(dtype)
    assert torch.equal(hqq(weight_OI).decode(), weight_OI)


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**-10])
def test_small_weights_keep_their_relative_error_in_bfloat16(scale: float) -> None:
    weight_OI = student(16, 128, dtype=torch.bfloat16)
    usual = mean_error(weight_OI, hqq(weight_OI).decode())
    assert mean_error(weight_OI * scale, hqq(weight_OI * scale).decode()) < 1.05 * usual * scale


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_span_little_far_from_zero_are_kept_to_their_own_precision(dtype: torch.dtype) -> None:
    weight_OI = (3 + torch.rand((8, 64), generator=torch.Generator().manual_seed(0)) / 50).to(dtype)
    decoded = hqq(weight_OI, bits=4).decode()
    limit = 0.02 / 15 / 2 + 2 * torch.finfo(dtype).eps * 3
    assert float((decoded.float() - weight_OI.float()).abs().max()) < limit


# Integers with real-valued zero points


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), [(2, 16), (3, 32), (4, 0), (8, 64)])
def test_what_is_stored_is_read_back_and_its_bytes_are_known(bits: int, group: int, dtype: torch.dtype) -> None:
    part = hqq(student(6, 128, dtype=dtype), bits=bits, group=group)
    stored = part.tensors()
    form = form_from_dict(form_to_dict(part.form))
    read = form.read(stored, 6, 128, dtype)
    assert torch.equal(read.decode(), part.decode())
    assert part.decode().dtype == dtype
    assert part.zero_OG.dtype == zero_dtype(dtype)
    assert all(torch.equal(t, stored[name]) for name, t in read.tensors().items())
    assert form.nbytes(6, 128, dtype) == sum(t.numel() * t.element_size() for t in stored.values())


def test_a_weight_is_its_scale_times_code_minus_zero() -> None:
    scale, zero = torch.tensor([[0.5, 2.0]]), torch.tensor([[1.25, -0.5]])
    part = Affine(torch.tensor([[0, 3, 1, 2]], dtype=torch.uint8), scale, zero, AffineForm(2, 2))
    assert part.decode().tolist() == [[-0.625, 0.875, 3.0, 5.0]]


def test_rows_of_a_weight_can_be_taken_out() -> None:
    encoded = Encoded((hqq(student(9, 64), group=16),))
    assert torch.equal(encoded.sample(1, 3).decode(), encoded.decode()[1::3])
    pieces = encoded.split([2, 7])
    assert torch.equal(torch.cat([piece.decode() for piece in pieces]), encoded.decode())


def test_other_shapes_and_dtypes_are_refused_when_they_are_read() -> None:
    part = hqq(student(4, 64), group=16)
    stored = part.tensors()
    for rows, columns, dtype in ((5, 64, torch.float32), (4, 32, torch.float32), (4, 64, torch.float16)):
        with pytest.raises(ValueError, match="are expected"):
            part.form.read(stored, rows, columns, dtype)


@pytest.mark.parametrize(
    "settings",
    [{"bits": 1}, {"group": -1}, {"p": 0.0}, {"p": 1.5}, {"beta": 0.0}, {"kappa": 0.9}, {"iterations": -1}],
    ids=str,
)
def test_settings_that_do_not_exist_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        HQQ(**settings)
