"""The layer-wise fit of AQLM: k-means, least squares codebooks and scales, beam search, and all of it in turns."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

from tersely.codecs.vectors import Vectors, sum_entries
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.encode.aqlm import (
    AQLM,
    cluster,
    damped,
    entry_sums,
    nearest_entries,
    output_loss,
    search_codes,
    solve_codebooks,
    solve_scales,
    sort_codes,
    start,
)
from tersely.methods.encode.gptq import GPTQ

COLUMNS = 32
SMALL: dict[str, Any] = {"bits": 4, "group": 4}


def gaussian(rows: int = 48, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))


def gram_of(columns: int = COLUMNS, seed: int = 0, tokens: int = 512) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    mix = torch.randn((columns, columns), generator=generator) * torch.rand(columns, generator=generator) ** 2
    x_TI = torch.randn((tokens, columns), generator=generator) @ mix
    return x_TI.t() @ x_TI


def measured(columns: int = COLUMNS, seed: int = 0, tokens: int = 512) -> Statistics:
    return Statistics(columns, tokens=tokens, gram_II=gram_of(columns, seed, tokens))


def encoded(weight_OI: Tensor, stats: Statistics, **settings: Any) -> Vectors:
    (part,) = AQLM(**{**SMALL, **settings})(weight_OI, stats).parts
    assert isinstance(part, Vectors)
    return part


def lost(weight_OI: Tensor, decoded_OI: Tensor, gram_II: Tensor) -> float:
    delta = (weight_OI - decoded_OI).double()
    return float((delta @ gram_II.double() * delta).sum())


def started(codebooks: int = 2, entries: int = 16, group: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weight, Gram matrix, codes, codebooks, scales."""
    weight_OI = gaussian()
    scale_O1 = weight_OI.square().mean(1, keepdim=True).sqrt()
    codes_ONM, books_MKV = start(weight_OI / scale_O1, codebooks, entries, group)
    return weight_OI, damped(gram_of(), 0.01), codes_ONM, books_MKV, scale_O1


# k-means


def test_points_go_to_their_nearest_mean_and_means_are_those_of_their_points() -> None:
    points = gaussian(300, 4)
    means, codes = cluster(points, 16)
    assert torch.equal(codes, torch.cdist(points, means).argmin(1))
    for k in range(16):
        assert torch.allclose(means[k], points[codes == k].mean(0), atol=0.05)


def test_clusters_that_are_far_apart_are_found_from_points_that_repeat() -> None:
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 9.0]])
    means, codes = cluster(centres.repeat_interleave(20, 0), 4)
    assert torch.equal(means[codes], centres.repeat_interleave(20, 0))


def test_more_entries_than_points_leave_nothing_over() -> None:
    points = gaussian(10, 3)
    means, codes = cluster(points, 16)
    assert torch.allclose(means[codes], points, atol=1e-6)
    assert means.isfinite().all()


def test_sums_over_entries_are_those_of_their_points() -> None:
    codes, values = torch.randint(0, 9, (200,), generator=torch.Generator().manual_seed(0)), gaussian(200, 3)
    expected = torch.zeros((12, 3)).index_add_(0, codes, values)
    assert torch.allclose(entry_sums(*sort_codes(codes, 12), values), expected, atol=1e-5)


# Codes


