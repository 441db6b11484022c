"""Whether a model is as often right as it is sure.

R = resamples, K = items (or groups of them), B = bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tersely.evaluation.statistics.means import ratio
from tersely.evaluation.statistics.quantiles import UNBOUNDED
from tersely.evaluation.statistics.resampling import Array, grouped, outer, resample
from tersely.results import Calibration, Estimate, Reliability

_BINS = 10


def calibration(probabilities: Sequence[Sequence[float]], answers: Sequence[int], *, seed: int = 0) -> Calibration:
    """Whether a model's certainty in multiple-choice answers is earned; see `Calibration` for the formulas.

    probabilities: of each item's choices, in any one unit (they are divided by their sum); items may have different
    numbers of choices. answers: index of the right choice of each item. Of equally likely choices the first is chosen.
    bins: all ten, those without items as zeros.

    The calibration error is biased upward, all the more with few items: even a model whose certainty is earned shows
    gaps by chance. Its standard error and interval come from 4999 resamples of the items. From e* = errors of the
    resamples, e = the error found, bias b = mean(e*) - e, and the distance D* = sum over bins of |gap* - gap|:

        low = 0 if e <= D*_0.975 (what chance alone can make), else min(e*_0.025 - 2 b, 2 e - e*_0.975)
        high = e*_0.975 - b

    Raises ValueError: lengths differ, no items, no choices, a probability that is negative or not finite, all of an
    item's 0, or an answer that is none of the choices.
    """
    if len(probabilities) != len(answers) or not len(answers):
        raise ValueError(f"{len(probabilities)} items, {len(answers)} answers: expected as many, at least one")
    confidences, rights, briers = [], [], []
    for place, (row, answer) in enumerate(zip(probabilities, answers, strict=True)):
        whole = math.fsum(row)
        if not all(p >= 0 for p in row) or not 0 < whole < math.inf or not 0 <= answer < len(row):
            raise ValueError(
                f"item {place}: answer {answer} of probabilities {list(row)}: expected 0 or more, not all 0"
            )
        risks = [p / whole for p in row]
        chosen = max(range(len(risks)), key=risks.__getitem__)
        confidences.append(risks[chosen])
        rights.append(float(chosen == answer))
        briers.append(math.fsum((risk - (choice == answer)) ** 2 for choice, risk in enumerate(risks)))
    confidence_K, right_K = np.array(confidences), np.array(rights)
    bin_K = np.minimum((confidence_K * _BINS).astype(np.int64), _BINS - 1)
    count_B = np.bincount(bin_K, minlength=_BINS)
    bins = tuple(
        Reliability(int(n), float(sure / n) if n else 0.0, float(right / n) if n else 0.0)
        for n, sure, right in zip(
            count_B,
            np.bincount(bin_K, confidence_K, _BINS),
            np.bincount(bin_K, right_K, _BINS),
            strict=True,
        )
    )
    brier = ratio(briers, [1.0] * len(briers), seed=seed, bounds=(0.0, 2.0))
    return Calibration(brier, _calibration_error(right_K - confidence_K, bin_K, seed), bins)


def _calibration_error(gap_K: Array, bin_K: NDArray[np.int64], seed: int) -> Estimate:
    """sum over bins of |sum of gaps| / n, from right minus confidence of each item."""
    n = len(gap_K)
    error = float(np.abs(np.bincount(bin_K, gap_K, _BINS)).sum()) / n
    if n < 2:
        return Estimate(error, math.inf, *UNBOUNDED)
    gap_KB = np.zeros((n, _BINS))
    gap_KB[np.arange(n), bin_K] = gap_K
    gap_KB = grouped(gap_KB[np.lexsort((gap_K, bin_K))], seed)
    resampled_RB = resample(gap_KB, seed) / n
    error_R = np.sort(np.abs(resampled_RB).sum(1))
    chance_R = np.sort(np.abs(resampled_RB - gap_KB.sum(0) / n).sum(1))
    least, most = outer(error_R)
    bias = float(error_R.mean()) - error
    low = 0.0 if error <= outer(chance_R)[1] else min(least - 2 * bias, 2 * error - most)
    return Estimate(error, float(error_R.std()), min(error, max(0.0, low)), min(1.0, max(error, most - bias)))
