"""Ternary weights: packing, rounding, and what the card says of both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersely.codecs.ternary import (
    PACKINGS,
    WHOLE,
    Packing,
    Ternary,
    TernaryForm,
    pack_trits,
    ternarize,
    unpack_trits,
)
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.encode.ternary import TernaryRounding

GROUPS = (WHOLE, 0, 16)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gaussian(rows: int = 24, columns: int = 64, seed: int = 0) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))


def encoded(weight_OI: Tensor, group: int = 0, packing: Packing = "trits") -> Ternary:
    (part,) = TernaryRounding(group=group, packing=packing)(weight_OI, Statistics(weight_OI.shape[1])).parts
    assert isinstance(part, Ternary)
    return part


def groups_of(weight_OI: Tensor, group: int) -> Tensor:
    """The weights that share a scale, one row for each."""
    return weight_OI.reshape(1, -1) if group == WHOLE else weight_OI.reshape(-1, group or weight_OI.shape[1])


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 5), columns=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_packing_trits_is_bijective_and_takes_a_byte_for_five(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes_RN = torch.randint(0, 3, (rows, columns), generator=generator, dtype=torch.uint8)
    packed = pack_trits(codes_RN)
    assert packed.shape == (rows, -(-columns // 5))
    assert torch.equal(unpack_trits(packed, columns), codes_RN)


def test_every_five_trits_are_one_byte_below_243() -> None:
    bytes_R1 = torch.arange(243, dtype=torch.uint8)[:, None]
    assert torch.equal(pack_trits(unpack_trits(bytes_R1, 5)), bytes_R1)
    assert len(torch.unique(unpack_trits(bytes_R1, 5), dim=0)) == 243


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("group", GROUPS)
def test_what_is_stored_is_read_back_bit_for_bit_in_the_bytes_that_were_promised(
    group: int, packing: Packing, dtype: torch.dtype
) -> None:
    weight_OI = gaussian(7, 48).to(dtype)
    part = encoded(weight_OI, group, packing)
    stored = part.tensors()
    again = part.form.read(stored, 7, 48, dtype)
    assert torch.equal(again.codes_OI, part.codes_OI)
    assert torch.equal(again.decode(), part.decode())
    assert part.decode().dtype == dtype
    assert sum(t.numel() * t.element_size() for t in stored.values()) == part.form.nbytes(7, 48, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_a_group_has_three_distinct_values_minus_zero_and_plus_its_mean_size(group: int, dtype: torch.dtype) -> None:
    weight_OI = gaussian().to(dtype)
    decoded = groups_of(encoded(weight_OI, group).decode(), group)
    for own, values in zip(groups_of(weight_OI, group), decoded, strict=True):
        scale = own.float().abs().mean().to(dtype)
        assert sorted(set(values.tolist())) == pytest.approx([-scale.item(), 0.0, scale.item()], rel=2e-2)
        expected = (own.float() / scale.float()).round().clamp(-1, 1)
        # The mean may be rounded either way in its last bit.
        assert ((values / values.max()).float() != expected).float().mean() < 0.01


def test_a_gaussian_weight_is_zero_where_it_is_below_half_its_mean_size() -> None:
    codes_OI, _ = ternarize(gaussian(256, 256), 0)
    assert float((codes_OI == 1).float().mean()) == pytest.approx(0.31, abs=0.01)


@pytest.mark.parametrize("group", GROUPS)
def test_the_scale_must_be_stored_since_zeros_lower_the_mean_of_what_is_decoded(group: int) -> None:
    """Codes survive a second rounding, the scale becomes scale * (1 - share of zeros)."""
    part = encoded(gaussian(), group)
    codes_OI, scale = ternarize(part.decode(), group)
    assert torch.equal(codes_OI, part.codes_OI)
    zeros = (groups_of(part.codes_OI, group) == 1).float().mean(1)
    assert torch.allclose(scale.flatten(), part.scale_RG.flatten() * (1 - zeros))


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_of_zeros_stays_zero(group: int) -> None:
    weight_OI = gaussian() * (0.0 if group == WHOLE else 1.0)
    weight_OI[3] = 0
    decoded = encoded(weight_OI, group).decode()
    assert not decoded[3].any()
    assert decoded.isfinite().all()


@pytest.mark.parametrize("group", GROUPS)
def test_pieces_and_samples_decode_to_those_of_the_whole(group: int) -> None:
    part = encoded(gaussian(), group)
    assert torch.equal(torch.cat([piece.decode() for piece in part.split([4, 20])]), part.decode())
    assert torch.equal(part.sample(1, 3).decode(), part.decode()[1::3])


def test_finer_scales_lose_less() -> None:
    weight_OI = gaussian(64, 256) * torch.rand((64, 256), generator=torch.Generator().manual_seed(5)).exp()
    weight_OI *= torch.logspace(-1, 1, 64)[:, None]
    lost = [float((encoded(weight_OI, g).decode() - weight_OI).square().sum()) for g in (WHOLE, 0, 16)]
    assert lost[0] > lost[1] > lost[2]


def test_scales_can_be_stored_in_another_dtype_than_that_of_the_master_weight() -> None:
    codes_OI, scale_RG = ternarize(gaussian(), 16, torch.bfloat16)
    decoded = Ternary(codes_OI, scale_RG, TernaryForm(16, "trits")).decode()
    assert decoded.dtype == scale_RG.dtype == torch.bfloat16


@pytest.mark.parametrize("settings", [{"group": -2}, {"packing": "bytes"}])
def test_settings_that_do_not_exist_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        TernaryRounding(**settings)


def test_a_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UsageError, match="group=100 does not divide 4096"):
        TernaryRounding(group=100).check(4096)
    with pytest.raises(UsageError, match="group=48 does not divide 64"):
        ternarize(gaussian(), 48)
