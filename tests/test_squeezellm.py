"""SqueezeLLM by the letters of its card, and the clustering of numbers below it."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tersely.codecs import Encoded
from tersely.codecs.codebook import Lookup
from tersely.codecs.sparse import Sparse
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.encode.clustering import Ordered, distinct, exact, kmeans, loss, order, start
from tersely.methods.encode.squeezellm import SqueezeLLM

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FITS = ["kmeans", "exact"]


def student(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Student's t with 4 degrees of freedom: heavy tails."""
    normal = torch.randn((5, rows, columns), generator=torch.Generator().manual_seed(seed))
    return (normal[0] / normal[1:].square().mean(0).sqrt()).to(dtype)


def sensitivity(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Squares over some decades, as those of gradients are."""
    generator = torch.Generator().manual_seed(100 + seed)
    gradient = torch.randn((rows, columns), generator=generator) * torch.randn(columns, generator=generator).exp()
    return gradient.square() * 1e-9


def squeezed(weight_OI: Tensor, fisher_OI: Tensor | None = None, **settings: Any) -> Encoded:
    return SqueezeLLM(**settings)(weight_OI, Statistics(weight_OI.shape[1], fisher_OI=fisher_OI))


def parts(encoded: Encoded) -> tuple[Lookup, Sparse]:
    dense, rest = encoded.parts
    assert isinstance(dense, Lookup)
    assert isinstance(rest, Sparse)
    return dense, rest


def kept(encoded: Encoded, weight_OI: Tensor) -> Tensor:
    """Where the sparse part has a value."""
    _, rest = parts(encoded)
    rows = torch.repeat_interleave(torch.arange(len(weight_OI)), rest.pointers_P.long().diff())
    mask = torch.zeros(weight_OI.shape, dtype=torch.bool)
    mask[rows, rest.columns_N.long()] = True
    return mask


def weighted_loss(weight_OI: Tensor, decoded_OI: Tensor, fisher_OI: Tensor) -> Tensor:
    """Of each output."""
    return ((weight_OI.double() - decoded_OI.double()).square() * fisher_OI.double()).sum(1)


def nearest(weight_OI: Tensor, table_OK: Tensor) -> Tensor:
    """The nearest values of tables, in float64, all compared."""
    w, t = weight_OI.double(), table_OK.double()
    place = (w[:, :, None] - t[:, None, :]).abs().argmin(2)
    return t.gather(1, place)


# Clustering


def total(numbers: Ordered, table_RK: Tensor) -> Tensor:
    """The loss itself, by comparing all numbers with all values."""
    away = (numbers.value_RN[:, :, None] - table_RK[:, None, :]).square().amin(2)
    return (away * numbers.mass_RE.diff(dim=1)).sum(1)


@pytest.mark.parametrize(("count", "clusters"), [(1, 4), (5, 4), (12, 3), (24, 8)])
def test_f_the_exact_table_loses_least_of_all_ways_to_cut(count: int, clusters: int) -> None:
    value, weight = student(3, count, 1), sensitivity(3, count)
    numbers = order(value, weight)
    found = exact(numbers, clusters)
    for row in range(3):
        v, p = numbers.value_RN[row].tolist(), numbers.mass_RE.diff(dim=1)[row].tolist()

        def one(a: int, b: int, v: list[float] = v, p: list[float] = p) -> float:
            mass = sum(p[a:b])
            mean = sum(x * y for x, y in zip(v[a:b], p[a:b], strict=True)) / mass if mass else 0.0
            return sum(y * (x - mean) ** 2 for x, y in zip(v[a:b], p[a:b], strict=True))

        @cache
        def least(k: int, end: int, one: Any = one) -> float:
            if k == 1:
                return float(one(0, end))
            return min(float(least(k - 1, j)) + float(one(j, end)) for j in range(end + 1))

        assert float(total(numbers, found)[row]) == pytest.approx(least(clusters, count), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("count", [20, 130, 300])
@pytest.mark.parametrize("clusters", [4, 8, 16])
def test_f_the_exact_table_bounds_kmeans_which_comes_close(clusters: int, count: int) -> None:
    numbers = order(student(16, count), sensitivity(16, count))
    own = total(numbers, kmeans(numbers, start(numbers, clusters), 50))
    least = total(numbers, exact(numbers, clusters))
    assert bool((own >= least * (1 - 1e-9) - 1e-12).all())
    assert float(own.sum()) < 1.05 * float(least.sum())


def best_grid(numbers: Ordered, clusters: int) -> Tensor:
    """The even grid about zero that loses least, of 100 scales."""
    size = numbers.value_RN.abs().amax(1, keepdim=True)
    even = torch.linspace(-1, 1, clusters, dtype=torch.float64)
    grids = [size * even * (i / 100) for i in range(1, 101)]
    losses = torch.stack([total(numbers, grid) for grid in grids])
    return torch.stack(grids)[losses.argmin(0), torch.arange(len(size))]


@pytest.mark.parametrize("clusters", [4, 8, 16])
def test_b_the_loss_never_grows_and_stays_below_that_of_the_best_even_grid(clusters: int) -> None:
    numbers = order(student(8, 200), sensitivity(8, 200))
    grid = best_grid(numbers, clusters)
    before = total(numbers, grid)
    at_first = before
    for steps in range(1, 30):
        now = total(numbers, kmeans(numbers, grid, steps))
        assert bool((now <= before * (1 + 1e-12)).all())
        before = now
    assert bool((before < at_first).all())
    assert bool((total(numbers, kmeans(numbers, start(numbers, clusters), 50)) < at_first).all())


def test_c_with_equal_weights_it_is_ordinary_kmeans() -> None:
    value = student(6, 150)
    numbers = order(value, torch.full_like(value, 3e-12))
    table = start(numbers, 8)
    found = kmeans(numbers, table, 50)
    for row in range(6):
        centres, v = table[row].clone(), value[row].double()
        for _ in range(50):
            nearest_one = (v[:, None] - centres).abs().argmin(1)
            for k in torch.unique(nearest_one):
                centres[k] = v[nearest_one == k].mean()
        torch.testing.assert_close(found[row], centres)


def test_the_loss_is_that_of_all_comparisons_less_a_constant() -> None:
    numbers = order(student(5, 90), sensitivity(5, 90))
    table = start(numbers, 8)
    constant = (numbers.value_RN.square() * numbers.mass_RE.diff(dim=1)).sum(1)
    torch.testing.assert_close(loss(numbers, table) + constant, total(numbers, table))


def test_tables_ascend_and_lie_among_the_numbers_even_for_weights_over_many_decades() -> None:
    value = student(8, 200)
    weight = 10.0 ** torch.linspace(-30, 0, 200).repeat(8, 1)
    numbers = order(value, weight)
    for table in (start(numbers, 8), kmeans(numbers, start(numbers, 8), 50), exact(numbers, 8)):
        assert bool(table.isfinite().all())
        assert bool((table.diff(dim=1) >= 0).all())
        assert bool(((table >= numbers.value_RN[:, :1]) & (table <= numbers.value_RN[:, -1:])).all())


def test_rows_of_few_numbers_have_a_table_of_them() -> None:
    value = torch.tensor([[3.0, -1, 3, 7], [1, 2, 3, 4], [5, 5, 5, 5]])
    few, table = distinct(order(value, torch.ones_like(value)), 3)
    assert few.tolist() == [True, False, True]
    assert table[0].tolist() == [-1, 3, 7]
    assert table[2].tolist() == [5, 5, 5]


# The method


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_outputs_with_as_few_values_as_a_table_are_exact(dtype: torch.dtype, fit: str) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((6, 8), generator=generator).to(dtype)
    # One value is much rarer than the others, and one is not sensitive at all.
    place = torch.randint(0, 7, (6, 64), generator=generator)
    place[:, 5] = 7
    weight_OI = values.gather(1, place)
    fisher_OI = torch.where(place == 3, 0.0, sensitivity(6, 64))
    for encoded in (
        squeezed(weight_OI, fisher_OI, bits=3, fit=fit, sensitive=0.0, outliers=0.0),
        squeezed(weight_OI, fisher_OI, bits=3, fit=fit, sensitive=0.05, outliers=0.05),
    ):
        assert torch.equal(encoded.decode(), weight_OI)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_b_no_even_grid_of_as_many_values_loses_less(bits: int, fit: str) -> None:
    weight_OI, fisher_OI = student(16, 160), sensitivity(16, 160)
    encoded = squeezed(weight_OI, fisher_OI, bits=bits, fit=fit, sensitive=0.0, outliers=0.0)
    grid = best_grid(order(weight_OI, fisher_OI), 1 << bits)
    even = weighted_loss(weight_OI, nearest(weight_OI, grid), fisher_OI)
    assert bool((weighted_loss(weight_OI, encoded.decode(), fisher_OI) < even).all())


@pytest.mark.parametrize("fit", FITS)
def test_c_with_equal_sensitivities_it_is_as_without_any(fit: str) -> None:
    weight_OI = student(16, 160)
    uniform = squeezed(weight_OI, torch.full_like(weight_OI, 7e-20), fit=fit, sensitive=0.0)
    nothing = squeezed(weight_OI, fit=fit, sensitive=0.0)
    assert torch.equal(uniform.decode(), nothing.decode())
    assert uniform.note == ""
    assert "all weights count the same" in nothing.note


def test_without_sensitivities_their_share_goes_to_the_largest_weights() -> None:
    weight_OI = student(32, 128)
    encoded = squeezed(weight_OI, sensitive=0.01, outliers=0.02)
    assert encoded.forms == tuple(SqueezeLLM(sensitive=0.01, outliers=0.02).forms(32, 128))
    sizes = weight_OI.abs()[kept(encoded, weight_OI)]
    assert float(sizes.min()) >= float(weight_OI.abs()[~kept(encoded, weight_OI)].max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_d_what_is_kept_apart_comes_back_bit_for_bit(shift: float, bits: int, dtype: torch.dtype) -> None:
    """Also where all other weights lie far on one side of zero."""
    weight_OI = (student(64, 128) + shift).to(dtype)
    encoded = squeezed(weight_OI, sensitivity(64, 128), bits=bits, sensitive=0.02, outliers=0.05)
    where = kept(encoded, weight_OI)
    assert torch.equal(encoded.decode()[where], weight_OI[where])
    assert not torch.equal(encoded.decode(), weight_OI)


@pytest.mark.parametrize("dtype", DTYPES)
def test_d_also_where_rounding_leaves_no_way_from_any_value_of_the_table(dtype: torch.dtype) -> None:
    """All others are 1, or a little more, and so is every table; those kept apart are negative and odd."""
    epsilon = torch.finfo(dtype).eps
    weight_OI = torch.ones(40, 64)
    weight_OI[:, 1::2] += 2 * epsilon
    weight_OI[:, 0] = -(1.5 + epsilon * (2 * torch.arange(40) + 1))
    weight_OI = weight_OI.to(dtype)
    encoded = squeezed(weight_OI, bits=2, sensitive=0.0, outliers=1 / 64)
    where = kept(encoded, weight_OI)
    assert bool(where[:, 0].all())
    assert torch.equal(encoded.decode()[where], weight_OI[where])
    dense, _ = parts(encoded)
    assert bool((dense.table_OK.diff(dim=1) >= 0).all())


@pytest.mark.parametrize(("sensitive", "outliers"), [(0.0005, 0.0045), (0.01, 0.0), (0.0, 0.02), (0.1, 0.4)])
def test_e_as_many_are_kept_apart_as_was_asked(sensitive: float, outliers: float) -> None:
    weight_OI, fisher_OI = student(96, 200), sensitivity(96, 200)
    encoded = squeezed(weight_OI, fisher_OI, sensitive=sensitive, outliers=outliers)
    share = int(kept(encoded, weight_OI).sum()) / weight_OI.numel()
    assert share == pytest.approx(sensitive + outliers, abs=0.0002)
    assert encoded.forms == tuple(SqueezeLLM(sensitive=sensitive, outliers=outliers).forms(96, 200))


def test_the_most_sensitive_are_kept_first_then_the_largest_of_the_others() -> None:
    weight_OI, fisher_OI = student(50, 100), sensitivity(50, 100)
    where = kept(squeezed(weight_OI, fisher_OI, sensitive=0.02, outliers=0.03), weight_OI).flatten()
    sensitive = fisher_OI.flatten().argsort(descending=True)[:100]
    assert bool(where[sensitive].all())
    others = weight_OI.abs().flatten()
    others[sensitive] = -1
    assert bool(where[others.argsort(descending=True)[:150]].all())
    assert int(where.sum()) == 250


def test_equal_weights_are_kept_apart_in_their_order() -> None:
    where = kept(squeezed(torch.ones(4, 10), bits=2, sensitive=0.0, outliers=0.2), torch.ones(4, 10))
    assert where.flatten().nonzero().flatten().tolist() == list(range(8))


def test_what_is_kept_apart_does_not_move_the_tables() -> None:
    """They are those of the weights that are left, alone."""
    weight_OI, fisher_OI = student(4, 100), sensitivity(4, 100)
    where = kept(squeezed(weight_OI, fisher_OI, sensitive=0.0, outliers=0.02), weight_OI)
    dense, _ = parts(squeezed(weight_OI, fisher_OI, sensitive=0.0, outliers=0.02, fit="exact"))
    for row in range(4):
        left = ~where[row]
        alone = order(weight_OI[row : row + 1, left], fisher_OI[row : row + 1, left])
        torch.testing.assert_close(dense.table_OK[row : row + 1].double(), exact(alone, 16), rtol=1e-5, atol=1e-6)


def test_sensitivities_lower_the_weighted_loss_and_bits_too() -> None:
    weight_OI, fisher_OI = student(16, 256), sensitivity(16, 256)

    def lost(given: Tensor | None, bits: int) -> float:
        encoded = squeezed(weight_OI, given, bits=bits, sensitive=0.0, outliers=0.0)
        return float(weighted_loss(weight_OI, encoded.decode(), fisher_OI).sum())

    assert lost(fisher_OI, 3) < 0.6 * lost(None, 3)
    losses = [lost(fisher_OI, bits) for bits in (2, 3, 4, 5)]
    assert all(more < fewer / 2 for fewer, more in pairwise(losses))


def test_an_output_without_sensitivity_counts_all_its_weights_the_same() -> None:
    weight_OI, fisher_OI = student(3, 100), sensitivity(3, 100)
    fisher_OI[1] = 0
    decoded = squeezed(weight_OI, fisher_OI, sensitive=0.0, outliers=0.0).decode()
    assert torch.equal(decoded[1], squeezed(weight_OI, sensitive=0.0, outliers=0.0).decode()[1])


def test_it_is_the_same_each_time_however_many_outputs_are_fitted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import tersely.methods.encode.squeezellm as module

    weight_OI, fisher_OI = student(30, 64), sensitivity(30, 64)
    once = squeezed(weight_OI, fisher_OI).tensors()
    monkeypatch.setattr(module, "_CHUNK", 200)
    again = squeezed(weight_OI, fisher_OI).tensors()
    assert all(torch.equal(t, again[name]) for name, t in once.items())


def test_bits_per_weight_are_those_of_the_paper() -> None:
    def bits(method: SqueezeLLM) -> float:
        nbytes = sum(form.nbytes(4096, 4096, torch.float16) for form in method.forms(4096, 4096))
        return 8 * nbytes / 4096**2

    assert bits(SqueezeLLM(bits=3, sensitive=0.0, outliers=0.0)) == pytest.approx(3.03, abs=0.01)
    assert bits(SqueezeLLM(bits=3)) == pytest.approx(3.2, abs=0.05)


@pytest.mark.parametrize(
    "settings",
    [{"bits": 1}, {"bits": 9}, {"sensitive": -0.1}, {"outliers": 1.5}, {"fit": "best"}, {"iterations": -1}],
    ids=str,
)
def test_settings_that_do_not_exist_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        SqueezeLLM(**settings)
