"""Labels of tables of values, one table an output. (NF4's fixed levels are in test_nf4.)"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersely.codecs import Encoded, form_from_dict, form_to_dict
from tersely.codecs.codebook import Lookup, LookupForm, nearest_labels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def table_of(rows: int, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn((rows, 1 << bits), generator=torch.Generator().manual_seed(bits))
    return values.to(dtype).sort(dim=1).values


def looked_up(rows: int, columns: int, bits: int, dtype: torch.dtype = torch.float32) -> Lookup:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    return Lookup(labels, table_of(rows, bits, dtype), LookupForm(bits))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_what_is_stored_is_read_back_and_its_bytes_are_known(bits: int, dtype: torch.dtype) -> None:
    part = looked_up(5, 77, bits, dtype)
    stored = part.tensors()
    form = form_from_dict(form_to_dict(part.form))
    read = form.read(stored, 5, 77, dtype)
    assert torch.equal(read.decode(), part.decode())
    assert all(torch.equal(t, stored[name]) for name, t in read.tensors().items())
    assert form.nbytes(5, 77, dtype) == sum(t.numel() * t.element_size() for t in stored.values())


def test_a_weight_is_the_value_of_its_label_in_the_table_of_its_output() -> None:
    part = looked_up(4, 9, 3)
    for row in range(4):
        for column in range(9):
            assert part.decode()[row, column] == part.table_OK[row, int(part.labels_OI[row, column])]


@pytest.mark.parametrize("dtype", DTYPES)
def test_labels_are_those_of_the_nearest_value(dtype: torch.dtype) -> None:
    weight_OI = torch.randn((6, 200), generator=torch.Generator().manual_seed(2)).to(dtype)
    table_OK = table_of(6, 3, dtype)
    decoded = table_OK.gather(1, nearest_labels(weight_OI, table_OK).long()).double()
    nearest = (weight_OI.double()[:, :, None] - table_OK.double()[:, None, :]).abs().amin(2)
    assert torch.equal((decoded - weight_OI.double()).abs(), nearest)


def test_a_weight_halfway_goes_to_the_lower_value() -> None:
    assert nearest_labels(torch.tensor([[0.5, 1.5, -3, 9]]), torch.tensor([[0.0, 1, 2, 4]])).tolist() == [[0, 1, 0, 3]]


def test_neighbouring_floats_are_told_apart() -> None:
    one = torch.tensor(1.0)
    values = torch.stack([one, torch.nextafter(one, torch.tensor(2.0)), torch.tensor(3.0), torch.tensor(3.0)])[None]
    assert nearest_labels(values, values).tolist() == [[0, 1, 2, 2]]


def test_rows_of_a_weight_can_be_taken_out() -> None:
    encoded = Encoded((looked_up(9, 20, 4),))
    assert torch.equal(encoded.sample(1, 3).decode(), encoded.decode()[1::3])
    pieces = encoded.split([2, 7])
    assert torch.equal(torch.cat([piece.decode() for piece in pieces]), encoded.decode())
    (form,) = pieces[1].forms
    assert torch.equal(form.read(pieces[1].tensors(), 7, 20, torch.float32).decode(), encoded.decode()[2:])


def test_tables_and_labels_of_another_shape_are_refused_when_they_are_read() -> None:
    stored = looked_up(5, 20, 4).tensors()
    for rows, columns, dtype in ((4, 20, torch.float32), (5, 200, torch.float32), (5, 20, torch.float16)):
        with pytest.raises(ValueError, match="are expected"):
            LookupForm(4).read(stored, rows, columns, dtype)
