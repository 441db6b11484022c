"""Plain transformers: the model's own forward with its own cache of keys and values.

B = sequences of a batch, L = tokens of a prompt, V = vocabulary.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM  # noqa: F401  (its import is not part of loading a model)

from tersely.errors import CheckpointError
from tersely.evaluation.engines import Engine, Ready, Task, Timed
from tersely.evaluation.engines.memory import resident
from tersely.runtime import find_device, load_model, max_positions
from tersely.runtime.packed import Packed


class TransformersEngine:
    """A causal language model. Only the logits of the last position are computed, where its forward can do that."""

    def __init__(self, network: Any, device: str) -> None:
        self._network, self._device = network, find_device(device)
        last = "logits_to_keep" in inspect.signature(network.forward).parameters
        self._last: dict[str, Any] = {"logits_to_keep": 1} if last else {}
        dtype = str(network.dtype).removeprefix("torch.")
        self.ready = Ready(
            vocabulary=network.config.get_text_config().vocab_size,
            positions=max_positions(network.config),
            dtype=dtype,
            format=_format(network, dtype),
            notes=()
            if last
            else ("prefill includes the logits of all positions: this model's forward gives no fewer",),
        )

    def run(self, prompts: Sequence[Sequence[int]], tokens: int) -> Timed:
        """See `Engine.run`. Raises CheckpointError: a model that keeps no cache of keys and values."""
        ids_BL = torch.tensor(prompts, device=self._device)
        self._wait()
        start = time.perf_counter()
        with torch.inference_mode():
            found = self._network(input_ids=ids_BL, use_cache=True, **self._last)
            cache = getattr(found, "past_key_values", None)
            if cache is None:
                raise CheckpointError("it keeps no cache of keys and values, so decoding cannot be timed")
            chosen = [found.logits[:, -1].argmax(-1, keepdim=True)]
            self._wait()
            first = time.perf_counter()
            for _ in range(tokens):
                found = self._network(input_ids=chosen[-1], past_key_values=cache, use_cache=True, **self._last)
                cache = found.past_key_values
                chosen.append(found.logits[:, -1].argmax(-1, keepdim=True))
            self._wait()
            end = time.perf_counter()
        return Timed(first - start, end - first, torch.cat(chosen, 1).tolist())

    def memory(self) -> tuple[int, int]:
        """See `Engine.memory`; on a CUDA device what PyTorch has allocated there."""
        if self._device.type == "cpu":
            return resident()
        return torch.cuda.memory_allocated(self._device), torch.cuda.max_memory_allocated(self._device)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def load(task: Task) -> Engine:
    """Raises as `runtime.load_model` does."""
    torch.set_num_threads(task.threads)
    dtype: Literal["auto"] | torch.dtype = "auto" if task.dtype == "auto" else getattr(torch, task.dtype)
    return TransformersEngine(load_model(task.path, device=task.device, dtype=dtype), task.device)


def _format(network: Any, dtype: str) -> str:
    """As what the weights were stored, where that is not how they lie in memory; then the dtype."""
    config = getattr(network.config, "quantization_config", None)
    if config is None:
        return dtype
    facts = config if isinstance(config, dict) else config.to_dict()
    named = [facts.get("format"), (facts.get("quantization_config") or {}).get("format"), facts.get("quant_method")]
    stored = str(next(name for name in [*named, "quantized"] if name))
    weights = network.state_dict().values()
    packed = any(isinstance(w, Packed) or (not w.is_floating_point() and w.ndim == 2) for w in weights)
    return stored if packed else f"{stored}, unpacked to {dtype}"
