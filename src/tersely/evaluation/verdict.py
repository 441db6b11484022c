"""What a comparison of a model with its base shows, in numbers and in a sentence that a person can act on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tersely.evaluation.statistics import (
    auc,
    auc_difference,
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
from tersely.results import Comparison, Divergence, Estimate

_LEVEL = 0.05
_LOSSES = {"nats": " nats a token", "bits": " bits a byte"}
_NAMED = 4
"""Comparisons that `overall` names of each outcome."""


@dataclass(frozen=True)
class _Unit:
    """How a comparison's numbers are written. large: a difference that a useful sample should find, as they are stored.

    scale: what the stored numbers are multiplied by; suffix: behind them; harm: what a change for the worse is.
    """

    scale: float
    suffix: str
    large: float
    harm: str = "loss"


def compare_losses(
    name: str,
    model_totals: Sequence[float],
    base_totals: Sequence[float],
    sizes: Sequence[float],
    *,
    unit: Literal["nats", "bits"] = "nats",
    seed: int = 0,
) -> Comparison:
    """Losses of a model and its base on the same documents (or windows).

    totals: sums over the tokens of each document, in nats or bits; sizes: predicted tokens, or bytes, of each document.
    Raises ValueError: lengths differ, a number is not finite, or no tokens.
    """
    difference, p = paired(_differences(name, model_totals, base_totals), sizes, seed=seed)
    return Comparison(
        name=name,
        unit=unit,
        higher_is_better=False,
        items=len(sizes),
        test=_mean_test(len(sizes), "documents"),
        model=ratio(model_totals, sizes, seed=seed),
        base=ratio(base_totals, sizes, seed=seed),
        difference=difference,
        p=p,
        p_adjusted=p,
        detectable=detectable(difference),
        outcome="no difference shown",
        sentence="",
    )


def compare_answers(
    name: str,
    model_scores: Sequence[float],
    base_scores: Sequence[float],
    *,
    kind: Literal["right", "score"],
    higher_is_better: bool = True,
    seed: int = 0,
) -> Comparison:
    """Scores of a model and its base on the same items.

    kind "right": 0 or 1 for each item, compared by McNemar's exact test, in shares 0 to 1 (unit "points": times 100);
    "score": any numbers, compared by a paired bootstrap over the items.
    Raises ValueError: lengths differ, no items, a number is not finite, or one that is neither 0 nor 1 (kind "right").
    """
    differences = _differences(name, model_scores, base_scores)
    items = len(differences)
    if not items:
        raise ValueError(f"{name}: no items")
    if kind == "right":
        if wrong := [score for score in (*model_scores, *base_scores) if score not in (0, 1)]:
            raise ValueError(f"{name}: a score of {wrong[0]}: expected 0 or 1 for answers that are right or wrong")
        lost, gained = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
        both = sum(m == b == 1 for m, b in zip(model_scores, base_scores, strict=True))
        difference = share_difference(both, lost, gained, items - both - lost - gained)
        p, least, test = mcnemar(lost, gained), detectable_share(items, lost + gained), "McNemar, exact"
    else:
        difference, p = paired(differences, [1.0] * items, seed=seed)
        least, test = detectable(difference), _mean_test(items, "items")
    return Comparison(
        name=name,
        unit="points" if kind == "right" else "score",
        higher_is_better=higher_is_better,
        items=items,
        test=test,
        model=mean(model_scores, seed=seed),
        base=mean(base_scores, seed=seed),
        difference=difference,
        p=p,
        p_adjusted=p,
        detectable=least,
        outcome="no difference shown",
        sentence="",
    )


def compare_auc(
    name: str, model_scores: Sequence[float], base_scores: Sequence[float], labels: Sequence[bool]
) -> Comparison:
    """How well the scores of a model and of its base tell members (labels True) from the others: areas under the curve.

    Raises ValueError: lengths differ, a score is not finite, or members or others are missing.
    """
    difference, p = auc_difference(model_scores, base_scores, labels)
    return Comparison(
        name=name,
        unit="score",
        higher_is_better=True,
        items=len(labels),
        test="DeLong, paired",
        model=auc(model_scores, labels),
        base=auc(base_scores, labels),
        difference=difference,
        p=p,
        p_adjusted=p,
        detectable=detectable(difference),
        outcome="no difference shown",
        sentence="",
    )


def settle(comparisons: Sequence[Comparison]) -> tuple[Comparison, ...]:
    """The outcome of each comparison, corrected for their number (Holm), and a sentence; the worst loss stands first.

    Losses that were shown come first, then all others, each by size; sizes in different units are compared as
    multiples of what counts as large: 5 points, 0.05 nats a token, or a tenth of the base's score.
    """
    settled = []
    for found, p in zip(comparisons, holm([c.p for c in comparisons]), strict=True):
        outcome: Literal["better", "worse", "no difference shown"] = "no difference shown"
        if p < _LEVEL and found.difference.value:
            outcome = "worse" if _harm(found).value > 0 else "better"
        judged = replace(found, p_adjusted=p, outcome=outcome)
        settled.append(replace(judged, sentence=_sentence(judged, len(comparisons))))
    return tuple(sorted(settled, key=lambda c: (c.outcome != "worse", -_severity(c), c.name)))


def overall(comparisons: Sequence[Comparison], divergence: Divergence | None = None) -> str:
    """The comparisons of `settle` in one sentence, and how far the predictions moved in another; "" for neither."""
    said: list[str] = []
    for outcome in ("worse", "better"):
        if own := [c for c in comparisons if c.outcome == outcome]:
            said.append(f"{'' if said else 'the compressed model is '}{outcome} {_listed([_by(c) for c in own])}")
    rest = [c for c in comparisons if c.outcome == "no difference shown"]
    if own := [c for c in rest if not _too_small(c)]:
        said.append(f"no difference was shown {_listed([_excluding(c) for c in own])}")
    if own := [c for c in rest if _too_small(c)]:
        said.append(f"could not tell {_listed([f'{_on(c)} {c.name}' for c in own])}, where more items would be needed")
    sentences = ["; ".join(said) + "."] if said else []
    if divergence is not None:
        tokens = f"{divergence.tokens:,} tokens"
        if divergence.kl.value == 0 and divergence.top1_agreement.value == 1:
            sentences.append(f"On all {tokens} its predictions are those of the base.")
        else:
            sentences.append(
                f"Its most likely token is the base's on {_percent(divergence.top1_agreement.value)} of {tokens}, "
                f"at a KL of {_significant(divergence.kl.value)} nats a token."
            )
    return " ".join(sentence[:1].upper() + sentence[1:] for sentence in sentences)


def _sentence(c: Comparison, comparisons: int) -> str:
    unit, harm = _unit(c), _harm(c)
    corrected = f" after correction for {comparisons} comparisons" if comparisons > 1 else ""
    if c.outcome != "no difference shown":
        value, low, high = _interval(harm if c.outcome == "worse" else _negative(harm), unit)
        size = f"{value}{unit.suffix}, 95 % interval {low} to {high} (p {_p(c.p_adjusted)}{corrected})"
        if c.unit in _LOSSES:
            return f"{c.name} is {'higher' if c.outcome == 'worse' else 'lower'} by {size}"
        return f"the compressed model is {c.outcome} on {c.name} by {size}"
    if _identical(c):
        found = _alike(c)
    else:
        value, low, high = _interval(c.difference, unit, sign=True)
        found = f"{value}{unit.suffix}"
        if math.isfinite(c.difference.stderr):
            found += f", 95 % interval {low} to {high}"
        if c.p < _LEVEL:
            found += f", p {_p(c.p)} alone but {_p(c.p_adjusted).removeprefix('= ')}{corrected}"
        elif c.difference.low > 0 or c.difference.high < 0:
            found += f", p {_p(c.p)}"
    if _too_small(c):
        return f"could not tell {_on(c)} {c.name}: {_needs(c)} (found: {found})"
    shown = "no difference" if _identical(c) else "no difference shown"
    limit = f"; a {unit.harm} of more than {_bound(harm, unit)}{unit.suffix} is excluded" if harm.high > 0 else ""
    return f"{shown} {_on(c)} {c.name}: {found}{limit}"


def _needs(c: Comparison) -> str:
    """What a sample that is too small could show, and how many items would do."""
    unit = _unit(c)
    what = "documents" if c.unit in _LOSSES else "items"
    if not math.isfinite(c.detectable):
        few = f"{c.items} {what} are" if c.items > 1 else f"one {what.removesuffix('s')} is"
        return f"{few} too few to find any difference"
    goal = 0.4 * unit.large
    if c.unit == "points":
        rate = c.difference.stderr**2 * (c.items - 1) + c.difference.value**2
        needed = items_needed(goal, max(rate, 3 / c.items))
    else:
        needed = c.items * (c.detectable / goal) ** 2
    return (
        f"{c.items} {what} find only differences above {_significant(c.detectable * unit.scale)}{unit.suffix}; "
        f"more {what} would be needed, about {_round_up(needed):,} for {goal * unit.scale:.2g}{unit.suffix}"
    )


def _alike(c: Comparison) -> str:
    if c.unit == "points":
        return f"right on the same {round(c.model.value * c.items)} of {c.items} items"
    if c.unit in _LOSSES:
        return f"the same loss on all {c.items} documents"
    if c.test.startswith("DeLong"):
        return f"the same order of all {c.items} items"
    return f"the same score on all {c.items} items"


def _on(c: Comparison) -> str:
    return "in" if c.unit in _LOSSES else "on"


def _by(c: Comparison) -> str:
    unit = _unit(c)
    shown = _rounded(abs(c.difference.value), unit, _decimals(c.difference, unit))
    return f"by {shown}{unit.suffix} {_on(c)} {c.name}"


def _excluding(c: Comparison) -> str:
    unit, harm = _unit(c), _harm(c)
    if harm.high <= 0:
        return f"{_on(c)} {c.name}"
    note = f"a {unit.harm} above {_bound(harm, unit)}{unit.suffix} is excluded"
    return f"{_on(c)} " + (f"{c.name[:-1]}; {note})" if c.name.endswith(")") else f"{c.name} ({note})")


def _bound(harm: Estimate, unit: _Unit) -> str:
    """The upper end of an interval, rounded up: what lies above it is excluded."""
    places = _decimals(harm, unit)
    return f"{math.ceil(round(harm.high * unit.scale * 10**places, 6)) / 10**places:,.{places}f}"


def _listed(names: Sequence[str]) -> str:
    shown = list(names[:_NAMED])
    if rest := len(names) - len(shown):
        shown.append(f"{rest} other{'s' if rest > 1 else ''}")
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _unit(c: Comparison) -> _Unit:
    if c.unit == "points":
        return _Unit(100.0, " points", 0.05)
    if c.unit in _LOSSES:
        return _Unit(1.0, _LOSSES[c.unit], 0.05 if c.unit == "nats" else 0.02, "rise")
    return _Unit(1.0, "", 0.1 * max(abs(c.base.value), abs(c.model.value)))


def _harm(c: Comparison) -> Estimate:
    """The difference, counted so that more is worse."""
    return _negative(c.difference) if c.higher_is_better else c.difference


def _negative(e: Estimate) -> Estimate:
    return Estimate(-e.value, e.stderr, -e.high, -e.low)


def _severity(c: Comparison) -> float:
    large = _unit(c).large
    return _harm(c).value / large if large else 0.0


def _too_small(c: Comparison) -> bool:
    """Whether a difference that counts as large could have been missed."""
    return c.detectable > _unit(c).large


def _identical(c: Comparison) -> bool:
    return c.difference.value == 0 and c.difference.stderr == 0


def _differences(name: str, model: Sequence[float], base: Sequence[float]) -> list[float]:
    if len(model) != len(base):
        raise ValueError(f"{name}: {len(model)} numbers of the model, {len(base)} of the base: expected as many")
    return [float(m) - float(b) for m, b in zip(model, base, strict=True)]


def _mean_test(count: int, what: str) -> str:
    return f"paired bootstrap over {what}" if resampled(count) else f"Student's t over {what}"


def _interval(e: Estimate, unit: _Unit, *, sign: bool = False) -> tuple[str, str, str]:
    places = _decimals(e, unit)
    value, low, high = (_rounded(v, unit, places) for v in (e.value, e.low, e.high))
    return f"+{value}" if sign and e.value > 0 and float(value.replace(",", "")) else value, low, high


def _decimals(e: Estimate, unit: _Unit) -> int:
    """So that the width of the interval has two digits; without a width, as many as give the value two."""
    width = (e.high - e.low) * unit.scale
    size = width if 0 < width < math.inf else abs(e.value) * unit.scale
    return min(12, max(0, 1 - math.floor(math.log10(size)))) if size else 1


def _rounded(value: float, unit: _Unit, places: int) -> str:
    shown = f"{value * unit.scale:,.{places}f}"
    return shown.removeprefix("-") if not float(shown.replace(",", "")) else shown


def _significant(value: float) -> str:
    """Two digits."""
    if not value:
        return "0"
    return f"{value:,.{max(0, 1 - math.floor(math.log10(abs(value))))}f}"


def _round_up(count: float) -> int:
    """To two digits."""
    step: int = 10 ** max(0, math.floor(math.log10(max(1.0, count))) - 1)
    return step * math.ceil(count / step)


def _percent(share: float) -> str:
    """Never 100 % where some are missing."""
    return "100 %" if share == 1 else f"{min(99.9, 100 * share):.1f} %" if share < 0.999 else "more than 99.9 %"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {_significant(p)}" if p < 0.995 else "= 1"
