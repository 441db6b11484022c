"""Means, shares and areas under curves with standard errors and 95 % intervals; tests of paired differences.

One document (or window, or item) is one observation: its tokens are not independent of each other. What resamples does
so with a fixed seed, and what it gives does not depend on the order of the observations. How often the intervals hold
the truth is measured by benchmarks/bench_statistics.py and shown in docs/statistics.md.
"""

from tersely.evaluation.statistics.certainty import calibration
from tersely.evaluation.statistics.curves import auc, auc_difference
from tersely.evaluation.statistics.means import mean, paired, ratio
from tersely.evaluation.statistics.power import detectable, detectable_share, holm, items_needed
from tersely.evaluation.statistics.resampling import resampled
from tersely.evaluation.statistics.shares import mcnemar, share_difference

__all__ = [
    "auc",
    "auc_difference",
    "calibration",
    "detectable",
    "detectable_share",
    "holm",
    "items_needed",
    "mcnemar",
    "mean",
    "paired",
    "ratio",
    "resampled",
    "share_difference",
]
