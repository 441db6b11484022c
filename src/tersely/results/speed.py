"""How fast a model runs, and what it takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tersely.results.evaluation import Setting, Subject
from tersely.results.plain import Measurement


@dataclass(frozen=True)
class Point:
    """One cell of the grid: `batch` sequences at once.

    prefill: `length` prompt tokens each, up to the first new token (tokens = length). decode: `tokens` new ones after
    such a prompt, the first not counted. seconds: median of the repeats, fastest and slowest beside it;
    tokens_per_second: of all sequences together, by the median.
    """

    phase: Literal["prefill", "decode"]
    batch: int
    length: int
    tokens: int
    seconds: float
    fastest: float
    slowest: float
    repeats: int
    tokens_per_second: float


@dataclass(frozen=True)
class Speed(Measurement):
    """A model in one engine on one machine.

    first_token: seconds from a prompt of the shortest length, batch 1, to its first token (median).
    memory_loaded, memory_peak: bytes, resident memory of a process of its own (CPU) or allocated on the device.
    """

    model: Subject
    setting: Setting = field(compare=False)
    engine: str
    """"transformers", "llama.cpp", "vllm"; its version is in the setting."""
    format: str
    """How the weights lie in memory while it runs: "bfloat16", "Q4_0", "pack-quantized, unpacked to bfloat16"."""
    points: tuple[Point, ...]
    first_token: float
    load: float
    """Seconds from the start of loading to ready."""
    memory_loaded: int
    memory_peak: int
    disk: int
    """Bytes of all files of the model."""
    notes: tuple[str, ...]
    """Cells left out, and why; what must be known of the engine's figures."""
    seconds: float = field(default=0.0, compare=False)
