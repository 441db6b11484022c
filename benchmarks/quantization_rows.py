"""What bench_quantization.py compares: recipes of ours, and what its peers are asked to do."""

from __future__ import annotations

import tomllib
from typing import Any

from tersely.plan.reading import presets

HALF = ", float16 source"
"""What ends the name of a row whose source is rounded to 16 bits first."""


def step(method: str, where: str = "linear", **settings: Any) -> dict[str, Any]:
    return {"where": where, "method": method, **settings}


def best(bits: int) -> list[dict[str, Any]]:
    """The preset for the best quality, with bfloat16 products."""
    steps = tomllib.loads(presets()[f"w{bits}a16-best"])["steps"]
    return [each | ({"autocast": True} if each["method"] == "distill" else {}) for each in steps]


def cache(method: str, **settings: Any) -> dict[str, Any]:
    """Not a step: how keys and values are kept."""
    return {"cache": method, **settings}


def recipes() -> dict[str, list[dict[str, Any]]]:
    """Name -> steps. Groups are of 64 inputs where the method has groups, as the peers' are."""
    smooth = step("smooth", "normed", alpha=0.5)
    whole = step("rtn", bits=8, group=64)
    rows: dict[str, list[dict[str, Any]]] = {}
    for bits in (4, 3, 2):
        rows |= {
            f"w{bits} rtn": [step("rtn", bits=bits, group=64)],
            f"w{bits} hqq": [step("hqq", bits=bits, group=64)],
            f"w{bits} gptq": [step("gptq", bits=bits, group=64)],
            f"w{bits} gptq, asymmetric": [step("gptq", bits=bits, group=64, symmetric=False)],
            f"w{bits} awq, gptq": [
                step("awq", "normed | mlp", bits=bits, group=64, symmetric=True, clip="mse"),
                step("gptq", bits=bits, group=64),
            ],
            f"w{bits} rotate, gptq": [step("rotate", "residual"), step("gptq", bits=bits, group=64)],
            f"w{bits} gptq, signround": [step("gptq", bits=bits, group=64), step("signround")],
        }
    for bits in (4, 3, 2):
        rows[f"w{bits}a16-best"] = best(bits)
        # Scales have the dtype of the source: with 16 bits they take as much as AutoRound's.
        rows[f"w{bits}a16-best{HALF}"] = best(bits)
        for name, symmetric in (("", True), (", asymmetric", False)):
            rows[f"w{bits} gptq{name}, signround{HALF}"] = [
                step("gptq", bits=bits, group=64, symmetric=symmetric),
                step("signround"),
            ]
    text: dict[str, Any] = {"tokens": 1_200_000, "own_texts": 3000, "checks": 6, "autocast": True}
    # Tuned anew from where it ended, at half the rate.
    again = step("distill", rate=4e-3, value_rate=2e-3, norm_rate=1e-3, **text)
    rows[f"w2a16-best, distill{HALF}"] = [*best(2), again]
    pv = step("pv", **text)
    aqlm = step("aqlm", codebooks=1, bits=8, group=4)
    for bits in (4, 3):
        rows |= {
            f"w{bits} squeezellm": [step("squeezellm", bits=bits)],
            f"w{bits} squeezellm, dense": [step("squeezellm", bits=bits, outliers=0.0, sensitive=0.0)],
            f"w{bits} lqer": [step("lqer", bits=bits, group=64, rank=16)],
            f"w{bits} aser": [step("aser", bits=bits, group=64, rank=16, outliers=8)],
            f"w{bits} shiftaddllm": [step("shiftaddllm", bits=bits)],
            f"w{bits} bipolar": [step("bipolar", bits=bits, group=64)],
        }
    return rows | {
        "w4 awq, rtn": [
            step("awq", "normed | mlp", bits=4, group=64, symmetric=False, clip="mse"),
            step("rtn", bits=4, group=64, symmetric=False, clip="mse"),
        ],
        "w4 finequant": [step("finequant")],
        "w4 nf4": [step("nf4")],
        "w4 mxfp4": [step("mxfp4")],
        "w4 nvfp4": [step("nvfp4")],
        "w8 fp8": [step("fp8")],
        "w8 llm_int8": [step("llm_int8", activations="int8-outliers")],
        "w2 bipolar": [step("bipolar", bits=2, group=64)],
        "w2.5 shiftaddllm, allocated": [step("shiftaddllm", bits=3, average_bits=2.5)],
        "w2 aqlm 1x8 g4": [aqlm],
        "w2 aqlm 1x8 g4, pv": [aqlm, pv],
        "w2 gptq, asymmetric, pv": [step("gptq", bits=2, group=64, symmetric=False), pv],
        "ternary": [step("ternary")],
        "ternary, distill": [step("ternary"), step("distill", rate=8e-3, value_rate=5e-3, norm_rate=1e-3, **text)],
        "w8a8 rtn": [step("rtn", bits=8, group=0, activations="int8")],
        "w8a8 smooth, gptq": [smooth, step("gptq", bits=8, group=0, activations="int8")],
        "w8a8 fp8": [step("fp8", activations="fp8")],
        "w4a8 gptq": [step("gptq", bits=4, group=0, activations="int8")],
        "w4a8 smooth, gptq": [smooth, step("gptq", bits=4, group=0, activations="int8")],
        "w4a8 aser 64": [
            step("aser_smooth", "normed | mlp | attn"),
            step("aser", bits=4, activations="int8"),
        ],
        # On widths of 192 to 768 a rank of 64 is a large branch; this one adds about 3 %, as 64 does on 4096.
        "w4a8 aser 3": [
            step("aser_smooth", "normed | mlp | attn", outliers=2),
            step("aser", bits=4, rank=3, outliers=2, activations="int8"),
        ],
        "w4a8 aser 64, in turns": [
            step("aser_smooth", "normed | mlp | attn"),
            step("aser", bits=4, passes=8, activations="int8"),
        ],
        "w4a8 aser 3, in turns": [
            step("aser_smooth", "normed | mlp | attn", outliers=2),
            step("aser", bits=4, rank=3, outliers=2, passes=8, activations="int8"),
        ],
        "w4a8 aser 64, nearest": [
            step("aser_smooth", "normed | mlp | attn"),
            step("aser", bits=4, rounding="nearest", activations="int8"),
        ],
        "w4a8 lqer 64": [step("lqer", bits=4, group=0, rank=64, activations="int8")],
        "w4a4 gptq": [step("gptq", bits=4, group=0, activations="int4")],
        "w4a4 quarot": [
            step("rotate", "residual"),
            step("gptq", bits=4, group=0, activations="int4"),
            step("gptq", "*.o_proj | *.down_proj", bits=4, group=0, activations="int4", hadamard=64),
        ],
        "cache none": [whole],
        "cache fp8": [whole, cache("fp8")],
        **{f"cache kivi {bits}": [whole, cache("kivi", bits=bits, residual=32)] for bits in (4, 2)},
        "cache kivi 2, rotated": [whole, cache("kivi", bits=2, residual=32, rotate=True)],
        "w4a4 nvfp4": [step("nvfp4", activations="nvfp4")],
    }


