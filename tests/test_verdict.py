"""A verdict says what was lost, what was not shown and what could not be told, and never more than the numbers do."""

import dataclasses
import math
import re

import numpy as np
import pytest

from tersely.evaluation.statistics import holm, mean, ratio
from tersely.evaluation.verdict import compare_answers, compare_auc, compare_losses, overall, settle
from tersely.results import Comparison, Divergence, Estimate


def answers(name: str, both: int, lost: int, gained: int, neither: int) -> Comparison:
    model = [1.0] * both + [0.0] * lost + [1.0] * gained + [0.0] * neither
    base = [1.0] * both + [1.0] * lost + [0.0] * gained + [0.0] * neither
    return compare_answers(name, model, base, kind="right")


def losses(name: str, added: float, *, documents: int = 100, spread: float = 0.01) -> Comparison:
    generator = np.random.default_rng(documents)
    sizes = generator.integers(50, 500, documents)
    base = sizes * generator.normal(3, 0.3, documents)
    model = base + sizes * (added + spread * generator.normal(0, 1, documents))
    return compare_losses(name, model.tolist(), base.tolist(), sizes.tolist())


def scores(name: str, added: float, *, items: int = 400, higher_is_better: bool = True) -> Comparison:
    generator = np.random.default_rng(items)
    base = generator.random(items)
    model = base + added + 0.05 * generator.normal(0, 1, items)
    return compare_answers(name, model.tolist(), base.tolist(), kind="score", higher_is_better=higher_is_better)


