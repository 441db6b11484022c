"""Additive vector codebooks: the stored form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersely.codecs.vectors import VectorForm, Vectors, sum_entries

FORMS = pytest.mark.parametrize(
    "form",
    [
        VectorForm(codebooks=2, bits=8, group=8),
        VectorForm(codebooks=1, bits=6, group=4),
        VectorForm(codebooks=3, bits=3, group=2),
        VectorForm(codebooks=1, bits=11, group=8),
        VectorForm(codebooks=1, bits=16, group=8),
    ],
    ids=lambda form: f"{form.codebooks}x{form.bits}g{form.group}",
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def random_part(form: VectorForm, rows: int = 10, columns: int = 24, dtype: torch.dtype = torch.float32) -> Vectors:
    generator = torch.Generator().manual_seed(0)
    codes_ONM = torch.randint(
        0, 1 << form.bits, (rows, columns // form.group, form.codebooks), generator=generator, dtype=torch.int32
    )
    codes_ONM[0, 0] = (1 << form.bits) - 1
    codebooks_MKV = torch.randn((form.codebooks, 1 << form.bits, form.group), generator=generator).to(dtype)
    return Vectors(codes_ONM, codebooks_MKV, torch.rand((rows, 1), generator=generator).to(dtype), form)


def one_by_one(part: Vectors) -> Tensor:
    """The definition, in float64."""
    rows, vectors, codebooks = part.codes_ONM.shape
    total = torch.zeros((rows, vectors, part.form.group), dtype=torch.float64)
    for o in range(rows):
        for n in range(vectors):
            for m in range(codebooks):
                total[o, n] += part.codebooks_MKV[m, int(part.codes_ONM[o, n, m])].double()
    return total.flatten(1) * part.scale_O1.double()


@DTYPES
@FORMS
def test_the_weight_is_the_scaled_sum_of_the_entries(form: VectorForm, dtype: torch.dtype) -> None:
    """(a)"""
    part = random_part(form, dtype=dtype)
    assert part.decode().dtype == dtype
    assert torch.allclose(part.decode(), one_by_one(part).to(dtype), atol=1e-6)


@DTYPES
@FORMS
def test_what_is_stored_is_read_back_bit_for_bit_in_the_bytes_that_were_promised(
    form: VectorForm, dtype: torch.dtype
) -> None:
    """(g)"""
    part = random_part(form, dtype=dtype)
    stored = part.tensors()
    again = form.read(stored, 10, 24, dtype)
    assert torch.equal(again.codes_ONM, part.codes_ONM)
    assert torch.equal(again.decode(), part.decode())
    assert sum(t.numel() * t.element_size() for t in stored.values()) == form.nbytes(10, 24, dtype)


def test_bits_per_weight_are_those_of_the_card_where_words_are_full() -> None:
    """codebooks * bits / group + 16 O / (O I) + 16 codebooks 2^bits group / (O I)"""
    rows, columns = 512, 1024
    for codebooks, bits, group in ((2, 8, 8), (1, 16, 8), (1, 12, 8), (4, 6, 16)):
        form = VectorForm(codebooks, bits, group)
        expected = codebooks * bits / group + 16 / columns + 16 * codebooks * 2**bits * group / (rows * columns)
        assert 8 * form.nbytes(rows, columns, torch.float16) / (rows * columns) == pytest.approx(expected)


@FORMS
def test_pieces_and_samples_decode_to_those_of_the_whole(form: VectorForm) -> None:
    part = random_part(form)
    assert torch.equal(torch.cat([piece.decode() for piece in part.split([4, 6])]), part.decode())
    assert torch.equal(part.sample(1, 3).decode(), part.decode()[1::3])


def test_gradients_reach_the_entries_that_are_used() -> None:
    part = random_part(VectorForm(2, 3, 4))
    books = part.codebooks_MKV.clone().requires_grad_()
    (slope_MKV,) = torch.autograd.grad(sum_entries(part.codes_ONM, books).sum(), books)
    for m in range(2):
        used = torch.bincount(part.codes_ONM[:, :, m].flatten(), minlength=8)
        assert torch.equal(slope_MKV[m], used[:, None].expand(8, 4).float())
