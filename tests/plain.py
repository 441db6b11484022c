"""The plain forward: transformers alone, on the micro-batches that tersely runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tersely.calibrate import MicroBatch
from tests.tiny import load


def arguments(model: Any, batch: MicroBatch) -> dict[str, Tensor]:
    """What the model is given; a decoder gets the same tokens, shifted."""
    inputs = {"input_ids": batch.ids_BL}
    if model.config.is_encoder_decoder:
        start = torch.full_like(batch.ids_BL[:, :1], model.config.decoder_start_token_id)
        inputs["decoder_input_ids"] = torch.cat([start, batch.ids_BL[:, :-1]], dim=1)
    return inputs


@torch.no_grad()
def logits_of(path: Path, data: Sequence[MicroBatch], *, one_by_one: bool = False) -> list[Tensor]:
    """Logits by transformers alone; `one_by_one`: its loop over experts, not the forms that group them."""
    model: Any = load(path)
    if one_by_one:
        model.set_experts_implementation("eager")
    use_cache = {} if model.config.model_type == "bert" else {"use_cache": False}
    return [model(**arguments(model, batch), **use_cache).logits for batch in data]


def write_changed(source: Path, folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    """A copy of a single-file checkpoint with these tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", {"format": "pt"})
    return folder