def numbers(sentence: str) -> list[float]:
    return [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", sentence.replace(",", ""))]


def test_a_loss_on_a_task_is_said_in_points_with_its_interval_and_p() -> None:
    (found,) = settle([answers("arithmetic (gsm8k)", 400, 70, 20, 510)])
    assert found.outcome == "worse"
    assert (found.unit, found.items, found.test) == ("points", 1000, "McNemar, exact")
    assert found.difference.value == pytest.approx(-0.05)
    assert found.p == found.p_adjusted < 0.001
    low, high = (-100 * found.difference.high, -100 * found.difference.low)
    assert found.sentence == (
        "the compressed model is worse on arithmetic (gsm8k) by 5.0 points, "
        f"95 % interval {low:.1f} to {high:.1f} (p < 0.001)"
    )


def test_a_higher_loss_is_worse_and_a_lower_one_better() -> None:
    worse, better = settle([losses("loss on a.txt", -0.03), losses("loss on b.txt", 0.03)])
    assert (worse.name, worse.outcome, better.outcome) == ("loss on b.txt", "worse", "better")
    assert worse.sentence.startswith("loss on b.txt is higher by 0.0")
    assert better.sentence.startswith("loss on a.txt is lower by 0.0")
    for found in (worse, better):
        value, level, low, high = numbers(found.sentence)[:4]
        assert 0 < low < value < high
        assert level == 95
        assert "nats a token" in found.sentence
        assert "after correction for 2 comparisons" in found.sentence


def test_scores_that_should_be_low_are_worse_when_they_rise() -> None:
    assert settle([scores("brier", 0.1, higher_is_better=False)])[0].outcome == "worse"
    assert settle([scores("f1", 0.1)])[0].outcome == "better"
    (found,) = settle([scores("rouge", -0.1)])
    assert found.outcome == "worse"
    assert found.sentence.startswith("the compressed model is worse on rouge by 0.")


def test_no_difference_comes_with_the_loss_that_is_excluded() -> None:
    (found,) = settle([answers("grammar", 4500, 25, 22, 453)])
    assert found.outcome == "no difference shown"
    assert re.fullmatch(
        r"no difference shown on grammar: -0\.06 points, 95 % interval -0\.\d\d to 0\.\d\d; "
        r"a loss of more than 0\.\d\d points is excluded",
        found.sentence,
    )
    assert numbers(found.sentence)[-1] >= -100 * found.difference.low
    (loss,) = settle([losses("loss on a.txt", 0.0)])
    assert loss.sentence.startswith("no difference shown in loss on a.txt: ")
    assert loss.sentence.endswith("nats a token is excluded")
    assert numbers(loss.sentence)[-1] >= loss.difference.high


def test_too_few_items_are_said_to_tell_nothing_and_how_many_would() -> None:
    (found,) = settle([answers("reading", 12, 3, 2, 7)])
    assert found.outcome == "no difference shown"
    assert found.detectable > 0.05
    assert re.match(
        r"could not tell on reading: 24 items find only differences above \d\d points; "
        r"more items would be needed, about [\d,]+ for 2 points \(found: -4 points, 95 % interval -\d+ to \d+\)",
        found.sentence,
    )
    items, least, needed, goal = numbers(found.sentence)[:4]
    assert items == 24 < needed
    assert goal == 2 < least
    assert "excluded" not in found.sentence


@pytest.mark.parametrize("items", [1, 5])
def test_a_handful_of_items_cannot_tell(items: int) -> None:
    (found,) = settle([answers("tiny", 0, items, 0, 0)])
    assert found.outcome == "no difference shown"
    assert found.detectable == math.inf
    assert "too few to find any difference" in found.sentence or "one item is too few" in found.sentence
    assert settle([compare_losses("loss on one", [3.0], [2.0], [1])])[0].sentence.startswith(
        "could not tell in loss on one"
    )


def test_models_that_answer_alike_are_said_to_and_equality_is_not_claimed() -> None:
    (found,) = settle([answers("grammar", 120, 0, 0, 80)])
    assert found.sentence == (
        "no difference on grammar: right on the same 120 of 200 items; a loss of more than 1.9 points is excluded"
    )
    assert found.p == 1
    sizes = [10, 20, 30] * 5
    (loss,) = settle([compare_losses("loss on a.txt", [3.0 * n for n in sizes], [3.0 * n for n in sizes], sizes)])
    assert loss.difference == Estimate(0.0, 0.0, 0.0, 0.0)
    assert loss.sentence == "no difference in loss on a.txt: the same loss on all 15 documents"
    (few,) = settle([answers("grammar", 10, 0, 0, 10)])
    assert few.sentence.startswith("could not tell on grammar: 20 items")
    assert "right on the same 10 of 20 items" in few.sentence


def test_a_difference_that_the_correction_takes_away_is_told_apart() -> None:
    chance = answers("a", 400, 22, 8, 570)
    assert chance.p < 0.05
    assert settle([chance])[0].outcome == "worse"
    found = next(c for c in settle([chance, *[answers(f"b{i}", 450, 5, 5, 540) for i in range(9)]]) if c.name == "a")
    assert found.outcome == "no difference shown"
    assert found.p < 0.05 < found.p_adjusted
    assert "alone but" in found.sentence
    assert "after correction for 10 comparisons" in found.sentence


def test_all_are_corrected_together_and_the_worst_stands_first() -> None:
    made = [
        answers("kept", 900, 10, 12, 78),
        losses("loss on a.txt", 0.2),
        answers("arithmetic", 400, 100, 20, 480),
        answers("better", 400, 10, 80, 510),
        answers("spelling", 400, 60, 20, 520),
    ]
    settled = settle(made)
    assert [c.name for c in settled] == ["loss on a.txt", "arithmetic", "spelling", "kept", "better"]
    expected = dict(zip([c.name for c in made], holm([c.p for c in made]), strict=True))
    assert {c.name: c.p_adjusted for c in settled} == expected
    assert settle(settled) == settled
    assert settle(made[::-1]) == settled
    assert settle([]) == ()


def test_null_comparisons_are_called_differences_in_at_most_one_evaluation_of_20() -> None:
    generator = np.random.default_rng(1)
    wrong = 0
    for _ in range(300):
        made = []
        for i in range(4):
            changed = int(generator.integers(20, 80))
            lost = int(generator.binomial(changed, 0.5))
            made.append(answers(f"t{i}", 300, lost, changed - lost, 200))
        wrong += any(c.outcome != "no difference shown" for c in settle(made))
    assert wrong / 300 <= 0.075


def test_estimates_of_both_models_are_those_of_their_own() -> None:
    sizes, model, base = [10, 20, 30] * 5, [30.0, 61.0, 95.0] * 5, [29.0, 60.0, 96.0] * 5
    found = compare_losses("loss", model, base, sizes)
    assert (found.model, found.base) == (ratio(model, sizes), ratio(base, sizes))
    assert found.difference.value == pytest.approx(found.model.value - found.base.value)
    assert compare_losses("loss", model, base, sizes) == found
    right = compare_answers("x", [1, 0, 1], [1, 1, 1], kind="right")
    assert (right.model, right.base) == (mean([1, 0, 1]), mean([1, 1, 1]))


def test_tests_are_named_by_what_was_done() -> None:
    assert losses("a", 0.0).test == "paired bootstrap over documents"
    assert losses("a", 0.0, documents=4).test == "Student's t over documents"
    assert scores("a", 0.0).test == "paired bootstrap over items"


def test_areas_are_compared_by_delong() -> None:
    generator = np.random.default_rng(0)
    labels = [i % 2 == 0 for i in range(400)]
    base = generator.normal(0, 1, 400) + np.array(labels)
    found = compare_auc("memorized", generator.normal(0, 1, 400).tolist(), base.tolist(), labels)
    (settled,) = settle([found])
    assert (settled.unit, settled.test, settled.outcome) == ("score", "DeLong, paired", "worse")
    (same,) = settle([compare_auc("memorized", base.tolist(), base.tolist(), labels)])
    assert same.sentence == "no difference on memorized: the same order of all 400 items"


def test_rounding_follows_the_width_of_the_interval() -> None:
    for spread in (1e-4, 1e-3, 1e-2, 1e-1):
        (found,) = settle([losses("loss", 0.5, spread=spread)])
        shown = re.findall(r"\d\.\d+", found.sentence)[:3]
        assert len({len(s) for s in shown}) == 1
        width = float(shown[2]) - float(shown[1])
        assert width == pytest.approx(found.difference.high - found.difference.low, rel=0.1)
        assert len(shown[0]) <= 8


def divergence(kl: float, top1: float) -> Divergence:
    def sure(value: float) -> Estimate:
        return Estimate(value, 0.0, value, value)

    return Divergence(
        vocabulary="full",
        shared=100,
        tokens=6767,
        documents=40,
        base_loss=sure(2.0),
        loss_difference=sure(0.0),
        kl=sure(kl),
        kl_quantiles={},
        top1_agreement=sure(top1),
        top5_agreement=sure(top1),
        lost=sure(0.0),
        gained=sure(0.0),
        rank={},
        mean_reciprocal_rank=1.0,
    )


def test_the_whole_is_said_in_a_sentence_or_two() -> None:
    settled = settle(
        [
            answers("arithmetic (gsm8k)", 400, 100, 20, 480),
            losses("loss on a.txt", 0.03),
            answers("grammar (blimp)", 4500, 25, 22, 453),
            answers("reading (boolq)", 12, 3, 2, 7),
            answers("spelling", 400, 10, 80, 510),
        ]
    )
    said = overall(settled, divergence(0.0344, 0.9421))
    assert re.fullmatch(
        r"The compressed model is worse by 8\.0 points on arithmetic \(gsm8k\) and by 0\.0\d+ nats a token in loss on "
        r"a\.txt; better by 7\.0 points on spelling; no difference was shown on grammar \(blimp; a loss above 0\.\d+ "
        r"points is excluded\); could not tell on reading \(boolq\), where more items would be needed\. "
        r"Its most likely token is the base's on 94\.2 % of 6,767 tokens, at a KL of 0\.034 nats a token\.",
        said,
    )


def test_the_whole_claims_nothing_that_was_not_shown() -> None:
    assert overall([]) == ""
    kept = overall(settle([answers("grammar", 120, 0, 0, 80)]))
    assert kept == "No difference was shown on grammar (a loss above 1.9 points is excluded)."
    assert overall(settle([answers("x", 12, 3, 2, 7)])) == "Could not tell on x, where more items would be needed."
    assert overall([], divergence(0.0, 1.0)) == "On all 6,767 tokens its predictions are those of the base."
    assert "100 %" not in overall([], divergence(1e-5, 0.99999))
    many = overall(settle([answers(f"t{i}", 400, 100, 20, 480) for i in range(9)]))
    assert "and 5 others" in many


def test_sentences_of_a_stored_comparison_with_no_bounds_are_finite_words() -> None:
    made = answers("x", 0, 1, 0, 0)
    assert made.difference.low == -math.inf
    for found in (made, dataclasses.replace(made, detectable=math.inf), compare_losses("l", [2.0], [2.0], [1])):
        (settled,) = settle([found])
        assert "inf" not in settled.sentence
        assert "nan" not in settled.sentence
        assert "inf" not in overall([settled])


def test_what_cannot_be_compared_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="x: 1 numbers of the model, 2 of the base"):
        compare_answers("x", [1.0], [1.0, 0.0], kind="right")
    with pytest.raises(ValueError, match="x: no items"):
        compare_answers("x", [], [], kind="right")
    with pytest.raises(ValueError, match=r"a score of 0\.5: expected 0 or 1"):
        compare_answers("x", [0.5], [1.0], kind="right")
    with pytest.raises(ValueError, match="all finite"):
        compare_losses("x", [math.nan, 1.0], [1.0, 1.0], [1, 1])
    with pytest.raises(ValueError, match="at least one of each"):
        compare_auc("x", [1.0], [1.0], [True])
