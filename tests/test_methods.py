"""Laws of every method in METHODS, then those of GPTQ."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tersely.codecs import Encoded, Integers, form_from_dict, form_to_dict, read_encoded
from tersely.codecs.integer import round_to_grid
from tersely.errors import UsageError
from tersely.measure import MEASURES, Statistics
from tersely.methods import METHODS, Encode
from tersely.methods.encode.gptq import GPTQ
from tersely.methods.encode.rtn import RTN
from tersely.plan.reading import method_fields

ON_GRIDS: tuple[type[Encode], ...] = (RTN, GPTQ)
"""Methods that leave integers on uniform grids and have their settings."""
MEASURED_ON_GRIDS = tuple(m for m in ON_GRIDS if "gram" in m().needs)
TOKENS = 512


def make(method: type[Encode], **settings: Any) -> Encode:
    return method(**settings)


def weights(rows: int = 16, columns: int = 64, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)).to(dtype)


def gram_of(columns: int = 64, seed: int = 0, tokens: int = TOKENS) -> Tensor:
    """Of correlated activations, some channels much larger than others."""
    generator = torch.Generator().manual_seed(1000 + seed)
    mix = torch.randn((columns, columns), generator=generator) * torch.rand(columns, generator=generator) ** 2
    x_TI = torch.randn((tokens, columns), generator=generator) @ mix
    x_TI[:, :: columns // 4] *= 10
    return x_TI.t() @ x_TI


def measured(gram_II: Tensor, tokens: int = TOKENS) -> Statistics:
    return Statistics(len(gram_II), tokens=tokens, gram_II=gram_II)


def everything(weight_OI: Tensor, seed: int = 0) -> Statistics:
    """All that a method can ask for, for this weight."""
    generator = torch.Generator().manual_seed(2000 + seed)
    columns = weight_OI.shape[1]
    x_TI = torch.randn((TOKENS, columns), generator=generator) * torch.linspace(0.1, 8, columns)
    stats = Statistics(columns, needs=frozenset(MEASURES))
    stats.add(x_TI)
    stats.fisher_OI = torch.rand(weight_OI.shape, generator=generator)
    return stats.finish()


def fitting(method: type[Encode]) -> Encode:
    """The method with its defaults, on groups that divide the widths used here."""
    return method(**({"group": 16} if "group" in method_fields(method) else {}))


def part(encoded: Encoded) -> Integers:
    (only,) = encoded.parts
    assert isinstance(only, Integers)
    return only


def weighted_error(weight_OI: Tensor, decoded_OI: Tensor, gram_II: Tensor) -> float:
    delta = (weight_OI - decoded_OI).double()
    return float((delta @ gram_II.double() * delta).sum())


def on_grid(weight_OI: Tensor, encoded: Encoded) -> Tensor:
    """Codes of the nearest points of the grid that a method chose."""
    own = part(encoded)
    return round_to_grid(weight_OI, own.scale_OG, own.zero_OG, own.form).codes_OI


def tokens_of(text: str) -> str:
    return " ".join(text.split())


# Laws of every method


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_frozen_dataclasses_with_a_documented_name_and_defaults(method: type[Encode]) -> None:
    made = make(method)
    assert made.needs <= MEASURES.keys()
    frozen: Any = made
    assert dataclasses.is_dataclass(frozen)
    field = next(iter(method_fields(method)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(frozen, field, getattr(frozen, field))
    assert tokens_of(method.__doc__ or "")
    assert method.name == method.name.lower()


def test_names_of_methods_are_distinct() -> None:
    assert len({m.name for m in METHODS}) == len(METHODS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_equal_inputs_give_equal_bytes_in_the_dtype_of_the_weight(method: type[Encode], dtype: torch.dtype) -> None:
    weight_OI = weights(32, 128, dtype=dtype)
    stats, kept = everything(weight_OI), weight_OI.clone()
    first, second = fitting(method)(weight_OI, stats), fitting(method)(weight_OI, everything(weight_OI))
    assert torch.equal(first.decode(), second.decode())
    assert first.decode().dtype == dtype
    assert first.decode().shape == weight_OI.shape
    assert first.tensors().keys() == second.tensors().keys()
    assert all(torch.equal(t, second.tensors()[name]) for name, t in first.tensors().items())
    assert torch.equal(weight_OI, kept)
    for name, value in vars(everything(weight_OI)).items():
        own = getattr(stats, name)
        if isinstance(value, list):
            assert all(torch.equal(*pair) for pair in zip(own, value, strict=True))
        else:
            assert torch.equal(own, value) if isinstance(value, Tensor) else own == value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_stored_is_read_back_and_its_bytes_were_said_beforehand(
    method: type[Encode], dtype: torch.dtype
) -> None:
    weight_OI = weights(32, 128, dtype=dtype)
    made = fitting(method)
    encoded = made(weight_OI, everything(weight_OI))
    stored = encoded.tensors()
    assert len(stored) == sum(len(part.tensors()) for part in encoded.parts), "two parts have a leaf of one name"
    forms = [form_from_dict(form_to_dict(form)) for form in encoded.forms]
    assert tuple(forms) == encoded.forms
    read = read_encoded(forms, stored, 32, 128, dtype)
    assert torch.equal(read.decode(), encoded.decode())
    assert {name: t.dtype for name, t in read.tensors().items()} == {name: t.dtype for name, t in stored.items()}
    assert all(torch.equal(t.view(torch.uint8), stored[name].view(torch.uint8)) for name, t in read.tensors().items())
    nbytes = sum(t.numel() * t.element_size() for t in stored.values())
    said = sum(form.nbytes(32, 128, dtype) for form in made.forms(32, 128))
    assert nbytes <= said <= 1.3 * nbytes + 64


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_of_the_outputs_decodes_to_those_outputs(method: type[Encode]) -> None:
    weight_OI = weights(32, 128)
    encoded = fitting(method)(weight_OI, everything(weight_OI))
    assert torch.equal(encoded.sample(1, 3).decode(), encoded.decode()[1::3])
    pieces = encoded.split([20, 12])
    assert torch.equal(torch.cat([piece.decode() for piece in pieces]), encoded.decode())


@pytest.mark.parametrize("clip", ["none", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ON_GRIDS)
def test_the_outputs_of_a_weight_are_independent_of_one_another(
    method: type[Encode], symmetric: bool, clip: str
) -> None:
    one, other, stats = weights(24, seed=1), weights(8, seed=2), measured(gram_of())
    encode = make(method, bits=3, group=16, symmetric=symmetric, clip=clip)
    together = encode(torch.cat([one, other]), stats).split([24, 8])
    for piece, weight_OI in zip(together, (one, other), strict=True):
        assert torch.equal(part(piece).codes_OI, part(encode(weight_OI, stats)).codes_OI)
        assert torch.equal(piece.decode(), encode(weight_OI, stats).decode())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ON_GRIDS)
def test_the_error_falls_as_bits_are_added(method: type[Encode], symmetric: bool) -> None:
    weight_OI, gram_II = weights(32, 128), gram_of(128)
    errors = []
    for bits in range(2, 9):
        encoded = make(method, bits=bits, group=32, symmetric=symmetric)(weight_OI, measured(gram_II))
        errors.append(weighted_error(weight_OI, encoded.decode(), gram_II))
    assert all(fewer > 1.5 * more for fewer, more in pairwise(errors))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ON_GRIDS)
def test_weights_of_zero_stay_zero(method: type[Encode], symmetric: bool) -> None:
    weight_OI = weights()
    weight_OI[3] = 0
    decoded = make(method, group=16, symmetric=symmetric)(weight_OI, measured(gram_of())).decode()
    assert bool((decoded[3] == 0).all())
    assert bool(torch.isfinite(decoded).all())


@pytest.mark.parametrize("method", ON_GRIDS)
def test_a_group_that_does_not_divide_is_refused_before_anything_is_done(method: type[Encode]) -> None:
    with pytest.raises(UsageError, match="group=100 does not divide 4096; use 64 or 128"):
        make(method, group=100).check(4096)
    make(method, group=0).check(7)


@pytest.mark.parametrize(
    "settings",
    [{"bits": 1}, {"bits": 9}, {"group": -1}, {"clip": "max"}],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.parametrize("method", ON_GRIDS)
def test_settings_that_do_not_exist_are_refused_by_name(method: type[Encode], settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        make(method, **settings)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", MEASURED_ON_GRIDS)
def test_with_statistics_the_output_error_is_below_that_of_rounding(
    method: type[Encode], symmetric: bool, bits: int
) -> None:
    """On the mean over seeds: it is not a theorem for a single weight."""
    own = rounded = 0.0
    for seed in range(8):
        weight_OI, gram_II = weights(seed=seed), gram_of(seed=seed)
        stats = measured(gram_II)
        base = RTN(bits=bits, group=32, symmetric=symmetric)(weight_OI, stats).decode()
        made = make(method, bits=bits, group=32, symmetric=symmetric)(weight_OI, stats).decode()
        scale = weighted_error(weight_OI, torch.zeros_like(weight_OI), gram_II)
        own += weighted_error(weight_OI, made, gram_II) / scale
        rounded += weighted_error(weight_OI, base, gram_II) / scale
    assert own < 0.7 * rounded


@pytest.mark.parametrize("method", MEASURED_ON_GRIDS)
def test_without_enough_tokens_a_method_rounds_to_nearest_and_says_so(method: type[Encode]) -> None:
    weight_OI = weights()
    nothing = make(method, group=16, clip="none")(weight_OI, Statistics(64))
    few = make(method, group=16, clip="none")(weight_OI, measured(gram_of(tokens=63), tokens=63))
    expected = RTN(group=16, clip="none")(weight_OI, Statistics(64)).decode()
    for encoded, tokens in ((nothing, 0), (few, 63)):
        assert f"{tokens} calibration tokens for 64 inputs" in encoded.note
        assert "rounded to nearest" in encoded.note
        assert torch.equal(encoded.decode(), expected)


# GPTQ, by the letters of its card

GRIDS = pytest.mark.parametrize(
    ("bits", "group", "symmetric", "act_order"),
    [
        (4, 0, True, True),
        (4, 16, True, True),
        (3, 16, False, True),
        (3, 32, True, False),
        (2, 0, False, False),
    ],
)


def settings_of(bits: int, group: int, symmetric: bool, act_order: bool) -> GPTQ:
    return GPTQ(bits=bits, group=group, symmetric=symmetric, act_order=act_order)


def classic(weight_OI: Tensor, gram_II: Tensor, grid: Integers, damping: float, act_order: bool) -> Tensor:
    """Codes of the published sweep, in float64: H^-1 = U^T U, and each column's error spread by a row of U."""
    columns = weight_OI.shape[1]
    order = torch.argsort(gram_II.diagonal(), descending=True, stable=True)
    order = order if act_order else torch.arange(columns)
    hessian = gram_II.double()[order][:, order]
    hessian += damping * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    left = weight_OI.double()[:, order]
    codes = torch.empty_like(left)
    zero_OG = torch.full_like(grid.scale_OG, float(1 << (grid.bits - 1))) if grid.zero_OG is None else grid.zero_OG
    for k in range(columns):
        own = int(order[k]) // grid.group
        scale, zero = grid.scale_OG[:, own].double(), zero_OG[:, own].double()
        codes[:, k] = (torch.round(left[:, k] / scale) + zero).clamp(0, (1 << grid.bits) - 1)
        error = (left[:, k] - (codes[:, k] - zero) * scale) / factor[k, k]
        left[:, k:] -= error[:, None] * factor[k, k:]
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result.to(torch.uint8)


