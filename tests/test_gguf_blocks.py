"""GGML's blocks: codes as they were, scales in float16, by the gguf package's own decoder."""

from __future__ import annotations

import gguf
import pytest
import torch
from torch import Tensor

from tersely.codecs import Encoded, IntegerForm, Integers, Part, Scheme
from tersely.codecs.affine import Affine, AffineForm
from tersely.codecs.floats import MXFP4Form, fit_mxfp4, round_to_floats
from tersely.codecs.integer import fit_grid, round_to_grid
from tersely.codecs.ternary import Ternary, TernaryForm, ternarize
from tersely.errors import CheckpointError
from tersely.export.gguf.blocks import choose, pack
from tersely.export.gguf.layouts import Type
from tersely.hadamard import hadamard

PARTS = [(bits, symmetric, group) for bits in range(2, 9) for symmetric in (True, False) for group in (32, 256, 0)]


def integers(bits: int, symmetric: bool, group: int, dtype: torch.dtype) -> Integers:
    weight_OI = 0.05 * torch.randn((5, 768), generator=torch.Generator().manual_seed(bits))
    grid = {"bits": bits, "group": group, "symmetric": symmetric}
    scale_OG, zero_OG = fit_grid(weight_OI, clip="none", scale_dtype=dtype, **grid)  # type: ignore[arg-type]
    return round_to_grid(weight_OI, scale_OG, zero_OG, IntegerForm(bits, group, symmetric))


def values(part: Integers) -> Tensor:
    """scale * (code - zero), unrounded."""
    zero = torch.tensor(float(1 << (part.bits - 1))) if part.zero_OG is None else part.zero_OG[:, :, None].float()
    codes = part.codes_OI.view(len(part.codes_OI), -1, part.group).float() - zero
    return (codes * part.scale_OG[:, :, None].float()).view(part.codes_OI.shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("bits", "symmetric", "group"), PARTS)
def test_integers_keep_their_codes(bits: int, symmetric: bool, group: int, dtype: torch.dtype) -> None:
    part = integers(bits, symmetric, group, dtype)
    scheme = Scheme((part.form,))
    choice = choose(scheme, 768)
    assert choice.kept == ((bits, symmetric) != (8, False))
    if not choice.kept:
        assert "8-bit integers" in choice.reason
        assert "with a whole zero" in choice.reason
        return
    packed = pack(Encoded((part,)), scheme, choice)
    found = torch.from_numpy(gguf.quants.dequantize(packed.data_OY, choice.type))
    if dtype != torch.float32 and choice.type not in (Type.Q4_1, Type.Q5_1):
        assert torch.equal(found, values(part))
        assert torch.equal(found.to(dtype), part.decode())
        assert packed.change == 0
    else:
        # A scale, an offset, or both are rounded to float16: by 2^-11 of them at most.
        scale_OI = part.scale_OG.float().repeat_interleave(part.group, 1)
        assert ((found - values(part)).abs() <= 2**-11 * scale_OI * 2 * (1 << bits)).all()
        assert torch.equal(((found - values(part)) / scale_OI).round(), torch.zeros_like(found))
        assert 0 < packed.change < 0.002