# Tool -> (driver, row -> arguments). {sequences}: the calibration of the model's protocol.
PEERS: dict[str, tuple[str, dict[str, str]]] = {
    "llmcompressor": (
        "llm_compressor.py",
        {
            **{f"w{bits} gptq": f"--method gptq --scheme w{bits}a16 --group 64 {{sequences}}" for bits in (4, 3, 2)},
            "w4a8 smoothquant, gptq": "--method smoothquant+gptq --scheme w4a8 --group 0 {sequences}",
            "w8a8 smoothquant, gptq": "--method smoothquant+gptq --scheme w8a8 --group 0 {sequences}",
        },
    ),
    "nvidia-modelopt": (
        "nvidia_modelopt.py",
        {"w4 awq_lite": "--method awq_lite --scheme w4a16 --group 64 {sequences}"},
    ),
    "auto-round": (
        "intel_autoround.py",
        {
            **{
                f"w{bits} 100 steps": f"--scheme w{bits}a16 --steps 100 --group 64 --samples 128 --context 128"
                for bits in (4, 3, 2)
            },
            # Its default number of steps, and all of the text.
            "w4 200 steps, whole text": "--scheme w4a16 --steps 200 --group 64 --samples 10000 --context 128 --windows",
            "w3 200 steps, whole text": "--scheme w3a16 --steps 200 --group 64 --samples 10000 --context 128 --windows",
            "w2 200 steps, whole text": "--scheme w2a16 --steps 200 --group 64 --samples 10000 --context 128 --windows",
        },
    ),
}
