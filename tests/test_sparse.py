"""Few values at arbitrary places."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersely.codecs import Encoded, form_from_dict, form_to_dict
from tersely.codecs.sparse import Sparse, SparseForm, check_density, sparse
from tersely.errors import UsageError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def scattered(rows: int, columns: int, share: float, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight that is zero but for some values."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand((rows, columns), generator=generator) < share
    return torch.where(keep, torch.randn((rows, columns), generator=generator), 0.0).to(dtype)


def held(weight_OI: Tensor) -> Sparse:
    kept = weight_OI != 0
    return sparse(weight_OI[kept], kept)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_a_weight_comes_back_as_it_was_from_what_is_stored(
    rows: int, columns: int, share: float, dtype: torch.dtype, seed: int
) -> None:
    weight_OI = scattered(rows, columns, share, seed, dtype)
    part = held(weight_OI)
    stored = part.tensors()
    form = form_from_dict(form_to_dict(part.form))
    assert form == part.form
    assert torch.equal(part.decode(), weight_OI)
    assert torch.equal(form.read(stored, rows, columns, dtype).decode(), weight_OI)
    assert form.nbytes(rows, columns, dtype) == sum(t.numel() * t.element_size() for t in stored.values())
    assert part.form.count(rows, columns) == int((weight_OI != 0).sum())


def test_rows_are_stored_one_after_the_other_with_the_place_where_each_starts() -> None:
    weight_OI = torch.tensor([[0.0, 5, 0, 7], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 2, 3]])
    stored = {name: tensor.tolist() for name, tensor in held(weight_OI).tensors().items()}
    assert stored == {
        "weight_sparse_values": [5, 7, 1, 2, 3],
        "weight_sparse_columns": [1, 3, 0, 2, 3],
        "weight_sparse_rows": [0, 2, 2, 3, 5],
    }


@pytest.mark.parametrize(("columns", "dtype"), [(32768, torch.int16), (32769, torch.int32)])
def test_columns_take_two_bytes_where_these_suffice(columns: int, dtype: torch.dtype) -> None:
    weight_OI = torch.zeros(2, columns)
    weight_OI[1, -1] = 3
    part = held(weight_OI)
    assert part.columns_N.dtype == dtype
    assert torch.equal(part.decode(), weight_OI)


@pytest.mark.parametrize(("count", "dtype"), [(32767, torch.int16), (32768, torch.int32)])
def test_pointers_take_two_bytes_where_these_suffice(count: int, dtype: torch.dtype) -> None:
    weight_OI = torch.zeros(8, 8192).flatten()
    weight_OI[:count] = 1
    part = held(weight_OI.view(8, 8192))
    assert part.pointers_P.dtype == dtype
    assert part.form.nbytes(8, 8192, torch.float32) == sum(
        t.numel() * t.element_size() for t in part.tensors().values()
    )
    assert torch.equal(part.decode().flatten(), weight_OI)


def test_rows_of_a_weight_can_be_taken_out() -> None:
    weight_OI = scattered(13, 30, 0.1)
    encoded = Encoded((held(weight_OI),))
    assert torch.equal(encoded.sample(2, 4).decode(), weight_OI[2::4])
    pieces = encoded.split([5, 1, 7])
    assert torch.equal(torch.cat([piece.decode() for piece in pieces]), weight_OI)
    for piece, rows in zip(pieces, (5, 1, 7), strict=True):
        (form,) = piece.forms
        assert torch.equal(form.read(piece.tensors(), rows, 30, torch.float32).decode(), piece.decode())


@pytest.mark.parametrize(
    ("leaf", "change", "said"),
    [
        ("values", lambda t: t[:-1], "are expected"),
        ("values", lambda t: t.half(), "do not fit together"),
        ("columns", lambda t: t + 20, "outside its 20 columns"),
        ("columns", lambda t: -1 - t, "outside its 20 columns"),
        ("rows", lambda t: t[:-1], "are expected"),
        ("rows", lambda t: t + 1, "do not fit together"),
        ("rows", lambda t: t.flip(0), "do not fit together"),
    ],
)
def test_damaged_rows_are_refused_when_they_are_read(leaf: str, change: object, said: str) -> None:
    part = held(scattered(6, 20, 0.2))
    stored = part.tensors()
    assert callable(change)
    stored[f"weight_sparse_{leaf}"] = change(stored[f"weight_sparse_{leaf}"])
    with pytest.raises(ValueError, match=said):
        part.form.read(stored, 6, 20, torch.float32)


def test_a_missing_tensor_is_a_missing_key() -> None:
    stored = held(scattered(6, 20, 0.2)).tensors()
    del stored["weight_sparse_rows"]
    with pytest.raises(KeyError):
        SparseForm(0.2).read(stored, 6, 20, torch.float32)


@pytest.mark.parametrize("density", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused_by_name(density: float) -> None:
    with pytest.raises(UsageError, match="outliers="):
        check_density("outliers", density)