@GRIDS
@pytest.mark.parametrize("columns", [64, 160])
def test_gptq_gives_the_codes_of_the_published_sweep(
    columns: int, bits: int, group: int, symmetric: bool, act_order: bool
) -> None:
    weight_OI, gram_II = weights(32, columns), gram_of(columns)
    method = settings_of(bits, group, symmetric, act_order)
    encoded = method(weight_OI, measured(gram_II))
    expected = classic(weight_OI, gram_II, part(encoded), method.damping, act_order)
    rows = (part(encoded).codes_OI != expected).any(dim=1)
    # A tie may fall to either side in float32, and then the rest of its row differs.
    assert int(rows.sum()) <= 1
    assert encoded.note == ""


@GRIDS
def test_a_every_code_is_the_nearest_one_after_the_errors_before_it_and_the_losses_add_up(
    bits: int, group: int, symmetric: bool, act_order: bool
) -> None:
    weight_OI, gram_II = weights(), gram_of()
    method = settings_of(bits, group, symmetric, act_order)
    own = part(method(weight_OI, measured(gram_II)))
    order = torch.argsort(gram_II.diagonal(), descending=True, stable=True)
    order = order if act_order else torch.arange(64)
    damped = gram_II.double() + method.damping * gram_II.double().diagonal().mean() * torch.eye(64)
    flip = order.flip(0)
    factor = torch.linalg.cholesky(damped[flip][:, flip]).flip(0, 1)
    unit = factor / factor.diagonal()
    value = own.decode().double()
    delta = (weight_OI.double() - value)[:, order]
    error = delta + delta @ (unit - torch.eye(64))
    step = own.scale_OG.double().repeat_interleave(own.group, dim=1)[:, order]
    codes = own.codes_OI[:, order]
    clipped = (codes == 0) | (codes == (1 << bits) - 1)
    assert bool((error.abs() <= step / 2 * (1 + 1e-4))[~clipped].all())
    loss = (error.square() * factor.diagonal().square()).sum()
    delta = weight_OI.double() - value
    torch.testing.assert_close(loss, (delta @ damped * delta).sum(), rtol=1e-8, atol=0)


