"""Plausible facts, for tests of what is made of them: equal arguments, equal facts."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

from tersely.report.page import Dossier
from tersely.results import (
    Bin,
    Blame,
    Calibration,
    Comparison,
    Depth,
    Divergence,
    Estimate,
    Evaluation,
    Part,
    Point,
    Reliability,
    Report,
    Row,
    Sample,
    Setting,
    Site,
    Speed,
    Subject,
    TaskResult,
    TextResult,
)

WEIGHTS = {
    "self_attn.q_proj": ("attention", 1.0),
    "self_attn.k_proj": ("attention", 0.25),
    "self_attn.v_proj": ("attention", 0.25),
    "self_attn.o_proj": ("attention", 1.0),
    "mlp.gate_proj": ("mlp", 2.75),
    "mlp.up_proj": ("mlp", 2.75),
    "mlp.down_proj": ("mlp", 2.75),
}
VERSIONS = {"tersely": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.7"}
TASKS = (
    ("blimp", "BLiMP", "grammar", 0.5, 0.792, -0.004, 2000),
    ("lambada", "LAMBADA", "reading", None, 0.613, -0.021, 1200),
    ("mmlu", "MMLU", "knowledge", 0.25, 0.447, -0.012, 1500),
    ("gsm8k", "GSM8K", "arithmetic", None, 0.281, -0.041, 660),
    ("piqa", "PIQA", "commonsense", 0.5, 0.741, 0.009, 900),
    ("needle", "Needle in a haystack", "long context", 0.0, 0.94, -0.06, 200),
)


def estimate(value: float, stderr: float) -> Estimate:
    """With the interval of a normal distribution; an infinite error gives no bounds."""
    return Estimate(value, stderr, value - 1.96 * stderr, value + 1.96 * stderr)


def setting(**changed: Any) -> Setting:
    plain = {
        "created": "2025-03-14T09:26:53+01:00",
        "device": "cpu",
        "hardware": "Example CPU at 3.1 GHz",
        "threads": 2,
        "memory": 32 << 30,
        "versions": VERSIONS,
    }
    return Setting(**{**plain, **changed})


def subject(name: str = "small", size: int = 733_000_000, dtype: str = "bfloat16") -> Subject:
    return Subject(name, f"{sum(map(ord, name)):064x}", dtype, 1_240_000_000, size)


def report(
    *,
    source: str = "base-1b",
    blocks: int = 16,
    bits: Sequence[int] = (4,),
    width: int = 2048,
    format: str = "compressed-tensors",
    notes: tuple[str, ...] = (),
    seed: int = 0,
) -> Report:
    """Of a Llama with seven weights a block; several widths alternate over the blocks."""
    chance = random.Random(seed)
    rows = []
    for block in range(blocks):
        used = bits[block % len(bits)]
        for path, (role, share) in WEIGHTS.items():
            parameters = int(share * width * width)
            error = 0.9 * 2.0**-used * (1.4 if "down" in path or "v_proj" in path else 1) * chance.uniform(0.6, 1.5)
            name = f"model.layers.{block}.{path}.weight"
            after = parameters * used // 8 + parameters // 64 * 2
            rows.append(Row(name, block, role, "gptq", parameters, 2 * parameters, after, error, 262_144))
    inside = sum(r.parameters for r in rows)
    kept = 32_000 * width
    steps = [{"where": "linear", "method": "gptq", "bits": b, "group": 64, "symmetric": True} for b in bits]
    return Report(
        source=source,
        out="out",
        format=format,
        recipe={"seed": 0, "calibration": {"samples": 128, "context": 2048}, "steps": steps},
        calibration={
            "name": "text.txt[:128]",
            "sha256": "5e" * 32,
            "kind": "documents",
            "sequences": 128,
            "tokens": 262_144,
        },
        rows=tuple(rows),
        bytes_before=2 * (inside + kept),
        bytes_after=sum(r.bytes_after for r in rows) + 2 * kept,
        parameters=inside + kept,
        notes=notes,
    )


def bins(edges: Sequence[int], kl: float, loss: float, slope: float) -> tuple[Bin, ...]:
    made = []
    for place, (first, after) in enumerate(pairwise(edges)):
        moved = loss + slope * place
        made.append(
            Bin(
                first,
                after - 1,
                900 + 350 * place,
                estimate(moved + 1.1 * kl, 0.04),
                estimate(moved, 0.04),
                estimate(kl * (1.3 - 0.09 * place), 0.006),
            )
        )
    return tuple(made)


def divergence(kl: float = 0.062) -> Divergence:
    return Divergence(
        vocabulary="full",
        shared=32_000,
        tokens=48_210,
        documents=200,
        base_loss=estimate(2.713, 0.021),
        loss_difference=estimate(0.9 * kl, 0.004),
        kl=estimate(kl, 0.0016),
        kl_quantiles={"0.5": 0.3 * kl, "0.9": 2.4 * kl, "0.99": 9 * kl, "0.999": 27 * kl, "1": 80 * kl},
        top1_agreement=estimate(0.891, 0.0021),
        top5_agreement=estimate(0.862, 0.0017),
        lost=estimate(0.031, 0.0011),
        gained=estimate(0.022, 0.0009),
        rank={"1": 0.891, "2-5": 0.094, "6-10": 0.009, "11-100": 0.005, "101-": 0.001},
        mean_reciprocal_rank=0.937,
    )


def text_result(kl: float = 0.062) -> TextResult:
    return TextResult(
        text="held-out.txt[-200:]",
        kind="documents",
        sha256="ab" * 32,
        documents=200,
        available=1800,
        tokens=48_210,
        context=2048,
        loss=estimate(2.713 + 0.9 * kl, 0.021),
        perplexity=math.exp(2.713 + 0.9 * kl),
        bits_per_byte=estimate(0.912, 0.007),
        by_position=bins((1, 2, 4, 8, 16, 32, 64, 128, 256, 512), kl, 3.6, -0.13),
        by_frequency=bins((1, 2, 4, 8, 16, 64, 256, 1024, 16_384), kl, 6.1, -0.62),
        divergence=divergence(kl),
    )


def calibration(shift: float) -> Calibration:
    made = []
    for tenth in range(10):
        confidence = tenth / 10 + 0.05
        right = min(1.0, max(0.0, confidence - shift * confidence * (1 - confidence) * 3))
        made.append(Reliability(20 + 22 * tenth if tenth > 1 else 0, confidence, right))
    return Calibration(estimate(0.41 + shift, 0.011), estimate(0.03 + shift, 0.009), tuple(made))


def task(name: str, title: str, group: str, chance: float | None, base: float, change: float, items: int) -> TaskResult:
    value = max(0.02, base + change)
    chosen = name in ("mmlu", "piqa")
    parts = tuple(
        Part(f"{name} {i + 1}", items // 8, estimate(value + 0.02 * i - 0.07, 0.03), estimate(base, 0.03))
        for i in range(8 if name in ("mmlu", "blimp", "needle") else 0)
    )
    return TaskResult(
        name=name,
        title=title,
        group=group,
        metric="accuracy",
        higher_is_better=True,
        chance=chance,
        items=items,
        available=2 * items,
        sha256=f"{len(name):064x}",
        value=estimate(value, math.sqrt(value * (1 - value) / items)),
        base=estimate(base, math.sqrt(base * (1 - base) / items)),
        lost=round(items * (0.03 - min(change, 0))),
        gained=round(items * (0.03 + max(change, 0))),
        parts=parts,
        calibration=calibration(0.09) if chosen else None,
        base_calibration=calibration(0.03) if chosen else None,
        harness={"acc,none": value, "acc_stderr,none": 0.0111},
    )


def comparison(result: TaskResult) -> Comparison:
    assert result.base is not None
    difference = estimate(result.value.value - result.base.value, 0.35 / math.sqrt(result.items))
    worse = difference.high < 0
    points, low, high = (abs(100 * v) for v in (difference.value, difference.high, difference.low))
    sentence = (
        f"small is worse on {result.group} by {points:.1f} points, 95 % interval {low:.1f} to {high:.1f}"
        if worse
        else f"no difference shown on {result.group}, differences above {max(low, high):.1f} points excluded"
    )
    return Comparison(
        name=result.title,
        unit="points",
        higher_is_better=True,
        items=result.items,
        test="McNemar, exact",
        model=result.value,
        base=result.base,
        difference=difference,
        p=0.0004 if worse else 0.31,
        p_adjusted=0.0028 if worse else 1.0,
        detectable=2.8 * difference.stderr,
        outcome="worse" if worse else "no difference shown",
        sentence=sentence,
        task=result.name,
    )


def evaluation(name: str = "small", *, kl: float = 0.062, size: int = 733_000_000, base: bool = True) -> Evaluation:
    """With text, tasks, comparisons and samples; without a base nothing is compared."""
    tasks = tuple(task(n, t, g, c, b, change * (kl / 0.062) ** 0.4, i) for n, t, g, c, b, change, i in TASKS)
    loss = Comparison(
        name="loss",
        unit="nats",
        higher_is_better=False,
        items=200,
        test="paired bootstrap over documents",
        model=estimate(2.713 + 0.9 * kl, 0.021),
        base=estimate(2.713, 0.021),
        difference=estimate(0.9 * kl, 0.004),
        p=0.00001,
        p_adjusted=0.00007,
        detectable=0.011,
        outcome="worse",
        sentence=f"{name} is worse on held-out.txt by {0.9 * kl:.3f} nats a token, 95 % interval "
        f"{0.9 * kl - 0.008:.3f} to {0.9 * kl + 0.008:.3f}",
    )
    compared = sorted((comparison(t) for t in tasks), key=lambda c: c.difference.value)
    return Evaluation(
        model=subject(name, size),
        base=subject("base-1b", 2_480_000_000) if base else None,
        setting=setting(),
        seed=0,
        text=text_result(kl),
        tasks=tasks,
        verdict=f"{name} is worse by {0.9 * kl:.3f} nats a token in loss on held-out.txt." if base else "",
        comparisons=(loss, *compared) if base else (),
        samples=(
            Sample(
                "Once upon a time",
                ", there was a little girl named Lily. She loved to play outside in the sunshine. One day she saw a "
                "big red ball, and the ball was stuck in a tree.",
                ", there was a little girl named Lily. She loved to play outside in the sunshine. One day her mother "
                "told her that they would go to the park.",
                0.0,
                0.0,
            ),
            Sample("The road to the north", " is long, and it is long, and it is long.", " is long.", 0.42, 0.0),
            Sample("Two and two are", " four.", " four.", 0.0, 0.0),
        ),
        notes=("the budget allowed 660 of 1319 items of GSM8K: differences below 3.8 points could not be told",),
        budget=600.0,
        seconds=571.0,
    )


def blame(blocks: int = 16, direction: Literal["restore", "spoil"] = "restore") -> Blame:
    chance = random.Random(3)
    sites = []
    for block in range(blocks):
        dear = 0.004 * chance.uniform(0.2, 1.4) + (0.011 if block in (0, blocks - 1) else 0)
        name = f"model.layers.{block}"
        sites.append(Site(name, "block", block, "block", 58_000_000, 4.25, estimate(dear, 0.0007)))
        for path, (role, share) in WEIGHTS.items():
            part = estimate(dear * share / 9 * chance.uniform(0.5, 2), 0.0003)
            sites.append(Site(f"{name}.{path}.weight", "weight", block, role, int(4.2e6 * share), 4.25, part))
    sites.sort(key=lambda s: -s.cost.value)
    return Blame(
        model=subject(),
        base=subject("base-1b"),
        setting=setting(),
        direction=direction,
        text="held-out.txt[-40:]",
        sha256="cd" * 32,
        documents=40,
        tokens=9_800,
        context=2048,
        kl=estimate(0.0644, 0.003),
        sites=tuple(sites),
        depth=tuple(Depth(f"model.layers.{i}", i, 0.02 + 0.011 * i**0.8, 1 - 0.0002 * i**1.4) for i in range(blocks)),
        notes=("weights of blocks 5 to 9 were not reached in the time given",),
        budget=300.0,
        seconds=296.0,
    )


def speed(name: str = "small", factor: float = 1.0, size: int = 733_000_000, engine: str = "transformers") -> Speed:
    points: list[Point] = []
    for phase, rate in (("prefill", 310.0), ("decode", 14.0)):
        for batch in (1, 4):
            for length in (128, 1024):
                tokens = length if phase == "prefill" else 64
                per_second = factor * rate * batch**0.7 * (1 - length / 9000)
                seconds = tokens * batch / per_second
                points.append(
                    Point(
                        phase,  # type: ignore[arg-type]
                        batch,
                        length,
                        0 if phase == "prefill" else tokens,
                        seconds,
                        0.96 * seconds,
                        1.07 * seconds,
                        7,
                        per_second,
                    )
                )
    return Speed(
        model=subject(name, size),
        setting=setting(),
        engine=engine,
        format="pack-quantized, unpacked to bfloat16" if name == "small" else "bfloat16",
        points=tuple(points),
        first_token=0.41 / factor,
        load=2.3,
        memory_loaded=int(2.6e9 / factor),
        memory_peak=int(2.9e9 / factor),
        disk=size + 9_000_000,
        notes=("batch 4 with prompts of 4096 tokens was left out: it would need 41 GB",),
    )


def whole(name: str = "small", **changed: Any) -> Dossier:
    """A model of which everything is known."""
    facts: dict[str, Any] = {
        "name": name,
        "report": report(),
        "versions": VERSIONS,
        "format": "compressed-tensors",
        "evaluation": evaluation(name),
        "blame": blame(),
        "speeds": (speed("small", 0.97),),
        "base_speeds": (speed("base-1b", size=2_480_000_000),),
        "folder": name,
    }
    return Dossier(**{**facts, **changed})


def fresh(name: str = "small", made: Report | None = None) -> Dossier:
    """A model that was just compressed: nothing is measured yet."""
    return Dossier(name, made or report(), VERSIONS, "compressed-tensors", None, None, (), (), "")


def several() -> tuple[Dossier, ...]:
    """Six models of one base, in sizes and qualities that make a front, some of them off it."""
    made: list[Dossier] = []
    for name, bits, kl in (
        ("base-1b-w4-gptq", (4,), 0.062),
        ("base-1b-w8", (8,), 0.0004),
        ("base-1b-w3-gptq", (3,), 0.31),
        ("base-1b-w4-rtn", (4,), 0.14),
        ("base-1b-w4-w3-mixed", (4, 3), 0.13),
        ("base-1b-w2-gptq", (2,), 1.9),
    ):
        packed = report(bits=bits)
        changed = evaluation(name, kl=kl, size=packed.bytes_after)
        made.append(whole(name, report=packed, evaluation=changed, blame=blame() if not made else None))
    return tuple(made)
