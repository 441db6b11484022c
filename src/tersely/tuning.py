"""Tuning what is encoded, the model as a whole: the engine's side of distill, pv and maskllm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tersely.codecs import Encoded
from tersely.job import Job
from tersely.methods import TuneModel
from tersely.methods.tune import tune_model
from tersely.plan.recipe import Tuning
from tersely.runtime import load_model
from tersely.stored import Stored


def tune_whole(
    job: Job, stored: Stored, tunings: Sequence[Tuning], say: Callable[[str, float], None]
) -> tuple[dict[str, Encoded], dict[str, Tensor], str]:
    """Tune the encoded weights of a folder towards the model that was encoded.

    Returns every encoded weight, on the CPU; the small vectors that were tuned, by stored name; and what was gained.
    """
    assert job.data is not None
    encoded = {name: stored.encoded(name) for name in stored.entries}
    vectors: dict[str, Tensor] = {}
    notes = []
    network = load_model(job.checkpoint.path, device=str(job.device), dtype=torch.float32)
    for number, tuning in enumerate(tunings):
        method = tuning.method
        assert isinstance(method, TuneModel)
        chosen = {w.name for w in job.graph.select(tuning.where)}
        own: Mapping[str, Encoded] = {name: part for name, part in encoded.items() if name in chosen}
        # Another seed for each: the parent writes other texts.
        seed = job.recipe.seed + number
        found = tune_model(network, job.graph, own, job.data.ids, method, vectors=vectors, seed=seed, progress=say)
        encoded |= found.best.encoded
        vectors |= {name: value.cpu() for name, value in found.best.vectors.items()}
        measure = "KL from the source" if method.loss == "parent" else "loss"
        notes.append(
            f"{method.name}: {measure} on held-out calibration text {found.before:.4g} before, "
            f"{found.after:.4g} nats a token after"
        )
    return encoded, vectors, "; ".join(notes)
