"""Intervals hold the truth as often as they say, tests reject as seldom as they say, and both agree with scipy."""

import itertools
import math
import statistics
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from tersely.evaluation.statistics import (
    auc,
    auc_difference,
    calibration,
    detectable,
    detectable_share,
    holm,
    items_needed,
    mcnemar,
    mean,
    paired,
    ratio,
    resampled,
    share_difference,
)
from tersely.results import Estimate

Array = NDArray[np.float64]


def lengths(generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Tokens of documents, 20 to 512, most about 160."""
    return np.clip(np.exp(generator.normal(5.1, 0.55, shape)), 20, 512).round()


def totals(kind: str, sizes: Array, generator: np.random.Generator) -> Array:
    """Sums over documents: `kl` positive, `difference` around zero; heavy: lognormal with sigma 1."""
    shape = sizes.shape
    if kind == "light kl":
        rate = 0.05 * generator.gamma(8, 1 / 8, shape)
    elif kind == "heavy kl":
        rate = 0.05 * np.exp(generator.normal(0, 1, shape))
    elif kind == "light difference":
        rate = 0.02 + generator.normal(0, 0.5, shape) / np.sqrt(sizes)
    else:
        rate = 0.05 * np.exp(generator.normal(0, 1, shape)) * np.where(generator.random(shape) < 0.3, -1, 1)
    total: Array = rate * sizes
    return total


TRUTH = {
    "light kl": 0.05,
    "heavy kl": 0.05 * math.exp(0.5),
    "light difference": 0.02,
    "heavy difference": 0.02 * math.exp(0.5),
}


def holds(found: Estimate, truth: float) -> bool:
    return found.low <= truth <= found.high


@pytest.mark.parametrize("kind", TRUTH)
@pytest.mark.parametrize("k", [20, 60, 200])
def test_intervals_of_means_over_documents_hold_the_truth_19_times_in_20(kind: str, k: int) -> None:
    generator = np.random.default_rng(2026)
    sizes = lengths(generator, (1000, k))
    sums = totals(kind, sizes, generator)
    held = np.mean([holds(ratio(y, n), TRUTH[kind]) for y, n in zip(sums, sizes, strict=True)])
    assert 0.93 <= held <= 0.97


def test_the_intervals_hold_the_truth_where_documents_are_grouped() -> None:
    generator = np.random.default_rng(1)
    sizes = lengths(generator, (200, 2000))
    sums = totals("heavy kl", sizes, generator)
    held = np.mean([holds(ratio(y, n), TRUTH["heavy kl"]) for y, n in zip(sums, sizes, strict=True)])
    assert 0.92 <= held <= 0.98


@pytest.mark.parametrize("k", [20, 100])
def test_the_paired_test_rejects_a_true_null_at_most_as_often_as_it_says(k: int) -> None:
    generator = np.random.default_rng(7)
    sizes = lengths(generator, (400, k))
    rate = np.exp(generator.normal(0, 1, sizes.shape)) * generator.choice([-1, 1], sizes.shape)
    ps = np.array([paired(y, n)[1] for y, n in zip(rate * sizes, sizes, strict=True)])
    assert 0.02 <= np.mean(ps < 0.05) <= 0.065
    assert ps.min() > 0


@pytest.mark.parametrize("k", [4, 6, 20, 300])
def test_p_is_below_5_percent_where_the_interval_leaves_out_0(k: int) -> None:
    generator = np.random.default_rng(k)
    seen = set()
    for shift in np.linspace(0, 4, 60):
        values = generator.exponential(1, k) - 1 + shift / math.sqrt(k)
        found, p = paired(values, np.ones(k))
        assert (p < 0.05) == (not holds(found, 0))
        assert found == ratio(values, np.ones(k))
        seen.add(p < 0.05)
    assert seen == {True, False}


def test_the_smallest_p_is_one_in_so_many_resamples_and_shrinks_with_documents_that_all_agree() -> None:
    generator = np.random.default_rng(0)
    assert paired(100 + generator.normal(0, 1, 50), np.ones(50))[1] == 2 / 5_000
    assert [paired([0.5] * k, [1.0] * k)[1] for k in (1, 2, 5, 50)] == [1.0, 0.5, 0.0625, 2 / 5_000]
    assert paired([0.0] * 9, [1.0] * 9)[1] == 1


@pytest.mark.parametrize("k", [2, 4, 5, 30, 1500])
def test_the_estimate_does_not_depend_on_order_or_units_and_moves_with_the_totals(k: int) -> None:
    generator = np.random.default_rng(k)
    sizes = lengths(generator, (k,))
    sums = totals("heavy kl", sizes, generator)
    found = ratio(sums, sizes)
    assert ratio(sums, sizes) == found
    order = generator.permutation(k)
    assert ratio(sums[order], sizes[order]) == found
    for other, scale, shift in (
        (ratio(1e6 * sums, sizes), 1e6, 0.0),
        (ratio(1e-9 * sums, sizes), 1e-9, 0.0),
        (ratio(sums + 3 * sizes, sizes), 1.0, 3.0),
    ):
        assert other.value == pytest.approx(scale * found.value + shift, rel=1e-9)
        assert other.stderr == pytest.approx(scale * found.stderr, rel=1e-6)
        assert (other.low, other.high) == pytest.approx(
            (scale * found.low + shift, scale * found.high + shift), rel=1e-6
        )
    if k >= 30:
        assert found != ratio(sums, sizes, seed=1)


def test_the_standard_error_is_the_delta_method_s() -> None:
    sums, sizes = [1.0, 5.0, 4.0, 8.0], [2.0, 3.0, 4.0, 6.0]
    found = ratio(sums, sizes)
    assert found.value == 18 / 15
    squares = sum((y - 1.2 * n) ** 2 for y, n in zip(sums, sizes, strict=True))
    assert found.stderr == pytest.approx(math.sqrt(4 / 3 * squares) / 15)


def test_the_interval_of_equal_documents_has_no_width_and_that_of_one_no_bounds() -> None:
    assert ratio([3.0, 6.0, 1.5], [2, 4, 1]) == Estimate(1.5, 0.0, 1.5, 1.5)
    assert ratio([0.0] * 20, [1.0] * 20) == Estimate(0.0, 0.0, 0.0, 0.0)
    third = ratio([0.1 * n for n in range(1, 40)], list(range(1, 40)))
    assert third.stderr == 0
    assert third.low == third.value == third.high == pytest.approx(0.1)
    assert ratio([3.0], [2.0]) == Estimate(1.5, math.inf, -math.inf, math.inf)
    assert mean([1.0]) == Estimate(1.0, math.inf, -math.inf, math.inf)


@pytest.mark.parametrize("events", [1, 2, 3, 10])
def test_rare_events_leave_a_finite_interval_that_reaches_far_enough_up(events: int) -> None:
    found = ratio([1.0] * events + [0.0] * (200 - events), [100.0] * 200, bounds=(0, 1))
    assert 0 <= found.low < found.value
    assert events + 1.9 * math.sqrt(events) < 20_000 * found.high < 4 * events + 4


def test_bounds_cut_the_interval() -> None:
    sums, sizes = [9.0, 10.0, 10.0, 10.0], [10.0] * 4
    assert ratio(sums, sizes).high > 1 == ratio(sums, sizes, bounds=(0, 1)).high
    assert ratio([1.0], [1.0], bounds=(0, 1)).high == math.inf


def test_few_documents_have_students_interval() -> None:
    for k in (2, 3, 4):
        values = np.random.default_rng(k).normal(0, 1, k)
        found, p = paired(values, np.ones(k))
        assert not resampled(k)
        expected = stats.ttest_1samp(values, 0)
        assert p == pytest.approx(expected.pvalue, rel=1e-9)
        assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-9)


@pytest.mark.parametrize("items", [10, 40, 400])
def test_wilsons_interval_holds_the_share_19_times_in_20_over_all_shares(items: int) -> None:
    found = [mean([1.0] * right + [0.0] * (items - right)) for right in range(items + 1)]
    held = []
    for share in np.linspace(0.05, 0.95, 91):
        log = [math.lgamma(items + 1) - math.lgamma(r + 1) - math.lgamma(items - r + 1) for r in range(items + 1)]
        chance = [math.exp(c + r * math.log(share) + (items - r) * math.log1p(-share)) for r, c in enumerate(log)]
        held.append(sum(p for p, e in zip(chance, found, strict=True) if holds(e, share)))
    assert 0.94 <= np.mean(held) <= 0.96
    assert min(held) > 0.83
    assert found[0].low == 0 < found[0].high < 1
    assert 0 < found[-1].low < found[-1].high == 1


def test_shares_equal_scipys() -> None:
    for right, items in ((0, 7), (3, 9), (50, 200), (199, 200)):
        expected = stats.binomtest(right, items).proportion_ci(0.95, method="wilson")
        found = mean([1.0] * right + [0.0] * (items - right))
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_mcnemar_equals_the_exact_binomial_test() -> None:
    for lost, gained in itertools.product(range(12), repeat=2):
        changed = lost + gained
        tail = sum(math.comb(changed, i) for i in range(min(lost, gained) + 1)) / 2**changed
        assert mcnemar(lost, gained) == pytest.approx(min(1.0, 2 * tail), rel=1e-12)


def test_mcnemar_equals_scipys_at_any_size() -> None:
    for lost, gained in ((3, 40), (500, 600), (0, 900), (100_000, 101_000), (1_000_000, 1_002_000)):
        expected = stats.binomtest(lost, lost + gained).pvalue
        assert mcnemar(lost, gained) == pytest.approx(expected, rel=1e-7)
        assert mcnemar(gained, lost) == mcnemar(lost, gained)


def multinomial(items: int, lost: float, gained: float, most: int) -> dict[tuple[int, int], float]:
    """Chance of each count of lost and gained items."""
    return {
        (b, c): math.exp(
            math.lgamma(items + 1)
            - math.lgamma(b + 1)
            - math.lgamma(c + 1)
            - math.lgamma(items - b - c + 1)
            + b * math.log(lost)
            + c * math.log(gained)
            + (items - b - c) * math.log1p(-lost - gained)
        )
        for b in range(most)
        for c in range(most)
        if b + c <= items
    }


@pytest.mark.parametrize(
    ("items", "lost", "gained"),
    [(40, 0.15, 0.15), (100, 0.1, 0.02), (100, 0.05, 0.05), (200, 0.03, 0.01), (500, 0.02, 0.02)],
)
def test_intervals_of_paired_shares_hold_the_truth_19_times_in_20(items: int, lost: float, gained: float) -> None:
    chances = multinomial(items, lost, gained, 28)
    assert sum(chances.values()) > 0.999
    likely = {counts: p for counts, p in chances.items() if p > 1e-6}
    held = sum(
        p for (b, c), p in likely.items() if holds(share_difference(items - b - c, b, c, 0), gained - lost)
    ) / sum(likely.values())
    assert 0.93 <= held <= 0.97


def test_a_paired_share_has_an_interval_where_nothing_changed() -> None:
    same = share_difference(60, 0, 0, 140)
    assert same.value == same.stderr == 0
    assert 0.01 < same.high < 0.02
    assert same.low == pytest.approx(-same.high)
    assert share_difference(0, 20, 0, 0).low == -1
    assert share_difference(0, 0, 20, 0).high == 1
    assert share_difference(0, 0, 1, 0) == Estimate(1.0, math.inf, -math.inf, math.inf)


def test_a_paired_share_mirrors_and_agrees_with_the_score_test() -> None:
    for lost, gained in itertools.product(range(0, 30, 3), repeat=2):
        found, mirror = share_difference(50, lost, gained, 50), share_difference(50, gained, lost, 50)
        assert (mirror.low, mirror.high) == pytest.approx((-found.high, -found.low), abs=1e-9)
        assert found.low <= found.value <= found.high
        if lost + gained:
            statistic = (lost - gained) ** 2 / (lost + gained)
            assert (statistic > 3.8415) == (not found.low <= 0 <= found.high)


def test_holm_is_step_down_and_keeps_the_order_of_ps() -> None:
    assert holm([]) == ()
    assert holm([0.03]) == (0.03,)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx((0.03, 0.06, 0.06))
    generator = np.random.default_rng(0)
    for _ in range(100):
        ps = generator.random(generator.integers(1, 12)).tolist()
        adjusted = holm(ps)
        assert all(p <= a <= min(1, len(ps) * p) + 1e-15 for p, a in zip(ps, adjusted, strict=True))
        assert [a for _, a in sorted(zip(ps, adjusted, strict=True))] == sorted(adjusted)
        order = generator.permutation(len(ps))
        assert holm([ps[i] for i in order]) == tuple(adjusted[i] for i in order)


def test_holm_calls_any_true_null_a_difference_in_at_most_one_family_of_20() -> None:
    generator = np.random.default_rng(3)
    wrong = sum(min(holm(generator.random(8).tolist())) < 0.05 for _ in range(4000))
    assert 0.04 <= wrong / 4000 <= 0.058
    partly = sum(min(holm([1e-9, 1e-9, *generator.random(6)])[2:]) < 0.05 for _ in range(4000))
    assert 0.04 <= partly / 4000 <= 0.058


def test_a_detectable_mean_is_found_four_times_in_five() -> None:
    generator = np.random.default_rng(5)
    for k in (4, 8, 20, 100):
        pilots = [detectable(ratio(values, np.ones(k))) for values in generator.normal(0, 1, (200, k))]
        samples = generator.normal(statistics.median(pilots), 1, (400, k))
        power = np.mean([paired(values, np.ones(k))[1] < 0.05 for values in samples])
        assert 0.72 <= power <= (0.88 if k >= 100 else 0.95)
    found = ratio(generator.normal(0, 1, 1000), np.ones(1000))
    assert detectable(found) == pytest.approx(2.8 * found.stderr, rel=0.1)


@pytest.mark.parametrize(("items", "changed"), [(24, 2), (50, 5), (200, 0), (200, 20), (1000, 50)])
def test_a_detectable_share_is_found_four_times_in_five(items: int, changed: int) -> None:
    least = detectable_share(items, changed)
    rate = max(least, max(changed, 3) / items)
    chances = multinomial(items, min((rate + least) / 2, 1 - 1e-9), max((rate - least) / 2, 1e-12), 90)
    assert sum(chances.values()) > 0.999
    power = sum(p for (lost, gained), p in chances.items() if p > 1e-9 and mcnemar(lost, gained) < 0.05)
    assert 0.74 <= power <= 0.82
    assert items_needed(least, rate) == pytest.approx(items, rel=1e-6)


def test_what_is_detectable_shrinks_with_items_and_is_nothing_for_a_handful() -> None:
    least = [detectable_share(items, 0) for items in (6, 10, 50, 200, 5_000)]
    assert least == sorted(least, reverse=True)
    assert detectable_share(5, 0) == detectable(ratio([1.0], [1.0])) == math.inf
    assert detectable_share(200, 0) > 3 / 200
    assert detectable_share(200, 40) > detectable_share(200, 20)


def slow_auc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    pairs = [
        (m, o) for m, k in zip(scores, labels, strict=True) if k for o, q in zip(scores, labels, strict=True) if not q
    ]
    return sum(1.0 if m > o else 0.5 if m == o else 0.0 for m, o in pairs) / len(pairs)


def test_the_area_is_the_share_of_pairs_in_order_and_its_error_is_delongs() -> None:
    generator = np.random.default_rng(0)
    for _ in range(10):
        scores = generator.integers(0, 6, 40).astype(float).tolist()
        labels = [bool(x) for x in generator.random(40) < 0.4]
        found = auc(scores, labels)
        assert found.value == pytest.approx(slow_auc(scores, labels))
        members = [s for s, m in zip(scores, labels, strict=True) if m]
        others = [s for s, m in zip(scores, labels, strict=True) if not m]
        ordered = [[float(m > o) + 0.5 * (m == o) for o in others] for m in members]
        expected = np.var(np.mean(ordered, 1), ddof=1) / len(members) + np.var(np.mean(ordered, 0), ddof=1) / len(
            others
        )
        assert found.stderr == pytest.approx(math.sqrt(expected))
        mirror = auc([-s for s in scores], labels)
        assert (mirror.value, mirror.low, mirror.high) == pytest.approx(
            (1 - found.value, 1 - found.high, 1 - found.low)
        )


@pytest.mark.parametrize(("members", "others"), [(20, 30), (80, 200)])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_intervals_of_areas_hold_the_truth_19_times_in_20(members: int, others: int, shift: float) -> None:
    generator = np.random.default_rng(11)
    truth = 0.5 * (1 + math.erf(shift / 2))
    labels = [True] * members + [False] * others
    held, differing, rejected = [], [], []
    for _ in range(1000):
        scores = generator.normal(0, 1, members + others)
        base = scores + shift * np.array(labels)
        held.append(holds(auc(base, labels), truth))
        other = 0.8 * scores + 0.6 * generator.normal(0, 1, members + others)
        differing.append(holds(auc_difference(other, base, labels)[0], 0.5 - truth))
        rejected.append(auc_difference(other, scores, labels)[1] < 0.05)
    assert 0.93 <= np.mean(held) <= 0.97
    assert 0.93 <= np.mean(differing) <= 0.97
    assert 0.03 <= np.mean(rejected) <= 0.07


def test_perfect_and_useless_areas_have_intervals() -> None:
    labels = [True] * 20 + [False] * 30
    perfect = auc([1.0] * 20 + [0.0] * 30, labels)
    assert perfect.value == perfect.high == 1
    assert 0.8 < perfect.low < 0.9
    assert auc([1.0] * 50, labels) == Estimate(0.5, 0.0, 0.5, 0.5)
    assert auc([1.0, 2.0, 3.0], [True, False, False]).stderr == math.inf
    scores = list(range(50))
    assert auc_difference(scores, scores, labels) == (Estimate(0.0, 0.0, 0.0, 0.0), 1.0)
    found, p = auc_difference([0.0] * 20 + [1.0] * 30, [1.0] * 20 + [0.0] * 30, labels)
    assert found.value == -1 == found.low < found.high < -0.5
    assert 0 < p < 1e-4
    assert auc_difference([1.0, 2.0], [2.0, 1.0], [True, False])[1] == 1


def draws(generator: np.random.Generator, items: int, off: float) -> tuple[list[list[float]], list[int]]:
    """Two choices; the first is right with its probability less `off`."""
    sure = np.clip(generator.beta(5, 3, items), 0.5, 1)
    right = generator.random(items) < sure - off
    return [[p, 1 - p] for p in sure], [0 if r else 1 for r in right]


def test_calibration_follows_its_formulas() -> None:
    rows = [[2.0, 2.0, 4.0], [0.3, 0.7], [1.0, 0.0, 0.0, 0.0], [0.9, 0.1]]
    found = calibration(rows, [2, 0, 0, 0])
    briers = [0.0625 * 2 + 0.25, 0.98, 0.0, 0.02]
    assert found.brier.value == pytest.approx(sum(briers) / 4)
    assert found.error.value == pytest.approx((abs(1 - 0.5) + abs(0 - 0.7) + abs(2 - 1.9)) / 4)
    assert len(found.bins) == 10
    assert [b.items for b in found.bins] == [0, 0, 0, 0, 0, 1, 0, 1, 0, 2]
    assert (found.bins[9].confidence, found.bins[9].accuracy) == pytest.approx((0.95, 1.0))
    assert found.bins[7].accuracy == 0


@pytest.mark.parametrize("off", [0.0, 0.1])
@pytest.mark.parametrize("items", [100, 300])
def test_the_interval_of_the_calibration_error_holds_the_truth_at_least_19_times_in_20(off: float, items: int) -> None:
    generator = np.random.default_rng(2)
    held = []
    for _ in range(200):
        error = calibration(*draws(generator, items, off)).error
        assert 0 <= error.low <= error.value <= error.high <= 1
        held.append(holds(error, off))
    assert np.mean(held) >= 0.94


def test_calibration_is_deterministic_and_does_not_depend_on_order() -> None:
    generator = np.random.default_rng(4)
    rows, answers = draws(generator, 1200, 0.05)
    found = calibration(rows, answers)
    order = generator.permutation(1200)
    other = calibration([rows[i] for i in order], [answers[i] for i in order])
    assert calibration(rows, answers) == found
    assert (other.error.value, other.error.low) == pytest.approx((found.error.value, found.error.low))
    assert (other.error.stderr, other.error.high) == pytest.approx((found.error.stderr, found.error.high))
    assert other.brier == found.brier
    assert calibration(rows[:1], answers[:1]).error.stderr == math.inf


def test_what_cannot_be_measured_is_refused_in_words() -> None:
    nan = math.nan
    for sums, sizes in (
        ([1.0], [1.0, 2.0]),
        ([], []),
        ([1.0], [0.0]),
        ([nan, 1], [1, 1]),
        ([1, 1], [3, -1]),
        ([1], [math.inf]),
    ):
        with pytest.raises(ValueError, match=r"totals and .* sizes .*expected as many, all finite"):
            ratio(sums, sizes)
    with pytest.raises(ValueError, match="no values"):
        mean([])
    with pytest.raises(ValueError, match="-1 lost"):
        mcnemar(-1, 2)
    for counts in ((0, 0, 0, 0), (1, -1, 3, 0)):
        with pytest.raises(ValueError, match="four counts"):
            share_difference(*counts)
    for p in (1.5, nan):
        with pytest.raises(ValueError, match="expected 0 to 1"):
            holm([0.1, p])
    with pytest.raises(ValueError, match="3 of 2 items"):
        detectable_share(2, 3)
    with pytest.raises(ValueError, match="more than 0"):
        items_needed(0.0, 0.1)
    with pytest.raises(ValueError, match="at least one of each"):
        auc([1.0, 2.0], [True, True])
    with pytest.raises(ValueError, match="expected as many, all scores finite"):
        auc([1.0, nan], [True, False])
    with pytest.raises(ValueError, match="scores of the model"):
        auc_difference([1.0], [1.0, 2.0], [True, False])
    for rows, answers in (
        ([[0.0, 0.0]], [0]),
        ([[0.5, -0.1]], [0]),
        ([[0.5, nan]], [0]),
        ([[0.5, 0.5]], [2]),
        ([[]], [0]),
    ):
        with pytest.raises(ValueError, match="item 0: answer"):
            calibration(rows, answers)
    with pytest.raises(ValueError, match="1 items, 2 answers"):
        calibration([[1.0]], [0, 0])
