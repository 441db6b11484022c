"""Low-rank parts: their factors as they are stored, and the singular values that they are made of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersely.codecs import form_from_dict, form_to_dict
from tersely.codecs.low_rank import Factors, LowRank, LowRankForm, check_low_rank, factorized
from tersely.errors import UsageError
from tersely.methods.encode.singular import largest_singular

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
FACTORS = pytest.mark.parametrize("factors", ["plain", "mxint8"])
ROWS, COLUMNS, RANK = 24, 40, 9


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(factors: Factors, dtype: torch.dtype, spread: float = 1.0) -> LowRank:
    """Of random factors, b's larger by `spread`, with values of very different size."""
    form = LowRankForm(RANK, factors, "quantized")
    sizes_R = torch.logspace(-3, 2, RANK, dtype=torch.float64)
    return factorized(gaussian(ROWS, RANK) * sizes_R * spread, gaussian(RANK, COLUMNS, 1) / spread, form, dtype)


@FACTORS
@DTYPES
def test_what_is_stored_is_read_back_bit_for_bit_in_the_bytes_that_the_form_says(
    factors: Factors, dtype: torch.dtype
) -> None:
    part = made(factors, dtype)
    stored = part.tensors()
    assert sum(t.numel() * t.element_size() for t in stored.values()) == part.form.nbytes(ROWS, COLUMNS, dtype)
    read = part.form.read(stored, ROWS, COLUMNS, dtype)
    assert torch.equal(read.a_RI, part.a_RI)
    assert torch.equal(read.b_OR, part.b_OR)
    assert read.decode().dtype == dtype
    assert torch.equal(read.decode(), (part.b_OR.float() @ part.a_RI.float()).to(dtype))
    assert form_from_dict(form_to_dict(part.form)) == part.form
    for leaf in stored:
        with pytest.raises(KeyError, match=leaf):
            part.form.read({name: t for name, t in stored.items() if name != leaf}, ROWS, COLUMNS, dtype)


@FACTORS
def test_pieces_and_samples_are_rows_of_the_whole(factors: Factors) -> None:
    part = made(factors, torch.float32)
    whole_OI = part.decode()
    torch.testing.assert_close(torch.cat([p.decode() for p in part.split([10, 14])]), whole_OI)
    torch.testing.assert_close(part.sample(1, 3).decode(), whole_OI[1::3])
    piece = part.split([10, 14])[1]
    assert torch.equal(piece.form.read(piece.tensors(), 14, COLUMNS, torch.float32).decode(), piece.decode())


@DTYPES
def test_factors_are_balanced_so_that_no_size_of_theirs_leaves_the_range_of_float16(dtype: torch.dtype) -> None:
    part = made("plain", dtype, spread=1e6)
    torch.testing.assert_close(part.b_OR.abs().amax(0), part.a_RI.abs().amax(1), rtol=0.01, atol=0)
    torch.testing.assert_close(part.decode(), made("plain", dtype).decode())


def test_a_rank_without_weight_stays_zero() -> None:
    form = LowRankForm(3, "mxint8", "full")
    part = factorized(torch.zeros(4, 3), gaussian(3, 8), form, torch.bfloat16)
    assert not part.decode().any()


@DTYPES
def test_every_code_and_exponent_of_mxint8_is_a_value_of_the_dtype_within_half_a_step(dtype: torch.dtype) -> None:
    """step = 2^(exponent - 7), 2^exponent the least power of two above the block; the largest code may fall to 127."""
    sizes = torch.logspace(-20, 4, 100, base=2, dtype=torch.float64)
    a_RI = gaussian(100, 32) * sizes[:, None]
    form = LowRankForm(100, "mxint8", "quantized")
    # Rows of b as large as those of a: nothing is left to balance.
    b_OR = a_RI.abs().amax(1)[None].repeat(2, 1)
    part = factorized(b_OR, a_RI, form, dtype)
    stored = part.tensors()
    largest = a_RI.view(100, 2, 16).abs().amax(-1)
    power = torch.floor(torch.log2(largest)) + 1
    if dtype == torch.float16:
        power = power.clamp(min=-17)  # its smallest number is 2^-24
    assert torch.equal(stored["low_rank_a_exponent"].double(), power)
    step = torch.exp2(power - 7).repeat_interleave(16, dim=1)
    error = (part.a_RI.double() - a_RI).abs() / step
    top = stored["low_rank_a"].abs() == 127
    assert float(error[~top].max()) <= 0.5
    assert float(error.max()) <= 1
    assert torch.equal(part.a_RI.double(), stored["low_rank_a"].double() * step)


def test_settings_that_do_not_exist_are_refused_by_name() -> None:
    for name, settings in (
        ("rank=0", (0, "plain", "full")),
        ("factors", (1, "int8", "full")),
        ("inputs", (1, "plain", "")),
    ):
        with pytest.raises(UsageError, match=name):
            check_low_rank(*settings)


# Singular values


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (600, 560)], ids=str)
@pytest.mark.parametrize("rank", [1, 20, 1000])
def test_what_is_left_is_the_tail_of_the_singular_values(shape: tuple[int, int], rank: int) -> None:
    """Large matrices are iterated, and must come as close."""
    matrix_MN = gaussian(*shape) * torch.logspace(0, -1, shape[1], dtype=torch.float64)
    left, sigma, right = largest_singular(matrix_MN, rank)
    expected = torch.linalg.svdvals(matrix_MN)
    kept = min(rank, *shape)
    assert sigma.shape == (kept,)
    tail = float(expected[kept:].square().sum())
    error = float((matrix_MN - left * sigma @ right).square().sum())
    assert error == pytest.approx(tail, rel=1e-3, abs=1e-18 * float(expected.square().sum()))
    torch.testing.assert_close(sigma[:1], expected[:1], rtol=1e-2, atol=0)
    torch.testing.assert_close(left.t() @ left, torch.eye(kept, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(right @ right.t(), torch.eye(kept, dtype=torch.float64), rtol=0, atol=1e-9)


def test_the_rank_by_energy_is_the_least_whose_share_suffices() -> None:
    matrix_MN = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))
    for energy, rank in ((0.4, 1), (0.41, 2), (0.7, 2), (0.9, 3), (0.91, 4), (1.0, 4)):
        assert len(largest_singular(matrix_MN, 4, energy)[1]) == rank
    assert len(largest_singular(matrix_MN, 2, 1.0)[1]) == 2
    assert len(largest_singular(torch.zeros(4, 4), 4, 0.5)[1]) == 4


@pytest.mark.parametrize("shape", [(600, 560), (30, 50)], ids=str)
def test_equal_matrices_have_equal_vectors(shape: tuple[int, int]) -> None:
    matrix_MN = gaussian(*shape)
    state = torch.random.get_rng_state()
    first, second = largest_singular(matrix_MN, 8), largest_singular(matrix_MN, 8)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)
