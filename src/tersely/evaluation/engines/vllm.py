"""vLLM through its class LLM, offline, on one CUDA device.

The project's own tests have no such device: this module is checked against vLLM's documented interface and with a
stand-in for it, not by running vLLM.

vLLM does not say when it chose a first token, so that is the time of a call which ends there; decoding is the time of
a second call, which goes on for `tokens` more, minus that. Prefixes are not kept from one call to the next.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from typing import Any

from tersely.evaluation.engines import Engine, Ready, Task, Timed
from tersely.evaluation.engines.memory import DeviceMemory

_vllm: Any = importlib.import_module("vllm")


class VllmEngine:
    """A checkpoint folder. CUDA graphs and the rest are as vLLM chooses them."""

    def __init__(self, task: Task, positions: int | None) -> None:
        self._memory = DeviceMemory(task.device)
        longest = task.length + 1  # it counts the token that is chosen last, though nothing reads it
        self._llm = _vllm.LLM(
            model=task.path,
            dtype=task.dtype,
            max_model_len=longest if positions is None else min(longest, positions),
            max_num_seqs=task.batch,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            trust_remote_code=False,
            seed=0,
        )
        config = self._llm.llm_engine.model_config
        dtype = str(config.dtype).removeprefix("torch.")
        self.ready = Ready(
            vocabulary=config.get_vocab_size(),
            positions=None if positions is None else positions - 1,
            dtype=dtype,
            format=str(config.quantization or dtype),
            notes=(
                "vLLM takes a fixed share of the device for its cache, so its memory is not what the model needs",
                "vLLM's decoding is the time of a call with these tokens minus that of one which ends at the first",
            ),
        )

    def run(self, prompts: Sequence[Sequence[int]], tokens: int) -> Timed:
        """See `Engine.run`."""
        prefill, _ = self._call(prompts, 1)
        whole, ids = self._call(prompts, tokens + 1)
        return Timed(prefill, max(whole - prefill, 0.0), ids)

    def memory(self) -> tuple[int, int]:
        """See `Engine.memory`."""
        return self._memory()

    def _call(self, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, list[list[int]]]:
        params = _vllm.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        found = self._llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], params, use_tqdm=False)
        return time.perf_counter() - start, [list(each.outputs[0].token_ids) for each in found]


def load(task: Task) -> Engine:
    """Raises what vLLM raises."""
    from transformers import AutoConfig

    from tersely.runtime import max_positions

    config = AutoConfig.from_pretrained(task.path, local_files_only=True, trust_remote_code=False)
    return VllmEngine(task, max_positions(config))
