"""Load a checkpoint folder with transformers and run it. Imports transformers only when called."""

from tersely.runtime.loading import (
    Kind,
    Loaded,
    context_within,
    find_device,
    load_model,
    load_tokenizer,
    load_tokenizers,
    max_positions,
    model_kind,
    quiet,
    read_config,
    require_causal,
)
from tersely.runtime.writing import generate, text_logits, write

__all__ = [
    "Kind",
    "Loaded",
    "context_within",
    "find_device",
    "generate",
    "load_model",
    "load_tokenizer",
    "load_tokenizers",
    "max_positions",
    "model_kind",
    "quiet",
    "read_config",
    "require_causal",
    "text_logits",
    "write",
]
