"""NF4: the facts and invariants of its paper and of bitsandbytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersely.codecs import form_from_dict, form_to_dict
from tersely.codecs.codebook import DOUBLE_BLOCK, NF4_LEVELS, NormalFloatForm, NormalFloats, dynamic_levels
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.encode.nf4 import NF4

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = torch.tensor(NF4_LEVELS)


def gaussian(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)).to(dtype)


def encoded(weight_OI: Tensor, *, block: int = 64, double: bool = False) -> NormalFloats:
    (part,) = NF4(block=block, double=double)(weight_OI, Statistics(weight_OI.shape[1])).parts
    assert isinstance(part, NormalFloats)
    return part


def rmse(weight_OI: Tensor, part: NormalFloats) -> float:
    return float((part.decode() - weight_OI).square().mean().sqrt())


def test_the_levels_are_quantiles_of_a_normal_distribution() -> None:
    """8 above zero of a line of 9 from 0.9677083 to 1/2, 7 below of one of 8, and zero; over the largest."""
    above = torch.special.ndtri(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1])
    expected = torch.cat([below, torch.zeros(1, dtype=torch.float64), above.flip(0)]) / above[0]
    torch.testing.assert_close(LEVELS.double(), expected, rtol=0, atol=2e-7)
    card = "-1 -.6961928 -.5250731 -.3949175 -.2844414 -.1847734 -.0910500 0 "
    card += ".0795803 .1609302 .2461123 .3379152 .4407098 .5626170 .7229568 1"
    torch.testing.assert_close(LEVELS, torch.tensor([float(x) for x in card.split()]), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_magnitude_of_a_block_comes_back_with_its_sign(dtype: torch.dtype) -> None:
    weight_OI = gaussian(16, 128, dtype=dtype)
    decoded, blocks = encoded(weight_OI).decode().view(-1, 64), weight_OI.view(-1, 64)
    place = blocks.abs().argmax(1, keepdim=True)
    assert torch.equal(decoded.gather(1, place), blocks.gather(1, place))


@pytest.mark.parametrize("double", [False, True])
def test_zero_stays_zero(double: bool) -> None:
    weight_OI = gaussian(8, 128)
    weight_OI[:, ::3] = 0
    weight_OI[2] = 0
    decoded = encoded(weight_OI, double=double).decode()
    assert bool((decoded[weight_OI == 0] == 0).all())
    assert bool((encoded(torch.zeros(4, 64), double=double).decode() == 0).all())


@pytest.mark.parametrize("seed", range(3))
def test_the_error_on_normal_weights_is_the_published_one(seed: int) -> None:
    weight_OI = gaussian(512, 512, seed)
    assert rmse(weight_OI, encoded(weight_OI)) == pytest.approx(0.0921, rel=0.01)
    assert rmse(weight_OI, encoded(weight_OI, double=True)) == pytest.approx(0.0921, rel=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
def test_encoding_again_changes_nothing(dtype: torch.dtype) -> None:
    once = encoded(gaussian(16, 96, dtype=dtype))
    twice = encoded(once.decode())
    assert torch.equal(once.codes_OI, twice.codes_OI)
    assert torch.equal(once.decode(), twice.decode())


def test_double_quantization_moves_a_magnitude_by_less_than_a_step_of_its_code() -> None:
    weight_OI = gaussian(300, 256) * torch.linspace(0.01, 3, 300)[:, None]
    single, double = encoded(weight_OI).magnitudes, encoded(weight_OI, double=True).magnitudes
    assert double.scale_S is not None
    assert double.offset is not None
    scale_B = double.scale_S.repeat_interleave(DOUBLE_BLOCK)[: len(double.absmax_B)]
    assert float(double.offset) == pytest.approx(float(single.absmax_B.mean()), rel=1e-6)
    levels = dynamic_levels()
    codes = double.absmax_B.long()
    steps = torch.maximum(
        levels[(codes + 1).clamp(max=255)] - levels[codes], levels[codes] - levels[(codes - 1).clamp(min=0)]
    )
    moved = (double.decode() - single.absmax_B).abs()
    assert bool((moved <= steps * scale_B * (1 + 1e-5)).all())
    assert float(moved.max()) > 0


def test_the_dynamic_code_is_the_published_one() -> None:
    levels = dynamic_levels()
    assert len(set(levels.tolist())) == 256
    assert bool((levels.diff() > 0).all())
    assert 0.0 in levels.tolist()
    # The means of 64 stretches of 0.1 .. 1, of 32 of 0.01 .. 0.1, and so on; 1 stands alone, and there is no -1.
    torch.testing.assert_close(levels[-3:], torch.tensor([1 - 0.9 / 64 * 1.5, 1 - 0.9 / 128, 1.0]))
    torch.testing.assert_close(levels[0], torch.tensor(-1 + 0.9 / 128))
    torch.testing.assert_close(levels[levels > 0][0], torch.tensor(5.5e-7))
    assert torch.equal(-levels[:127].flip(0), levels[128:255])


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(8, 64), (7, 33), (5, 9), (3, 1)])
def test_every_weight_goes_to_the_level_that_is_nearest_in_its_block_which_may_cross_rows(
    rows: int, columns: int, double: bool
) -> None:
    weight_OI = gaussian(rows, columns)
    part = encoded(weight_OI, block=16, double=double)
    absmax_B = part.magnitudes.decode()
    flat = weight_OI.flatten()
    for i, (value, decoded) in enumerate(zip(flat.tolist(), part.decode().flatten().tolist(), strict=True)):
        reachable = LEVELS.double() * float(absmax_B[i // 16])
        assert abs(decoded - value) == pytest.approx(float((reachable - value).abs().min()), rel=1e-4, abs=1e-6)
    if not double:
        expected = torch.stack([block.abs().max() for block in flat.split(16)])  # type: ignore[no-untyped-call]
        assert torch.equal(absmax_B, expected)


@pytest.mark.parametrize(("double", "bits"), [(False, 4 + 32 / 64), (True, 4 + 8 / 64 + 32 / (64 * 256))])
def test_bits_per_weight_are_those_of_the_paper(double: bool, bits: float) -> None:
    form = NormalFloatForm(64, double)
    assert 8 * form.nbytes(4096, 4096, torch.bfloat16) / 4096**2 == pytest.approx(bits, abs=1e-4)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(8, 64), (7, 33), (1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_stored_is_read_back_and_its_bytes_are_known(
    dtype: torch.dtype, rows: int, columns: int, double: bool
) -> None:
    part = encoded(gaussian(rows, columns, dtype=dtype), double=double)
    stored = part.tensors()
    form = form_from_dict(form_to_dict(part.form))
    read = form.read(stored, rows, columns, dtype)
    assert torch.equal(read.decode(), part.decode())
    assert part.decode().dtype == dtype
    assert all(torch.equal(t, stored[name]) for name, t in read.tensors().items())
    assert form.nbytes(rows, columns, dtype) == sum(t.numel() * t.element_size() for t in stored.values())


def test_the_first_of_two_codes_lies_in_the_high_half_of_a_byte() -> None:
    part = encoded(torch.tensor([[1.0, -1, 0]]))
    assert part.codes_OI.tolist() == [[15, 0, 7]]
    assert part.tensors()["weight_nf4"].tolist() == [0xF0, 0x70]


def test_scaling_a_weight_by_a_power_of_two_scales_what_comes_back() -> None:
    weight_OI = gaussian(8, 64)
    for factor in (2.0**-40, 2.0**40):
        assert torch.equal(encoded(weight_OI * factor).decode(), encoded(weight_OI).decode() * factor)


@pytest.mark.parametrize("double", [False, True])
def test_rows_decode_without_the_others_but_are_not_stored_without_them(double: bool) -> None:
    part = encoded(gaussian(12, 40), double=double)
    assert torch.equal(part.sample(1, 3).decode(), part.decode()[1::3])
    assert torch.equal(part.sample(1, 3).sample(1, 2).decode(), part.decode()[4::6])
    assert torch.equal(torch.cat([piece.decode() for piece in part.split([5, 7])]), part.decode())
    for piece in (part.sample(0, 2), part.split([5, 7])[0], part.split([5, 7])[1]):
        with pytest.raises(ValueError, match="share blocks"):
            piece.tensors()


def test_a_large_weight_is_rounded_piece_by_piece_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    import tersely.codecs.codebook as module

    weight_OI = gaussian(33, 70)
    whole = encoded(weight_OI, double=True)
    monkeypatch.setattr(module, "_CHUNK", 100)
    pieces = encoded(weight_OI, double=True)
    assert torch.equal(pieces.codes_OI, whole.codes_OI)
    assert torch.equal(pieces.decode(), whole.decode())


def test_other_shapes_are_refused_when_they_are_read() -> None:
    part = encoded(gaussian(8, 64), double=True)
    stored = part.tensors()
    with pytest.raises(ValueError, match="are expected"):
        part.form.read(stored, 8, 63, torch.float32)
    for name, damaged in (
        ("weight_absmax", stored["weight_absmax"][1:]),
        ("weight_absmax", stored["weight_absmax"].float()),
        ("weight_absmax_scale", stored["weight_absmax_scale"].repeat(2)),
    ):
        with pytest.raises(ValueError, match="are expected"):
            part.form.read({**stored, name: damaged}, 8, 64, torch.float32)
    with pytest.raises(KeyError):
        part.form.read({"weight_nf4": stored["weight_nf4"]}, 8, 64, torch.float32)


def test_a_block_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="block=0"):
        NF4(block=0)