@GRIDS
def test_b_with_a_diagonal_gram_matrix_it_rounds_to_nearest(
    bits: int, group: int, symmetric: bool, act_order: bool
) -> None:
    weight_OI = weights()
    gram_II = torch.diag(torch.rand(64, generator=torch.Generator().manual_seed(3)) + 0.1) * TOKENS
    encoded = settings_of(bits, group, symmetric, act_order)(weight_OI, measured(gram_II))
    assert torch.equal(part(encoded).codes_OI, on_grid(weight_OI, encoded))


def test_b_without_clip_search_a_diagonal_gram_matrix_gives_what_rtn_gives() -> None:
    weight_OI, stats = weights(), measured(torch.diag(torch.linspace(1, 2, 64)) * TOKENS)
    rounded = RTN(group=16, clip="none")(weight_OI, stats)
    assert torch.equal(GPTQ(group=16, clip="none")(weight_OI, stats).decode(), rounded.decode())


@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (16, 4), (64, 64), (1024, 16)])
def test_c_the_answer_does_not_depend_on_the_blocking(outer: int, inner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import tersely.methods.encode.sweep as module

    weight_OI, stats = weights(columns=160), measured(gram_of(160))
    expected = part(GPTQ(bits=3, group=32)(weight_OI, stats)).codes_OI
    if not hasattr(module, "_BLOCK") or not hasattr(module, "_INNER"):
        pytest.fail("the sizes of the blocks have other names now: adapt this test")
    monkeypatch.setattr(module, "_BLOCK", outer)
    monkeypatch.setattr(module, "_INNER", inner)
    rows = (part(GPTQ(bits=3, group=32)(weight_OI, stats)).codes_OI != expected).any(dim=1)
    assert int(rows.sum()) <= 1  # a tie, as above


def test_d_a_subset_of_the_outputs_gives_those_rows() -> None:
    weight_OI, stats = weights(32), measured(gram_of())
    whole = part(GPTQ(bits=3, group=16)(weight_OI, stats)).codes_OI
    few = part(GPTQ(bits=3, group=16)(weight_OI[5:11], stats)).codes_OI
    assert torch.equal(few, whole[5:11])


@pytest.mark.parametrize("factor", [2.0**-10, 2.0, 2.0**10])
def test_e_scaling_the_gram_matrix_changes_nothing(factor: float) -> None:
    weight_OI, gram_II = weights(), gram_of()
    expected = GPTQ(bits=3, group=16)(weight_OI, measured(gram_II)).decode()
    assert torch.equal(GPTQ(bits=3, group=16)(weight_OI, measured(gram_II * factor)).decode(), expected)


def test_f_a_weight_that_lies_on_its_grid_is_unchanged() -> None:
    codes = torch.randint(0, 16, (8, 64), generator=torch.Generator().manual_seed(5))
    codes[:, ::16], codes[:, 1::16] = 0, 15  # so that the grid that is fitted is this one
    weight_OI = (codes - 3).float() * 0.125
    encoded = GPTQ(bits=4, group=16, symmetric=False, clip="none")(weight_OI, measured(gram_of()))
    assert torch.equal(encoded.decode(), weight_OI)


@GRIDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_g_every_entry_lies_on_its_grid(
    dtype: torch.dtype, bits: int, group: int, symmetric: bool, act_order: bool
) -> None:
    encoded = settings_of(bits, group, symmetric, act_order)(weights(dtype=dtype), measured(gram_of()))
    own = part(encoded)
    assert own.codes_OI.dtype == torch.uint8
    assert int(own.codes_OI.max()) < 1 << bits
    assert own.scale_OG.dtype == dtype
    assert own.scale_OG.shape == (16, 64 // group if group else 1)
    assert (own.zero_OG is None) == symmetric
    assert torch.equal(on_grid(encoded.decode(), encoded), own.codes_OI)


@pytest.mark.parametrize("symmetric", [True, False])
def test_g_permuting_the_inputs_permutes_the_answer(symmetric: bool) -> None:
    weight_OI, gram_II = weights(), gram_of()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(6))
    method = GPTQ(bits=3, group=0, symmetric=symmetric, clip="none")
    plain = method(weight_OI, measured(gram_II)).decode()
    permuted = method(weight_OI[:, order], measured(gram_II[order][:, order])).decode()
    assert torch.equal(permuted, plain[:, order])


def test_h_at_three_bits_it_beats_rounding_on_the_mean_over_seeds() -> None:
    ratios = []
    for seed in range(20):
        weight_OI, gram_II = weights(seed=seed), gram_of(seed=seed)
        grid = {"bits": 3, "group": 0, "clip": "none"}
        own = make(GPTQ, **grid)(weight_OI, measured(gram_II)).decode()
        rounded = make(RTN, **grid)(weight_OI, measured(gram_II)).decode()
        ratios.append(weighted_error(weight_OI, own, gram_II) / weighted_error(weight_OI, rounded, gram_II))
    assert sum(ratios) / len(ratios) < 0.5


# GPTQ: what can be wrong with the statistics


@pytest.mark.parametrize("act_order", [True, False])
def test_columns_that_are_never_used_keep_their_rounded_values(act_order: bool) -> None:
    weight_OI, gram_II = weights(), gram_of()
    dead = torch.tensor([0, 7, 63])
    gram_II[dead], gram_II[:, dead] = 0, 0
    encoded = GPTQ(bits=3, group=16, act_order=act_order)(weight_OI, measured(gram_II))
    assert torch.equal(part(encoded).codes_OI[:, dead], on_grid(weight_OI, encoded)[:, dead])
    assert not torch.equal(part(encoded).codes_OI, on_grid(weight_OI, encoded))
    assert bool(torch.isfinite(encoded.decode()).all())


def test_a_weight_that_nothing_reaches_is_rounded_to_nearest() -> None:
    weight_OI = weights()
    encoded = GPTQ(bits=4, group=16)(weight_OI, measured(torch.zeros(64, 64)))
    assert torch.equal(part(encoded).codes_OI, on_grid(weight_OI, encoded))
    assert bool((encoded.decode() - weight_OI).abs().max() < 1)


def test_a_gram_matrix_without_full_rank_is_damped_when_the_user_asks_for_it() -> None:
    weight_OI, gram_II = weights(), gram_of(tokens=20)
    encoded = GPTQ(bits=4, group=16, minimum_tokens=0.0)(weight_OI, measured(gram_II, tokens=20))
    rounded = RTN(bits=4, group=16)(weight_OI, measured(gram_II)).decode()
    assert encoded.note == ""
    assert weighted_error(weight_OI, encoded.decode(), gram_II) < weighted_error(weight_OI, rounded, gram_II)


def with_eigenvalue(value: float) -> Tensor:
    """A matrix of mean diagonal about 1 whose least eigenvalue is `value`: rounding in a long sum can do this."""
    basis: Tensor = torch.linalg.qr(weights(64, 64, seed=9).double())[0]
    values = torch.ones(64, dtype=torch.float64)
    values[0] = value
    return ((basis * values) @ basis.t() * TOKENS).float()


@pytest.mark.parametrize(("least", "raised"), [(-0.05, "0.1"), (-0.5, "1")])
def test_when_the_factorization_fails_the_damping_grows_tenfold_and_the_note_says_so(least: float, raised: str) -> None:
    weight_OI, gram_II = weights(), with_eigenvalue(least)
    encoded = GPTQ(bits=4, group=16)(weight_OI, measured(gram_II))
    assert encoded.note == f"damping raised to {raised}"
    damped = GPTQ(bits=4, group=16, damping=float(raised))(weight_OI, measured(gram_II))
    assert torch.equal(encoded.decode(), damped.decode())


def test_when_no_damping_helps_it_rounds_to_nearest_and_the_note_says_so() -> None:
    weight_OI = weights()
    encoded = GPTQ(bits=4, group=16)(weight_OI, measured(with_eigenvalue(-3.0)))
    assert "rounded to nearest" in encoded.note
    assert torch.equal(part(encoded).codes_OI, on_grid(weight_OI, encoded))


@pytest.mark.parametrize(
    "settings", [{"damping": 0.0}, {"damping": 1.5}, {"damping": -0.01}, {"minimum_tokens": -1.0}], ids=str
)
def test_gptq_refuses_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        make(GPTQ, **settings)


# Statistics


def test_statistics_are_the_sum_of_outer_products_in_float32_whatever_comes_in() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn((n, 200), generator=generator).bfloat16() for n in (7, 1, 300)]
    stats = Statistics(200)
    for x_TI in batches:
        stats.add(x_TI)
    stats.finish()
    x = torch.cat(batches).double()
    assert stats.tokens == 308
    assert stats.gram_II is not None
    assert stats.gram_II.dtype == torch.float32
    torch.testing.assert_close(stats.gram_II.double(), x.t() @ x, rtol=1e-4, atol=1e-3)
    assert torch.equal(stats.gram_II, stats.gram_II.t())


def test_statistics_of_nothing_have_no_matrix() -> None:
    assert Statistics(8).finish().gram_II is None
