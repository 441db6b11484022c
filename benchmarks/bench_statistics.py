"""How often the 95 % intervals hold the truth, how often the tests reject when nothing differs, and what both cost.

    python benchmarks/bench_statistics.py --assets ../shared

Documents are simulated: their lengths are drawn from those of data/tinystories, their losses from distributions whose
mean is known. Beside `ratio` stands what Student's interval alone would hold.
Results go to benchmarks/results/DATE-statistics.json.
"""

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tersely.calibrate import documents, read_text
from tersely.evaluation.statistics import (
    auc,
    auc_difference,
    calibration,
    detectable_share,
    mcnemar,
    mean,
    paired,
    ratio,
    share_difference,
)
from tersely.results import Estimate

HERE = Path(__file__).parent
Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator, Array], Array]

E = math.exp(0.5)
"""Mean of a lognormal with sigma 1."""
STUDENT = {5: 2.7764, 10: 2.2622, 20: 2.093, 50: 2.0096, 100: 1.9842, 200: 1.972, 500: 1.9647, 1000: 1.9623}
"""Documents -> t of 97.5 % with one degree of freedom less."""


def lognormal(generator: np.random.Generator, sizes: Array) -> Array:
    drawn: Array = np.exp(generator.normal(0, 1, sizes.shape))
    return drawn


def noise(generator: np.random.Generator, sizes: Array) -> Array:
    """Of means over the tokens of a document."""
    drawn: Array = generator.normal(0, 1, sizes.shape) / np.sqrt(sizes)
    return drawn


POPULATIONS: dict[str, tuple[Draw, float]] = {
    "KL, light tail (gamma 8)": (lambda g, n: 0.05 * n * g.gamma(8, 1 / 8, n.shape), 0.05),
    "KL, heavy tail (lognormal 1)": (lambda g, n: 0.05 * n * lognormal(g, n), 0.05 * E),
    "difference, light tails": (lambda g, n: n * (0.02 + 0.5 * noise(g, n)), 0.02),
    "difference, one heavy tail": (
        lambda g, n: n * (0.05 * lognormal(g, n) - 0.06 + 0.3 * noise(g, n)),
        0.05 * E - 0.06,
    ),
    "difference, two unequal heavy tails": (
        lambda g, n: 0.05 * n * lognormal(g, n) * np.where(g.random(n.shape) < 0.3, -1, 1),
        0.02 * E,
    ),
    "difference, heavy tails (t, 3)": (lambda g, n: 0.03 * n * g.standard_t(3, n.shape), 0.0),
    "share of 90 %": (lambda g, n: g.binomial(n.astype(int), g.beta(18, 2, n.shape)).astype(float), 0.9),
    "share of 0.1 %": (lambda g, n: g.binomial(n.astype(int), 0.001).astype(float), 0.001),
}


def rate(hits: Iterable[bool]) -> float:
    return round(100 * statistics.fmean(hits), 2)


def holds(found: Estimate, truth: float) -> bool:
    return found.low <= truth <= found.high