@pytest.mark.parametrize("group", [1, 4, 8])
def test_with_one_codebook_and_no_correlation_the_nearest_entry_is_found(group: int) -> None:
    """(e)"""
    weight_OI, books_MKV = gaussian(), gaussian(32, group, 1)[None]
    scale_O1 = torch.rand((48, 1)) + 0.5
    codes_ONM = torch.zeros((48, COLUMNS // group, 1), dtype=torch.int32)
    found = search_codes(weight_OI, torch.eye(COLUMNS), codes_ONM, books_MKV, scale_O1, beam=32)
    vectors = (weight_OI / scale_O1).view(-1, group)
    assert torch.equal(found.flatten().long(), nearest_entries(vectors, books_MKV[0]))
    assert torch.equal(found.flatten().long(), torch.cdist(vectors, books_MKV[0]).argmin(1))


def test_with_two_codebooks_and_a_full_beam_the_best_pair_is_found_for_any_metric() -> None:
    group, entries = 4, 6
    weight_OI, books_MKV = gaussian(10, group), torch.stack([gaussian(entries, group, s) for s in (1, 2)])
    gram_II, scale_O1 = gram_of(group), torch.rand((10, 1)) + 0.5
    codes_ONM = torch.zeros((10, 1, 2), dtype=torch.int32)
    found = search_codes(weight_OI, gram_II, codes_ONM, books_MKV, scale_O1, beam=entries)
    for o in range(10):
        losses = {
            pair: lost(weight_OI[o], scale_O1[o] * (books_MKV[0, pair[0]] + books_MKV[1, pair[1]]), gram_II)
            for pair in product(range(entries), repeat=2)
        }
        assert losses[tuple(found[o, 0].tolist())] == pytest.approx(min(losses.values()), rel=1e-4)


@pytest.mark.parametrize("beam", [1, 2, 8])
@pytest.mark.parametrize("codebooks", [1, 2, 3])
def test_new_codes_never_lose_more(codebooks: int, beam: int) -> None:
    weight_OI, gram_II, codes, books, scale = started(codebooks)
    losses = [output_loss(weight_OI, gram_II, codes, books, scale)]
    for _ in range(3):
        codes = search_codes(weight_OI, gram_II, codes, books, scale, beam)
        losses.append(output_loss(weight_OI, gram_II, codes, books, scale))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(losses))
    assert losses[1] < losses[0]
    assert codes.dtype == torch.int32


def test_a_wider_beam_finds_codes_that_lose_less() -> None:
    weight_OI, gram_II, codes, books, scale = started()
    losses = [
        output_loss(weight_OI, gram_II, search_codes(weight_OI, gram_II, codes, books, scale, beam), books, scale)
        for beam in (1, 16)
    ]
    assert losses[1] < losses[0]


def test_the_search_leaves_what_it_was_given_alone() -> None:
    given = started()
    kept = [t.clone() for t in given]
    search_codes(*given, beam=2)
    solve_codebooks(*given)
    assert all(torch.equal(one, other) for one, other in zip(given, kept, strict=True))


# Codebooks and scales


def test_codebooks_come_to_the_least_squares_solution_and_stay_where_they_are() -> None:
    """The gradient of the loss by every entry vanishes, in float64."""
    weight_OI, gram_II, codes, books, scale = started(codebooks=2, entries=4, group=2)
    first = books
    for _ in range(20):
        books = solve_codebooks(weight_OI, gram_II, codes, books, scale)
    delta = sum_entries(codes, books.double()) * scale.double() - weight_OI.double()
    slope_PV = (delta @ gram_II.double() * scale.double()).view(-1, 2)
    for m in range(2):
        slope_KV = entry_sums(*sort_codes(codes[:, :, m].flatten(), 4), slope_PV)
        assert slope_KV.abs().max() < 2e-3 * slope_PV.abs().sum() / 4
    assert books.abs().max() < 2 * first.abs().max()


def test_scales_are_the_best_for_every_output() -> None:
    weight_OI, gram_II, codes, books, scale = started()
    best = solve_scales(weight_OI, gram_II, codes, books, scale)
    least = output_loss(weight_OI, gram_II, codes, books, best)
    for change in (0.99, 1.01):
        assert output_loss(weight_OI, gram_II, codes, books, best * change) > least


def test_each_step_loses_no_more() -> None:
    weight_OI, gram_II, codes, books, scale = started()
    before = output_loss(weight_OI, gram_II, codes, books, scale)
    solved = solve_codebooks(weight_OI, gram_II, codes, books, scale)
    middle = output_loss(weight_OI, gram_II, codes, solved, scale)
    scaled = solve_scales(weight_OI, gram_II, codes, solved, scale)
    assert output_loss(weight_OI, gram_II, codes, solved, scaled) <= middle < before


# The method


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_more_rounds_never_lose_more_in_the_dtype_that_is_stored(dtype: torch.dtype) -> None:
    """(f)"""
    weight_OI, stats = gaussian().to(dtype), measured()
    assert stats.gram_II is not None
    losses = []
    for rounds in (1, 2, 4, 8):
        part = encoded(weight_OI, stats, rounds=rounds, tolerance=0.0)
        exact = sum_entries(part.codes_ONM, part.codebooks_MKV.float()) * part.scale_O1.float()
        losses.append(lost(weight_OI.float(), exact, damped(stats.gram_II, 0.01)))
    assert all(more <= fewer * (1 + 1e-6) for fewer, more in pairwise(losses))
    assert losses[-1] < losses[0]


def test_equal_inputs_give_equal_bytes() -> None:
    one, other = (encoded(gaussian(), measured()).tensors() for _ in range(2))
    assert all(torch.equal(t, other[name]) for name, t in one.items())


@pytest.mark.parametrize("settings", [{"bits": (2, 3, 4, 5)}, {"codebooks": (1, 2, 3)}], ids=["bits", "codebooks"])
def test_the_error_falls_as_bits_and_codebooks_are_added(settings: dict[str, tuple[int, ...]]) -> None:
    weight_OI, stats = gaussian(), measured()
    assert stats.gram_II is not None
    ((name, values),) = settings.items()
    errors = [lost(weight_OI, encoded(weight_OI, stats, **{name: v}).decode(), stats.gram_II) for v in values]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


def test_it_loses_less_than_gptq_at_no_more_bits_in_a_weight_that_is_large_enough() -> None:
    """On the mean over seeds; all bytes counted."""
    own = swept = 0.0
    for seed in range(2):
        weight_OI, stats = gaussian(512, 96, seed).half(), measured(96, seed)
        assert stats.gram_II is not None
        vectors = encoded(weight_OI, stats, codebooks=1, bits=8, group=4, rounds=4)
        (grid,) = GPTQ(bits=2, group=32)(weight_OI, stats).parts
        assert vectors.form.nbytes(512, 96, torch.float16) <= grid.form.nbytes(512, 96, torch.float16)
        own += lost(weight_OI, vectors.decode(), stats.gram_II)
        swept += lost(weight_OI, grid.decode(), stats.gram_II)
    assert own < 0.7 * swept


def test_codebooks_and_scales_are_stored_in_the_dtype_of_the_weight() -> None:
    part = encoded(gaussian().half(), measured())
    assert part.codebooks_MKV.dtype == part.scale_O1.dtype == part.decode().dtype == torch.float16
    assert part.form.nbytes(48, COLUMNS, torch.float16) == sum(
        t.numel() * t.element_size() for t in part.tensors().values()
    )


def test_outputs_of_zeros_stay_zero_and_inputs_that_never_come_do_no_harm() -> None:
    weight_OI, gram_II = gaussian(), gram_of()
    weight_OI[3] = 0
    gram_II[5] = gram_II[:, 5] = 0
    decoded = encoded(weight_OI, Statistics(COLUMNS, tokens=512, gram_II=gram_II)).decode()
    assert not decoded[3].any()
    assert decoded.isfinite().all()
    assert not encoded(torch.zeros((8, COLUMNS)), measured(), bits=2).decode().any()


def test_without_enough_tokens_the_weight_itself_is_fitted_which_is_said() -> None:
    weight_OI = gaussian()
    alone = AQLM(**SMALL)(weight_OI, Statistics(COLUMNS, tokens=512, gram_II=torch.eye(COLUMNS)))
    for stats in (Statistics(COLUMNS), measured(tokens=31)):
        made = AQLM(**SMALL)(weight_OI, stats)
        assert f"{stats.tokens} calibration tokens for 32 inputs" in made.note
        assert torch.allclose(made.decode(), alone.decode(), atol=0.5)
        assert lost(weight_OI, made.decode(), torch.eye(COLUMNS)) == pytest.approx(
            lost(weight_OI, alone.decode(), torch.eye(COLUMNS)), rel=0.02
        )


def test_codebooks_that_are_larger_than_the_weight_are_named() -> None:
    assert "codebooks of 256 entries for 32 vectors" in AQLM(rounds=1)(gaussian(8), measured()).note
    assert AQLM(rounds=1, **SMALL)(gaussian(), measured()).note == ""


@pytest.mark.parametrize(
    "settings",
    [
        {"codebooks": 0},
        {"bits": 17},
        {"group": 0},
        {"beam": 0},
        {"rounds": 0},
        {"tolerance": 1.0},
        {"damping": -0.1},
        {"minimum_tokens": -1.0},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_that_do_not_exist_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        AQLM(**settings)


def test_a_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UsageError, match="group=8 does not divide 100"):
        AQLM().check(100)
