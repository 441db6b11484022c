"""SliceGPT as its authors have it, with a basis for each norm, computed at full width: what it would keep.

    python benchmarks/slicegpt_per_norm.py MODEL CALIBRATION.json EVALUATION.json TARGET

No stock model has the matrices that it puts into residual connections, so nothing is written. Cutting the stream to the
first K directions of a basis is projecting it on them: x -> x Q_K Q_K^T, the norm dividing by the size that it had.
Here that is done to the hidden states of a Llama (or a model built like one) by hooks, norm after norm, each basis from
the second moments of what the norm is given by the model that is projected up to there. K is chosen so that the sliced
model, its 2 L matrices of K x K included, has TARGET fewer parameters. Files hold lists of token ids. Prints JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

MULTIPLE = 8
TOGETHER = 8


def sliced_parameters(model: Any, kept: int) -> int:
    """Of the authors' model: everything that has a hidden coordinate is narrower, the head is stored on its own."""
    wide: int = model.config.hidden_size
    blocks = len(model.model.layers)
    whole: int = sum(p.numel() for name, p in model.named_parameters() if "norm" not in name)
    if model.config.tie_word_embeddings:
        whole += model.lm_head.weight.numel()
    return whole * kept // wide + 2 * blocks * kept * kept


def main() -> None:
    folder, calibration, evaluation, target = Path(sys.argv[1]), *map(Path, sys.argv[2:4]), float(sys.argv[4])
    # They come in eval mode.
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    parent: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole = sum(p.numel() for p in model.parameters())
    widths = range(MULTIPLE, model.config.hidden_size + 1, MULTIPLE)
    kept = min(widths, key=lambda k: abs(1 - sliced_parameters(model, k) / whole - target))
    bases: list[Tensor] = []
    seen = torch.zeros(model.config.hidden_size, model.config.hidden_size, dtype=torch.float64)
    junctions: list[int] = []

    def at(junction: int, hidden: Tensor) -> Tensor:
        """What passes a junction: projected where its basis is known, looked at where it is the next."""
        if junction < len(bases):
            return hidden @ bases[junction] @ bases[junction].t()
        if junction == len(bases):
            rows = hidden.reshape(-1, hidden.shape[-1]).double()
            seen.add_(rows.t() @ rows)
        return hidden

    for number, block in enumerate(model.model.layers):
        junctions += [2 * number, 2 * number + 1]
        state: dict[str, Tensor] = {}

        def enter(_: Any, args: Any, kwargs: Any, number: int = number, state: dict[str, Tensor] = state) -> Any:
            state["residual"] = at(2 * number, args[0])
            return (state["residual"], *args[1:]), kwargs

        def middle(_: Any, __: Any, output: Any, number: int = number, state: dict[str, Tensor] = state) -> Any:
            passed = at(2 * number + 1, state["residual"] + output[0])
            return (passed - state["residual"], *output[1:])

        block.register_forward_pre_hook(enter, with_kwargs=True)
        block.self_attn.register_forward_hook(middle)
    texts = sorted(json.loads(calibration.read_text("utf-8")), key=len)
    # Sequences of about one length run together, cut to the shortest of them.
    groups = [texts[i : i + TOGETHER] for i in range(0, len(texts), TOGETHER)]
    batches = [torch.tensor([ids[: len(group[0])] for ids in group]) for group in groups]
    with torch.no_grad():
        for _ in junctions:
            seen.zero_()
            for ids_BL in batches:
                model(ids_BL, use_cache=False)
            vectors = torch.linalg.eigh(seen).eigenvectors.flip(1)
            bases.append(vectors[:, :kept].float())
        loss = kl = same = 0.0
        count = 0
        for ids in json.loads(evaluation.read_text("utf-8")):
            ids_BL = torch.tensor([ids])
            new_LV, old_LV = (m(ids_BL, use_cache=False).logits[0, :-1].log_softmax(-1) for m in (model, parent))
            loss += cross_entropy(new_LV, ids_BL[0, 1:], reduction="sum").item()
            kl += (old_LV.exp() * (old_LV - new_LV)).sum().item()
            same += (new_LV.argmax(-1) == old_LV.argmax(-1)).sum().item()
            count += len(new_LV)
    fewer = 1 - sliced_parameters(model, kept) / whole
    found = {"loss": loss / count, "kl": kl / count, "top1": same / count, "fewer": fewer, "kept": kept}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
