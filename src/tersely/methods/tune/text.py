"""Text that a model writes itself, and its grouping into micro-batches.

B sequences of a batch, L tokens of a sequence, V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tersely.calibrate import MicroBatch, Sequences, micro_batches
from tersely.methods.tune.protocol import Progress

_LOGITS = 1 << 25
"""Of a micro-batch, at most (a sequence that has more runs alone)."""
_MULTIPLE = 32
"""To which lengths are filled up: libraries keep what they prepare for each shape."""


@torch.no_grad()
def write_texts(
    network: nn.Module,
    first: Sequence[int],
    *,
    count: int,
    length: int,
    together: int,
    seed: int,
    progress: Progress | None = None,
) -> tuple[Tensor, ...]:
    """`count` sequences of 2 to `length` tokens, drawn from a causal model at temperature 1, `together` at a time.

    first: what the sequences begin with, taken in turns. A sequence ends before the model's end token, or before a
    new beginning of text; one that ends at once keeps that token.
    """
    draw = torch.Generator().manual_seed(seed)
    texts: list[Tensor] = []
    for start in range(0, count, together):
        begin = [first[i % len(first)] for i in range(start, min(start + together, count))]
        texts += _write(network, torch.tensor(begin), length, draw)
        if progress is not None:
            progress(f"the parent writes text {len(texts)} of {count}", len(texts) / count)
    return tuple(texts)


def _write(network: Any, first_B: Tensor, length: int, draw: torch.Generator) -> list[Tensor]:
    device = next(network.parameters()).device
    ends = _ends(network)
    texts = [[int(token)] for token in first_B]
    rows = torch.arange(len(first_B))
    ids_BL, cache = first_B[:, None], None
    for place in range(1, length):
        output = network(input_ids=ids_BL.to(device), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        likely_BV = output.logits[:, -1].float().softmax(-1).cpu()
        tokens_B = torch.multinomial(likely_BV, 1, generator=draw)[:, 0]
        goes_on = torch.ones_like(tokens_B, dtype=torch.bool)
        for i, (row, token) in enumerate(zip(rows.tolist(), tokens_B.tolist(), strict=True)):
            goes_on[i] = token not in ends
            if goes_on[i] or place == 1:
                texts[row].append(token)
        if not goes_on.any():
            break
        if not goes_on.all():
            kept = goes_on.nonzero()[:, 0]
            rows, tokens_B = rows[kept], tokens_B[kept]
            cache.batch_select_indices(kept.to(device))
        ids_BL = tokens_B[:, None]
    return [torch.tensor(text) for text in texts]


def _ends(network: Any) -> frozenset[int]:
    """Tokens after which another text begins."""
    found: set[int] = set()
    for config in (network.config, getattr(network, "generation_config", None)):
        for name in ("eos_token_id", "bos_token_id"):
            value = getattr(config, name, None)
            found |= set(value) if isinstance(value, list) else set() if value is None else {value}
    return frozenset(found)


def grouped(ids: Sequence[Tensor], tokens: int, longest: int) -> tuple[MicroBatch, ...]:
    """Sequences of a causal model in micro-batches of at most about `tokens`, padded on the right; none gets longer
    than `longest`, the longest sequence of all."""
    made = micro_batches(Sequences(tuple(ids), "documents", (0,) * len(ids), ""), tokens=tokens, pad=True)
    return tuple(_filled_up(batch, longest) for batch in made)


def micro_tokens(vocabulary: int, batch: int) -> int:
    """Tokens of a micro-batch, in steps of `batch` tokens: their logits must fit into memory."""
    return max(1, min(batch, _LOGITS // vocabulary))


def predicted(batch: MicroBatch) -> int:
    """Tokens that have one before them."""
    rows, length = batch.ids_BL.shape
    return rows * (length - 1) if batch.keep_BL is None else int(batch.keep_BL[:, 1:].sum())


def scheduled(texts: Sequence[Tensor], *, tokens: int, batch: int, micro: int, seed: int) -> list[list[MicroBatch]]:
    """Micro-batches of every step: the text in steps of about equal tokens, in a new order whenever it is through,
    until `tokens` were predicted."""
    order = torch.Generator().manual_seed(seed)
    longest = max(len(ids_L) for ids_L in texts)
    steps = [step.index for step in grouped(texts, batch, longest)]
    chosen: list[list[MicroBatch]] = []
    seen = 0
    while seen < tokens:
        for number in torch.randperm(len(steps), generator=order).tolist():
            own = grouped([texts[i] for i in steps[number]], micro, longest)
            chosen.append(list(own))
            seen += sum(predicted(each) for each in own)
            if seen >= tokens:
                break
    return chosen


def _filled_up(batch: MicroBatch, longest: int) -> MicroBatch:
    """Padded to a multiple of tokens, but not beyond the longest sequence of all."""
    length = batch.ids_BL.shape[1]
    missing = min(length + -length % _MULTIPLE, longest) - length
    if not missing:
        return batch
    keep_BL = torch.ones_like(batch.ids_BL, dtype=torch.bool) if batch.keep_BL is None else batch.keep_BL
    return MicroBatch(batch.index, pad(batch.ids_BL, (0, missing)), pad(keep_BL, (0, missing)))
