"""llama.cpp through llama-cpp-python: GGUF files as they are, on a CPU or a CUDA device.

Its C interface is called rather than the class Llama, which runs one sequence at a time. All sequences of a batch go
through one context; each has a cache of its own, as in llama.cpp's own server and benchmarks.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tersely.errors import CheckpointError, ResourceError, UsageError
from tersely.evaluation.engines import Engine, Ready, Task, Timed
from tersely.evaluation.engines.memory import DeviceMemory, resident

_lib: Any = importlib.import_module("llama_cpp")
_np: Any = importlib.import_module("numpy")
_TOKENS_AT_ONCE = 2048
"""Of a prompt, in a call; llama.cpp cuts them into pieces of 512. Both are the defaults of its benchmark."""
_CACHE_STEP = 256
"""The cache of a sequence is a multiple of so many tokens."""
_WARNING, _ERROR = 3, 4
"""Levels of llama.cpp's log."""


class LlamaCppEngine:
    """A GGUF file in a context for `batch` sequences of `length` tokens, whose cache is reserved from the start."""

    def __init__(self, path: Path, device: str, threads: int, batch: int, length: int) -> None:
        self._device_memory = None if device == "cpu" else DeviceMemory(device)
        self._said: list[str] = []
        self._log = _lib.llama_log_callback(self._hear)  # kept, since llama.cpp does not hold on to it
        _lib.llama_log_set(self._log, ctypes.c_void_p(0))
        _lib.llama_backend_init()
        params = _lib.llama_model_default_params()
        params.n_gpu_layers = 0
        if device != "cpu":
            if not _lib.llama_supports_gpu_offload():
                raise UsageError(f"--device {device}: llama-cpp-python was built without CUDA here; use --device cpu")
            params.n_gpu_layers = 2**31 - 1
            params.split_mode = _lib.LLAMA_SPLIT_MODE_NONE
            params.main_gpu = int(device.partition(":")[2] or 0)
        self._model = _lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise CheckpointError(
                f"{path}: llama.cpp cannot load it ({'; '.join(self._said[:2]) or 'it does not say why'}); "
                "it may be damaged, or of a kind that this version does not know"
            )
        if _lib.llama_model_has_encoder(self._model) or self._field("attention.causal") == "false":
            raise UsageError(f"{path}: only causal language models generate, and this one is none")
        vocabulary = _lib.llama_vocab_n_tokens(_lib.llama_model_get_vocab(self._model))
        positions = _lib.llama_model_n_ctx_train(self._model)
        if positions > 0:
            length = min(length, positions)
        self._vocabulary, self._batch = vocabulary, batch
        settings = _lib.llama_context_default_params()
        settings.n_seq_max = batch
        settings.n_ctx = batch * -(-length // _CACHE_STEP) * _CACHE_STEP
        settings.n_batch = max(_TOKENS_AT_ONCE, batch)
        settings.n_threads = settings.n_threads_batch = threads
        self._context = _lib.llama_init_from_model(self._model, settings)
        if not self._context:
            raise ResourceError(
                f"{path}: llama.cpp cannot make a cache for {batch} sequences of {length} tokens; "
                "ask for smaller batches or lengths"
            )
        self._tokens_at_once = settings.n_batch
        self._input = _lib.llama_batch_init(settings.n_batch, 0, 1)
        kind = self._format()
        self.ready = Ready(vocabulary, positions if positions > 0 else None, kind, kind)

    def run(self, prompts: Sequence[Sequence[int]], tokens: int) -> Timed:
        """See `Engine.run`. Raises ResourceError: llama.cpp gives up."""
        _lib.llama_memory_clear(_lib.llama_get_memory(self._context), False)
        _lib.llama_synchronize(self._context)
        length = len(prompts[0])
        at_once = self._tokens_at_once // len(prompts)
        start = time.perf_counter()
        for begin in range(0, length, at_once):
            end = min(length, begin + at_once)
            rows = self._feed([prompt[begin:end] for prompt in prompts], begin, end == length)
        chosen = [self._choose(rows)]
        first = time.perf_counter()
        for step in range(tokens):
            chosen.append(self._choose(self._feed([[token] for token in chosen[-1]], length + step, True)))
        last = time.perf_counter()
        return Timed(first - start, last - first, [list(ids) for ids in zip(*chosen, strict=True)])

    def memory(self) -> tuple[int, int]:
        """See `Engine.memory`."""
        return resident() if self._device_memory is None else self._device_memory()

    def _hear(self, level: int, text: bytes, _: object) -> None:
        """Pass warnings and errors of llama.cpp's log to stderr, and keep the errors."""
        if level in (_WARNING, _ERROR):
            sys.stderr.write(text.decode("utf-8", "replace"))
        if level == _ERROR:
            self._said.append(text.decode("utf-8", "replace").strip())

    def _feed(self, pieces: Sequence[Sequence[int]], position: int, choose: bool) -> list[int]:
        """Pass a piece of each sequence, of one length, through the model; the rows of the last tokens' logits."""
        batch, row, rows = self._input, 0, []
        for sequence, ids in enumerate(pieces):
            for offset, token in enumerate(ids):
                batch.token[row] = token
                batch.pos[row] = position + offset
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = sequence
                batch.logits[row] = choose and offset == len(ids) - 1
                row += 1
            rows.append(row - 1)
        batch.n_tokens = row
        status = _lib.llama_decode(self._context, batch)
        if status:
            raise ResourceError(f"llama.cpp gives up on {len(pieces)} sequences at position {position} ({status})")
        return rows

    def _choose(self, rows: Sequence[int]) -> list[int]:
        return [int(self._logits(row).argmax()) for row in rows]

    def _logits(self, row: int) -> Any:
        found = _lib.llama_get_logits_ith(self._context, row)
        return _np.ctypeslib.as_array(found, shape=(self._vocabulary,))

    def _field(self, name: str) -> str:
        """A field of the file, of the model's architecture; "" where it has none."""
        return self._text(f"{self._text('general.architecture')}.{name}")

    def _text(self, key: str) -> str:
        buffer = ctypes.create_string_buffer(256)
        size = _lib.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return "" if size < 0 else buffer.value.decode("utf-8", "replace")

    def _format(self) -> str:
        """llama.cpp's own name of the file's type: what it says of a model after its architecture and size."""
        buffer = ctypes.create_string_buffer(256)
        _lib.llama_model_desc(self._model, buffer, len(buffer))
        words = buffer.value.decode("utf-8", "replace").split(" ", 2)
        return words[-1].removeprefix("all ")


def load(task: Task) -> Engine:
    """Raises UsageError: no CUDA in this build, or no causal language model; CheckpointError, ResourceError."""
    return LlamaCppEngine(Path(task.path), task.device, task.threads, task.batch, task.length)
