"""What runs a model while it is timed. Each engine works in a process of its own (`worker`); imports stay light here.

An engine is a module with `load(task) -> Engine`; its library is imported with the module, so that the time of
loading is that of the model alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class EngineFacts:
    """What is known of an engine before it runs."""

    name: str
    module: str
    """Where its `load` is."""
    library: str
    """What that imports: it may not be installed."""
    packages: tuple[str, ...]
    """As in pip: the engine's own, then others whose versions a figure needs beside it."""
    requirement: str
    """What pip is told to install."""
    suffix: str = ""
    """Of the files that it reads; "": it reads checkpoint folders."""
    runs_as_stored: bool = False
    """Whether a model runs in the dtype in which it is stored, so that none can be asked for."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    """Types of the devices that it is timed on."""


ENGINES = {
    facts.name: facts
    for facts in (
        EngineFacts(
            "transformers",
            "tersely.evaluation.engines.transformers",
            library="transformers",
            packages=("transformers", "compressed-tensors"),
            requirement="transformers",
        ),
        EngineFacts(
            "llama.cpp",
            "tersely.evaluation.engines.llama_cpp",
            library="llama_cpp",
            packages=("llama-cpp-python",),
            requirement="'tersely[llama-cpp]'",
            suffix=".gguf",
            runs_as_stored=True,
        ),
        EngineFacts(
            "vllm",
            "tersely.evaluation.engines.vllm",
            library="vllm",
            packages=("vllm", "compressed-tensors"),
            requirement="vllm",
            devices=("cuda",),
        ),
    )
}
"""By name; where none is named, the first that reads such a model runs it."""


@dataclass(frozen=True)
class Task:
    """What is to be loaded, and for what: at most `batch` sequences of `length` tokens, new ones included."""

    path: str
    device: str
    dtype: str
    """"auto", or the name of a torch dtype."""
    threads: int
    batch: int
    length: int


@dataclass(frozen=True)
class Ready:
    """What an engine says of a model that it has loaded. positions: None where there is no limit."""

    vocabulary: int
    positions: int | None
    dtype: str
    format: str
    """How the weights lie in memory."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Timed:
    """One run: seconds from the call to the first token chosen, and of all steps after it."""

    prefill: float
    decode: float
    ids: list[list[int]]
    """What was chosen, of each sequence: the first token and one for each step."""


class Engine(Protocol):
    """A loaded model."""

    @property
    def ready(self) -> Ready:
        """What it is."""

    def run(self, prompts: Sequence[Sequence[int]], tokens: int) -> Timed:
        """Read prompts of one length, choose the most likely token, then feed and choose `tokens` times more.

        End tokens do not end it. The cache is empty before and unused after.
        """

    def memory(self) -> tuple[int, int]:
        """Bytes in use now, and at most so far: resident ones on a CPU, else those of the device."""