@pytest.mark.parametrize("group", [32, 0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_type_is_the_smallest_that_has_room(symmetric: bool, group: int) -> None:
    found = [choose(Scheme((IntegerForm(bits, group, symmetric),)), 768).type.name for bits in range(2, 9)]
    assert (
        found
        == {
            (True, 32): ["Q4_0", "Q4_0", "Q4_0", "Q5_0", "Q8_0", "Q8_0", "Q8_0"],
            (False, 32): ["Q4_0", "Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q8_0", "Q8_0"],
            (True, 0): ["Q2_K", "Q3_K", "Q4_0", "Q5_0", "Q6_K", "Q8_0", "Q8_0"],
            (False, 0): ["Q2_K", "Q4_0", "Q4_K", "Q5_K", "Q8_0", "Q8_0", "Q8_0"],
        }[symmetric, group]
    )


def ternary(group: int) -> Part:
    weight_OI = torch.randn((5, 768), generator=torch.Generator().manual_seed(0))
    codes_OI, scale_RG = ternarize(weight_OI, group, torch.float16)
    return Ternary(codes_OI, scale_RG, TernaryForm(group, "trits"))


def affine(bits: int) -> Part:
    generator = torch.Generator().manual_seed(bits)
    codes_OI = torch.randint(0, 1 << bits, (5, 768), generator=generator, dtype=torch.uint8)
    scale_OG = torch.rand((5, 12), generator=generator).half() / 64
    zero_OG = (torch.rand((5, 12), generator=generator) * (1 << bits)).half()
    return Affine(codes_OI, scale_OG, zero_OG, AffineForm(bits, 64))


def mxfp4() -> Part:
    weight_OI = torch.randn((5, 768), generator=torch.Generator().manual_seed(0))
    return round_to_floats(weight_OI, fit_mxfp4(weight_OI, "mse"), None, MXFP4Form())


@pytest.mark.parametrize(
    ("part", "kind", "close"),
    [
        (ternary(0), Type.TQ1_0, 0),
        (ternary(-1), Type.TQ1_0, 0),
        (ternary(64), Type.Q4_0, 0),
        (affine(2), Type.Q4_1, 1e-3),
        (affine(4), Type.Q4_1, 1e-3),
        (affine(5), Type.Q5_1, 1e-3),
        (mxfp4(), Type.MXFP4, 0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_forms_that_gguf_has_keep_their_codes(part: Part, kind: Type, close: float) -> None:
    scheme = Scheme((part.form,))
    choice = choose(scheme, 768)
    assert (choice.type, choice.kept) == (kind, True)
    order_O = torch.tensor([3, 0, 4, 2, 1])
    packed = pack(Encoded((part,)), scheme, choice, order_O)
    found_OI = torch.from_numpy(gguf.quants.dequantize(packed.data_OY, kind))
    wanted_OI = part.decode().float()[order_O]
    if close:
        assert (found_OI - wanted_OI).abs().max() < close * wanted_OI.abs().max()
        assert packed.change < 2 * close
    else:
        assert torch.equal(found_OI, wanted_OI)
        assert packed.change == 0


@pytest.mark.parametrize(("columns", "kind"), [(96, Type.Q8_0), (48, Type.F16)])
def test_a_form_that_no_type_holds_goes_to_the_nearest_and_says_so(columns: int, kind: Type) -> None:
    weight_OI = torch.randn((3, columns), generator=torch.Generator().manual_seed(0))
    form = IntegerForm(4, 16, True)
    scale_OG, _ = fit_grid(weight_OI, bits=4, group=16, symmetric=True, clip="none", scale_dtype=torch.float32)
    part, scheme = round_to_grid(weight_OI, scale_OG, None, form), Scheme((form,))
    choice = choose(scheme, columns)
    assert (choice.type, choice.kept) == (kind, False)
    assert choice.reason.startswith("no type holds 4-bit integers in groups of 16;")
    packed = pack(Encoded((part,)), scheme, choice)
    found = torch.from_numpy(gguf.quants.dequantize(packed.data_OY, kind))
    block = part.decode().abs().view(3, -1, 32 if kind == Type.Q8_0 else columns).amax(-1, keepdim=True)
    measured = ((found - part.decode()).abs().view(3, *block.shape[1:2], -1) / block).max()
    assert packed.change == pytest.approx(float(measured))
    assert 0 < packed.change < 0.005


def test_a_scale_that_float16_has_not_is_an_error() -> None:
    part = Integers(torch.zeros(1, 32, dtype=torch.uint8), torch.tensor([[1e5]]), None, IntegerForm(4, 32, True))
    scheme = Scheme((part.form,))
    with pytest.raises(CheckpointError, match="beyond float16's largest"):
        pack(Encoded((part,)), scheme, choose(scheme, 32))


def test_rotated_inputs_are_turned_back_into_the_weight() -> None:
    part = integers(4, True, 32, torch.float32)
    scheme = Scheme((part.form,), hadamard=256)
    choice = choose(scheme, 768)
    assert "behind a Hadamard matrix" in choice.reason
    packed = pack(Encoded((part,)), scheme, choice)
    found_OI = torch.from_numpy(gguf.quants.dequantize(packed.data_OY, choice.type))
    x_TI = torch.randn((9, 768), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(x_TI @ found_OI.T, hadamard(x_TI, 256) @ part.decode().T, rtol=0, atol=0.02)