def means(lengths: Array, replicates: int) -> list[dict[str, Any]]:
    """Coverage of `ratio`, both its sides, and what Student's interval alone covers."""
    rows = []
    for name, (draw, truth) in POPULATIONS.items():
        for k in STUDENT:
            generator = np.random.default_rng(k)
            found, student = [], []
            t = STUDENT[k]
            for _ in range(replicates):
                sizes = generator.choice(lengths, k)
                e = ratio(draw(generator, sizes), sizes)
                found.append(e)
                student.append(abs(e.value - truth) <= t * e.stderr)
            widths = [(e.high - e.low) / (2 * 1.96 * e.stderr) for e in found if e.stderr]
            row = {
                "population": name,
                "documents": k,
                "held": rate(holds(e, truth) for e in found),
                "too_low": rate(e.high < truth for e in found),
                "too_high": rate(e.low > truth for e in found),
                "width": round(statistics.median(widths), 3),
                "held_by_students_alone": rate(student),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def tests(lengths: Array, replicates: int) -> list[dict[str, Any]]:
    """How often `paired` finds a difference at the 5 % level where there is none."""
    rows = []
    for name, (draw, truth) in POPULATIONS.items():
        if not name.startswith("difference"):
            continue
        for k in (10, 20, 100, 500):
            generator = np.random.default_rng(k)
            rejected = []
            for _ in range(replicates):
                sizes = generator.choice(lengths, k)
                rejected.append(paired(draw(generator, sizes) - truth * sizes, sizes)[1] < 0.05)
            rows.append({"population": name, "documents": k, "rejected": rate(rejected)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def binomial(n: int, p: float) -> list[float]:
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(n + 1)]
    return [math.exp(c + i * math.log(p) + (n - i) * math.log1p(-p)) for i, c in enumerate(logs)]


def shares() -> list[dict[str, Any]]:
    """Exact coverage of Wilson's interval, by enumeration."""
    rows = []
    for n in (20, 100, 500, 2000):
        found = [mean([1.0] * i + [0.0] * (n - i)) for i in range(n + 1)]
        for p in (0.5, 0.75, 0.9, 0.97):
            held = sum(c for c, e in zip(binomial(n, p), found, strict=True) if holds(e, p))
            rows.append({"items": n, "share": p, "held": round(100 * held, 2)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def changes() -> list[dict[str, Any]]:
    """Paired differences of shares: how often the interval holds and the test rejects, exactly; what is detectable."""
    rows = []
    for n in (50, 200, 1000):
        for rate_, difference in ((0.02, 0.0), (0.05, 0.0), (0.05, 0.02), (0.2, 0.0), (0.2, 0.1)):
            held = rejected = 0.0
            direction = (rate_ + difference) / 2 / rate_
            for changed, chance in enumerate(binomial(n, rate_)):
                if chance < 1e-7:
                    continue
                for lost, part in enumerate(binomial(changed, direction)):
                    if chance * part > 1e-9:
                        gained = changed - lost
                        held += chance * part * holds(share_difference(n - changed, lost, gained, 0), -difference)
                        rejected += chance * part * (mcnemar(lost, gained) < 0.05)
            row = {"items": n, "changed": rate_, "difference": difference, "held": round(100 * held, 2)}
            row |= {"rejected": round(100 * rejected, 2), "detectable": detectable_share(n, round(n * rate_))}
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def areas(replicates: int) -> list[dict[str, Any]]:
    rows = []
    for members, others in ((20, 20), (50, 100), (500, 500)):
        for shift in (0.0, 1.0, 2.0):
            generator = np.random.default_rng(members)
            labels = [True] * members + [False] * others
            truth = 0.5 * (1 + math.erf(shift / 2))
            held, differing, rejected = [], [], []
            for _ in range(replicates):
                scores = generator.normal(0, 1, members + others)
                base = scores + shift * np.array(labels)
                other = 0.8 * scores + 0.6 * generator.normal(0, 1, members + others)
                held.append(holds(auc(base, labels), truth))
                differing.append(holds(auc_difference(other, base, labels)[0], 0.5 - truth))
                rejected.append(auc_difference(other + shift * np.array(labels), base, labels)[1] < 0.05)
            row = {"members": members, "others": others, "area": round(truth, 3), "held": rate(held)}
            rows.append(row | {"difference_held": rate(differing), "rejected": rate(rejected)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def calibrations(replicates: int) -> list[dict[str, Any]]:
    """Two choices, certainties of 50 to 100 %, answers right less often than claimed by `error`."""
    rows = []
    for items in (50, 200, 1000):
        for error in (0.0, 0.03, 0.1):
            generator = np.random.default_rng(items)
            found = []
            for _ in range(replicates):
                sure = np.clip(generator.beta(5, 3, items), 0.5, 1)
                right = generator.random(items) < sure - error
                found.append(calibration([[p, 1 - p] for p in sure], [0 if r else 1 for r in right]).error)
            row = {"items": items, "error": error, "mean_found": round(statistics.fmean(e.value for e in found), 4)}
            rows.append(row | {"held": rate(holds(e, error) for e in found)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def costs(lengths: Array) -> list[dict[str, Any]]:
    """Seconds of a first call, whose resamples are drawn, and of the next ones (median of 5)."""
    rows = []
    generator = np.random.default_rng(0)
    for k in (2, 20, 200, 1000, 10_000, 100_000):
        sizes = generator.choice(lengths, k)
        totals = sizes * lognormal(generator, sizes)
        row: dict[str, Any] = {"documents": k}
        for name, call in (("ratio", ratio), ("paired", paired)):
            seconds = []
            for _ in range(6):
                start = time.perf_counter()
                call(totals, sizes, seed=k)
                seconds.append(time.perf_counter() - start)
            row |= {f"{name}_first": round(seconds[0], 4), f"{name}_next": round(statistics.median(seconds[1:]), 4)}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def processor() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=HERE.parent.parent / "shared")
    parser.add_argument("--replicates", type=int, default=2000, help="simulated samples of each kind")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"{date.today()}-statistics.json")
    options = parser.parse_args()
    text = options.assets / "data" / "tinystories" / "sample.txt"
    if not text.exists():
        raise SystemExit(f"{text} is missing: pass --assets PATH")
    lengths = np.array([float(min(512, len(d.split()))) for d in documents(read_text(text))])
    results = {
        "date": f"{date.today()}",
        "hardware": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "memory": os.sysconf("SC_PHYS_PAGES") * 4096,
        },
        "software": {"python": platform.python_version(), "numpy": version("numpy"), "tersely": version("tersely")},
        "replicates": options.replicates,
        "lengths": {"documents": len(lengths), "mean": float(lengths.mean()), "stdev": float(lengths.std())},
        "costs": costs(lengths),
        "means": means(lengths, options.replicates),
        "tests": tests(lengths, options.replicates // 2),
        "shares": shares(),
        "changes": changes(),
        "areas": areas(options.replicates // 2),
        "calibrations": calibrations(options.replicates // 4),
    }
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
