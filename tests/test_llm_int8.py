"""LLM.int8(), by the invariants of its card, and the columns that it keeps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tersely.codecs import Encoded, Integers, form_from_dict, form_to_dict
from tersely.codecs.columns import Columns
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.encode.llm_int8 import LLMInt8

COLUMNS = 64
LARGE = [5, 17, 40]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def weights(rows: int = 24, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn((rows, COLUMNS), generator=torch.Generator().manual_seed(seed)).to(dtype)


def activations() -> Tensor:
    """(T, I), within 5 but for three inputs that reach 60."""
    x_TI = torch.randn((128, COLUMNS), generator=torch.Generator().manual_seed(9)).clamp_(-5, 5)
    x_TI[:, LARGE] *= 20
    return x_TI


def measured(x_TI: Tensor) -> Statistics:
    stats = Statistics(COLUMNS, needs=LLMInt8.needs)
    stats.add(x_TI)
    return stats.finish()


def columns(encoded: Encoded) -> Columns:
    part = encoded.parts[1]
    assert isinstance(part, Columns)
    return part


def codes(encoded: Encoded) -> Integers:
    part = encoded.parts[0]
    assert isinstance(part, Integers)
    return part


@DTYPES
def test_the_inputs_that_reach_the_threshold_keep_their_columns_bit_for_bit(dtype: torch.dtype) -> None:
    weight_OI = weights(dtype=dtype)
    encoded = LLMInt8()(weight_OI, measured(activations()))
    assert columns(encoded).index_K.tolist() == LARGE
    assert torch.equal(encoded.decode()[:, LARGE], weight_OI[:, LARGE])
    assert not codes(encoded).decode()[:, LARGE].any()
    assert encoded.note == ""


@DTYPES
def test_a_threshold_that_every_input_reaches_changes_nothing(dtype: torch.dtype) -> None:
    weight_OI = weights(dtype=dtype)
    encoded = LLMInt8(threshold=1e-6, most=1.0)(weight_OI, measured(activations()))
    assert torch.equal(encoded.decode(), weight_OI)


@DTYPES
def test_a_threshold_that_none_reaches_is_plain_int8_with_a_scale_per_output(dtype: torch.dtype) -> None:
    weight_OI = weights(dtype=dtype)
    weight_OI[3] = 0
    (part,) = LLMInt8(threshold=math.inf)(weight_OI, measured(activations())).parts
    assert isinstance(part, Integers)
    scale_O1 = (weight_OI.float().abs().amax(1, keepdim=True) / 127).to(dtype)
    scale_O1[3] = 1
    expected = (weight_OI.float() / scale_O1.float()).round().clamp(-128, 127)
    assert torch.equal(part.codes_OI.int() - 128, expected.int())
    assert torch.equal(part.decode(), expected.to(dtype) * scale_O1)
    largest = part.codes_OI.int().sub(128).abs().amax(1)
    assert int(largest[3]) == 0
    assert int(largest.sort().values[1]) >= 126


def test_on_outliers_the_error_is_far_below_that_of_plain_int8() -> None:
    """Columns that are kept neither widen the grid of a row nor carry an error into large inputs."""
    weight_OI, x_TI = weights(), activations()
    weight_OI[:, LARGE] *= 10
    kept, plain = (LLMInt8(threshold=t)(weight_OI, measured(x_TI)).decode() for t in (6.0, math.inf))
    lost = [float(((weight_OI - decoded) @ x_TI.t()).norm()) for decoded in (kept, plain)]
    assert lost[0] < 0.05 * lost[1]


def test_the_product_of_integers_is_exact() -> None:
    """y = (codes of x) (codes of W)^T * scales: in int64, and as a float64 product of what is decoded."""
    encoded = LLMInt8(threshold=math.inf)(weights(), measured(activations()))
    part = codes(encoded)
    x_TI = torch.randint(-127, 128, (16, COLUMNS), generator=torch.Generator().manual_seed(2))
    product_TO = x_TI @ (part.codes_OI.long() - 128).t()
    expected_TO = product_TO.double() * part.scale_OG.double().t()
    signed_OI = (part.codes_OI.double() - 128) * part.scale_OG.double()
    torch.testing.assert_close(x_TI.double() @ signed_OI.t(), expected_TO, rtol=1e-12, atol=0)


def test_of_too_many_outliers_the_largest_are_kept_and_the_rest_are_told() -> None:
    x_TI = activations()
    encoded = LLMInt8(threshold=2.0, most=0.05)(weights(), measured(x_TI))
    expected = x_TI.abs().amax(0).topk(3).indices.sort().values
    assert columns(encoded).index_K.tolist() == expected.tolist() == LARGE
    assert encoded.note == f"{COLUMNS} inputs reach 2: the 3 largest are kept"


def test_without_tokens_no_columns_are_kept_and_the_note_says_so() -> None:
    encoded = LLMInt8()(weights(), Statistics(COLUMNS, needs=LLMInt8.needs))
    assert len(encoded.parts) == 1
    assert encoded.note == "no tokens: no columns are kept"


@DTYPES
def test_what_is_stored_is_read_back_bit_for_bit_in_the_bytes_that_the_form_says(dtype: torch.dtype) -> None:
    part = columns(LLMInt8()(weights(dtype=dtype), measured(activations())))
    stored = part.tensors()
    assert sum(t.numel() * t.element_size() for t in stored.values()) == part.form.nbytes(24, COLUMNS, dtype)
    read = part.form.read(stored, 24, COLUMNS, dtype)
    assert read.decode().dtype == dtype
    assert torch.equal(read.decode(), part.decode())
    assert form_from_dict(form_to_dict(part.form)) == part.form
    for leaf in stored:
        with pytest.raises(KeyError, match=leaf):
            part.form.read({name: t for name, t in stored.items() if name != leaf}, 24, COLUMNS, dtype)


def test_stacked_weights_are_encoded_as_each_alone_and_samples_are_rows() -> None:
    one, other, stats = weights(16, seed=1), weights(8, seed=2), measured(activations())
    together = LLMInt8()(torch.cat([one, other]), stats)
    for piece, weight_OI in zip(together.split([16, 8]), (one, other), strict=True):
        assert torch.equal(piece.decode(), LLMInt8()(weight_OI, stats).decode())
    assert torch.equal(together.sample(1, 5).decode(), together.decode()[1::5])


def test_the_forms_bound_those_that_it_leaves() -> None:
    method = LLMInt8(most=0.25)
    bound = method.forms(24, COLUMNS)
    assert [form_to_dict(form) for form in bound][1] == {"kind": "columns", "count": 16}
    for threshold in (0.1, 6.0, math.inf):
        encoded = LLMInt8(threshold, most=0.25)(weights(), measured(activations()))
        sizes = [sum(f.nbytes(24, COLUMNS, torch.float32) for f in forms) for forms in (encoded.forms, bound)]
        assert sizes[0] <= sizes[1]
    method.check(7)


@pytest.mark.parametrize(
    "settings", [{"threshold": 0.0}, {"threshold": math.nan}, {"most": 1.5}], ids=lambda settings: next(iter(settings))
)
def test_settings_that_do_not_exist_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        LLMInt8(**settings)
