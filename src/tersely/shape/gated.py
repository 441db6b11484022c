"""A model with trained gates on its weights, at full size: what is cut where scores come from training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersely.calibrate import Sequences
from tersely.checkpoint import Checkpoint, open_checkpoint
from tersely.graph import Graph
from tersely.methods.cut.compresso import Compresso
from tersely.methods.tune.protocol import Progress
from tersely.runtime import load_model, load_tokenizer
from tersely.shape.gate_training import train_gates
from tersely.shape.gates import masked
from tersely.shape.structures import Place
from tersely.writer import Writer, replace_file


def gated_checkpoint(
    checkpoint: Checkpoint,
    graph: Graph,
    keep: Mapping[Place, int],
    data: Sequences,
    settings: Compresso,
    folder: Path,
    facts: Mapping[str, Any],
    *,
    device: torch.device,
    seed: int,
    resume: bool,
    say: Progress,
) -> tuple[Checkpoint, tuple[Tensor, ...], str]:
    """Train gates and adapters, and write the checkpoint with them to `folder`; what lies there whole is taken.

    keep: structures that are left of each place; all others are zero in what is written, so that a cut removes nothing
    that counts. Returns the checkpoint, the scores (log alpha) of each place in the order of `keep`, and what was
    gained. Raises as `train_gates` does.
    """
    record = folder.with_name(f"{folder.name}.json")
    if not (resume and folder.is_dir()):
        prompt = load_tokenizer(checkpoint.path)(settings.prompt)["input_ids"] if settings.prompt else ()
        network = load_model(checkpoint.path, device=str(device), dtype=torch.float32)
        found = train_gates(network, graph, keep, data.ids, settings, prompt=prompt, seed=seed, progress=say)
        del network
        note = (
            f"{settings.name}: {found.losses[0]:.4g} nats a token in the first step, {found.losses[-1]:.4g} in the last"
        )
        record.parent.mkdir(parents=True, exist_ok=True)
        plain = {"scores": [found.scores[place].tolist() for place in keep], "note": note}
        replace_file(record, (json.dumps(plain) + "\n").encode())
        writer = Writer(folder, facts, resume=resume)
        try:
            units = {"outside": "", **{f"block-{n:05d}": unit for n, unit in enumerate(graph.units)}}
            for name, unit in units.items():
                own = {w.name: found.weights.get(w.name, checkpoint[w.name]) for w in graph.unit(unit)}
                own |= masked(graph, own, found.values) | ({} if unit else {n: checkpoint[n] for n in graph.extra})
                specs = {n: checkpoint.spec(n).dtype for n in own}
                writer.put(name, {n: own[n].to(specs[n]).contiguous() for n in own}, {})
            companions = {name: checkpoint.path / name for name in checkpoint.companions}
            config = (json.dumps(checkpoint.config, indent=2, ensure_ascii=False) + "\n").encode()
            writer.finish(list(units), {**companions, "config.json": config})
        finally:
            writer.close()
    read = json.loads(record.read_text("utf-8"))
    return open_checkpoint(folder), tuple(torch.tensor(own) for own in read["scores"]), read["note"]
