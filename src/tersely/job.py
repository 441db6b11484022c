"""A job, checked before any work begins: what will be done, to what, with what, at which cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tersely.calibrate import Sequences, read_text, sequences
from tersely.checkpoint import Checkpoint, open_checkpoint
from tersely.encoding import Format, stored_bytes
from tersely.errors import CheckpointError, UsageError
from tersely.export import compressed_tensors
from tersely.graph import Graph, read_graph
from tersely.methods import Encode
from tersely.plan.cost import Cost, estimate
from tersely.plan.recipe import Recipe, assign, load_recipe
from tersely.runtime import find_device, load_tokenizer


@dataclass(frozen=True)
class Job:
    """A checked job: what will be done, to what, with what, at which cost."""

    checkpoint: Checkpoint
    graph: Graph
    recipe: Recipe
    methods: Mapping[str, Encode]
    """Stored name -> method."""
    calibration: str | None
    data: Sequences | None
    out: Path
    format: Format
    device: torch.device
    dtype: torch.dtype
    """In which the calibration runs."""
    cost: Cost


def prepare(
    source: str | Path,
    recipe: str | Path | Recipe,
    out: str | Path,
    *,
    calibration: str | Path | None = None,
    format: Format = "compressed-tensors",
    device: str = "cpu",
) -> Job:
    """Check everything that can be checked before work begins, and estimate the cost; writes nothing."""
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    where = find_device(device)
    checkpoint = open_checkpoint(source)
    if "quantization_config" in checkpoint.config:
        method = checkpoint.config["quantization_config"].get("quant_method", "an unnamed method")
        raise CheckpointError(f"{checkpoint.path} is quantized already ({method}); start from the original checkpoint")
    graph = read_graph(checkpoint)
    methods = assign(recipe, graph)
    if format == "compressed-tensors":
        compressed_tensors.check(graph, methods)
    elif format != "dense":
        raise UsageError(f"format={format!r}: expected 'compressed-tensors' or 'dense'")
    dtype = _compute_dtype(graph, where)
    data = None
    if recipe.needs:
        if calibration is None:
            raise UsageError(
                "this recipe measures activations: give it text with --calibration FILE (a few hundred "
                "pages like what the model will be used on), or take a data-free preset such as w4a16"
            )
        tokenizer = load_tokenizer(checkpoint.path)
        data = sequences(
            read_text(calibration),
            tokenizer,
            context=min(recipe.calibration.context, _positions(checkpoint)),
            samples=recipe.calibration.samples,
            seed=recipe.seed,
            purpose="calibration",
            settings="--set calibration.",
        )
    elif calibration is not None:
        raise UsageError(
            f"--calibration {calibration} has no effect: no step of this recipe measures anything; leave it out, "
            "or take a recipe that does, such as w4a16-gptq"
        )
    cost = estimate(
        graph,
        methods,
        tokens=data.tokens if data else 0,
        output=_output_bytes(checkpoint, graph, methods, format),
        out=Path(out),
        dtype=dtype,
        device=where,
    )
    return Job(
        checkpoint,
        graph,
        recipe,
        methods,
        None if calibration is None else Path(calibration).name,
        data,
        Path(out),
        format,
        where,
        dtype,
        cost,
    )


def _output_bytes(checkpoint: Checkpoint, graph: Graph, methods: Mapping[str, Encode], format: Format) -> int:
    total = sum(checkpoint.spec(n).nbytes for n in checkpoint)
    if format == "dense":
        return total
    return total - sum(graph.weight(n).spec.nbytes - stored_bytes(graph.weight(n), m) for n, m in methods.items())


def _compute_dtype(graph: Graph, device: torch.device) -> torch.dtype:
    """The checkpoint's own dtype; float32 instead of float16 on a CPU, which has no fast half precision."""
    stored = next((w.spec.dtype for w in graph.weights if w.kind == "linear"), torch.float32)
    if not stored.is_floating_point or stored.itemsize < 2 or (stored == torch.float16 and device.type == "cpu"):
        return torch.float32
    return stored


def _positions(checkpoint: Checkpoint) -> int:
    """The longest sequence that the model takes, as far as its config says."""
    stated = (checkpoint.config.get(key) for key in ("max_position_embeddings", "n_positions"))
    return min((n for n in stated if isinstance(n, int) and n > 1), default=1 << 30)
