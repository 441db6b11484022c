"""transformers' own model of a checkpoint, without its weights."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from tersely.checkpoint import Checkpoint
from tersely.errors import CheckpointError
from tersely.graph import Graph


def build(checkpoint: Checkpoint, graph: Graph, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' own model of the checkpoint: parameters on the meta device, buffers real."""
    import transformers

    config = transformers.AutoConfig.for_model(**deepcopy(checkpoint.config))
    auto = getattr(transformers, f"AutoModelFor{graph.family.auto_class}")
    with torch.device("meta"):
        # Experts one by one: the stacked forms hide which tokens each of them sees.
        experts = {"experts_implementation": "eager"} if graph.has_experts else {}
        model = auto.from_config(config, dtype=dtype, **experts)
    model.eval()
    model.tie_weights()
    for name, module in model.named_modules():
        own = {n: b for n, b in module._buffers.items() if b is not None and b.is_meta}
        for n, b in own.items():
            fill = torch.nan if b.is_floating_point() else torch.iinfo(b.dtype).min if b.dtype != torch.bool else False
            module._buffers[n] = torch.full(b.shape, fill, dtype=b.dtype, device=device)
        if own:
            with torch.no_grad():
                model._init_weights(module)
        for n in own:
            value = module._buffers[n]
            if value is not None and value.is_floating_point() and value.isnan().any():
                raise CheckpointError(f"{checkpoint.path}: transformers does not say how to fill the buffer {name}.{n}")
    return model


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Make it the parameter or the buffer of this name."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if isinstance(value, nn.Parameter):
        owner._parameters[leaf] = value
    else:
        owner._buffers[leaf] = value
