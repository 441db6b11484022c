"""llama.cpp as the tests use it: the logits of a GGUF file, and its tokens. Import it after `importorskip`."""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

_lib: Any = importlib.import_module("llama_cpp")
_F32 = 0
_NO_FLASH = 0
_HEARD: list[str] = []


@_lib.llama_log_callback  # type: ignore[untyped-decorator]
def _hear(level: int, text: bytes, _: object) -> None:  # noqa: ARG001 (what llama.cpp calls)
    _HEARD.append(text.decode("utf-8", "replace"))


class LlamaFile:
    """A GGUF file in llama.cpp, with a cache in float32, on one thread."""

    def __init__(self, path: Path) -> None:
        _HEARD.clear()
        _lib.llama_log_set(_hear, ctypes.c_void_p(0))
        _lib.llama_backend_init()
        self._model = _lib.llama_model_load_from_file(os.fsencode(path), _lib.llama_model_default_params())
        assert self._model, _HEARD
        self._vocab = _lib.llama_model_get_vocab(self._model)

    def __enter__(self) -> LlamaFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _lib.llama_model_free(self._model)

    def logits(self, ids: Sequence[int], context: int = 256) -> Tensor:
        """(tokens, vocabulary), float32."""
        settings = _lib.llama_context_default_params()
        settings.n_ctx = context
        settings.n_threads = settings.n_threads_batch = 1
        settings.type_k = settings.type_v = _F32
        settings.flash_attn_type = _NO_FLASH
        running = _lib.llama_init_from_model(self._model, settings)
        batch = _lib.llama_batch_init(len(ids), 0, 1)
        for place, token in enumerate(ids):
            batch.token[place] = token
            batch.pos[place] = place
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = 0
            batch.logits[place] = 1
        batch.n_tokens = len(ids)
        assert _lib.llama_decode(running, batch) == 0, _HEARD
        width = _lib.llama_vocab_n_tokens(self._vocab)
        rows = [np.ctypeslib.as_array(_lib.llama_get_logits_ith(running, i), (width,)) for i in range(len(ids))]
        logits_LV = torch.from_numpy(np.stack(rows))
        _lib.llama_batch_free(batch)
        _lib.llama_free(running)
        return logits_LV

    def tokens(self, text: str) -> list[int]:
        """As it cuts a prompt: special tokens around it, none read in it."""
        data = text.encode()
        room = (_lib.llama_token * (len(data) + 8))()
        return list(room[: _lib.llama_tokenize(self._vocab, data, len(data), room, len(room), True, False)])

    def metadata(self, key: str) -> str:
        buffer = ctypes.create_string_buffer(1 << 12)
        size = _lib.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        assert size >= 0, key
        return buffer.value.decode()
