"""Log-likelihoods of tokens: requests as rows, what rows share run once, in micro-batches.

B = rows of a micro-batch, L = tokens of the longest, K = places in a row whose logits are wanted, V = vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tersely.errors import CheckpointError
from tersely.runtime import Loaded

_SHORTEST_PREFIX = 16
_WORTHWHILE = 256
"""Tokens that a shared prefix must save: about what one more forward pass costs."""


@dataclass(frozen=True)
class Ask:
    """A request as tokens: the log-likelihood of `last` tokens at the end of `ids`; cut: tokens lost on the left."""

    key: str
    ids: tuple[int, ...]
    last: int
    cut: int
    each: bool = False
    """Whether every token's is wanted, not their sum."""


@dataclass(eq=False)
class Row:
    """Input tokens (all but the last of `ids`) and what is asked of them."""

    ids: tuple[int, ...]
    asks: list[Ask] = field(default_factory=list)

    @property
    def wanted(self) -> int:
        """First place whose logits are wanted."""
        return len(self.ids) - max(ask.last for ask in self.asks)


class Likelihoods:
    """A language model that says how likely tokens are behind others. Log-softmax is float32."""

    def __init__(self, model: Loaded) -> None:
        self.model = model
        self.words: int = model.network.get_input_embeddings().weight.shape[0]
        self.shares: bool | None = None
        """Whether rows go on from one cache of their common beginning; None until it was tried."""
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.network.forward).parameters

    def grouped(self, asks: Sequence[Ask]) -> list[tuple[tuple[int, ...], list[Row]]]:
        """Rows by the beginning that they have in common, where that is worth computing once; first those without."""
        by_ids: dict[tuple[int, ...], Row] = {}
        for ask in asks:
            by_ids.setdefault(ask.ids[:-1], Row(ask.ids[:-1])).asks.append(ask)
        groups: list[tuple[int, list[Row]]] = []
        for row in sorted(by_ids.values(), key=lambda row: row.ids):
            if groups:
                length, members = groups[-1]
                common = min(_common(members[-1].ids, row.ids), row.wanted, length)
                if common >= _SHORTEST_PREFIX and len(members) * common >= (len(members) - 1) * length:
                    members.append(row)
                    groups[-1] = (common, members)
                    continue
            groups.append((row.wanted, [row]))
        shared, loose = [], []
        for length, members in groups:
            if (len(members) - 1) * length >= _WORTHWHILE and self._sharing():
                shared.append((members[0].ids[:length], members))
            else:
                loose += members
        return [((), loose), *shared]

    def _sharing(self) -> bool:
        if self.shares is None:
            self.shares = self._goes_on()
        return self.shares

    @torch.inference_mode()
    def _goes_on(self) -> bool:
        """Whether the model goes on from a cache that was copied as it goes on from the tokens: tried, not believed."""
        draw = torch.Generator().manual_seed(0)
        ids_BL = torch.randint(0, self.words, (2, 12), generator=draw)
        ids_BL[1, :8] = ids_BL[0, :8]
        ids_BL = ids_BL.to(self.model.device)
        past: Any = getattr(self._network(ids_BL[:1, :8], use_cache=True, keep=1), "past_key_values", None)
        if not _repeatable(past):
            return False
        own = copy.deepcopy(past)
        own.batch_repeat_interleave(2)
        whole_BKV = self._network(ids_BL, keep=4).logits[:, -4:].float()
        parts_BKV = self._network(ids_BL[:, 8:], past_key_values=own, use_cache=True, keep=4).logits.float()
        near = 1e-4 if self.model.network.dtype == torch.float32 else 0.1
        scale = float(whole_BKV.abs().max().clamp(min=1e-6))
        return bool((whole_BKV - parts_BKV).abs().max() <= near * scale)

    def begin(self, prefix: tuple[int, ...]) -> Any:
        """The model's cache behind these tokens."""
        return self._network(self._tensor([prefix]), use_cache=True, keep=1).past_key_values

    def score(self, batch: Sequence[Row], prefix: int, past: Any) -> dict[str, list[Any]]:
        """Log-likelihood (or each token's), whether all tokens are the likeliest, and `cut`, by the key of the ask.

        prefix: tokens of every row that `past` has; 0 where that is None. Raises CheckpointError for NaN.
        """
        ids = [row.ids[prefix:] for row in batch]
        first = min(row.wanted for row in batch) - prefix
        last = max(map(len, ids))
        if past is None:
            logits_BKV = self._network(self._tensor(ids), keep=last - first).logits
        else:
            own = copy.deepcopy(past)
            own.batch_repeat_interleave(len(batch))
            logits_BKV = self._network(self._tensor(ids), past_key_values=own, use_cache=True, keep=last - first).logits
        base = last - logits_BKV.shape[1] + prefix
        made: dict[str, list[Any]] = {}
        for row, logits_KV in zip(batch, logits_BKV, strict=True):
            scores_KV = logits_KV[row.wanted - base : len(row.ids) - base].float().log_softmax(-1)
            best_K = scores_KV.argmax(-1)
            for ask in row.asks:
                targets_K = torch.tensor(ask.ids[-ask.last :], device=scores_KV.device)
                values_K = scores_KV[-ask.last :].gather(1, targets_K[:, None])[:, 0]
                if bool(values_K.isnan().any()):
                    raise CheckpointError(
                        f"{self.model.name}: gives NaN; the weights are damaged, or {self.model.network.dtype} is "
                        "too narrow for them"
                    )
                greedy = bool((best_K[-ask.last :] == targets_K).all())
                made[ask.key] = [values_K.tolist() if ask.each else float(values_K.sum()), greedy, ask.cut]
        return made

    def _network(self, ids_BL: Tensor, *, keep: int, use_cache: bool = False, **more: Any) -> Any:
        """keep: logits of so many last places are enough."""
        given = {"logits_to_keep": keep} if self._keeps_logits else {}
        return self.model.network(input_ids=ids_BL, use_cache=use_cache, **given, **more)

    def _tensor(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Padded on the right: in a causal model later tokens do not touch earlier ones."""
        padded = [torch.tensor(row, dtype=torch.int64) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(padded, batch_first=True).to(self.model.device)


def batches(rows: list[Row], prefix: int, tokens: int) -> Iterator[list[Row]]:
    """Longest first, so that each has at most `tokens` tokens, prefix and padding included; one row at least."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        if batch and (len(batch) + 1) * len(batch[0].ids) > tokens:
            yield batch
            batch = []
        batch.append(row)
    assert all(len(row.ids) > prefix for row in batch)
    if batch:
        yield batch


def _repeatable(past: Any) -> bool:
    """Whether a model's state is keys and values alone, which transformers can repeat for several texts."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin

    return isinstance(past, DynamicCache) and all(
        isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin)
        for layer in past.layers
    )


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
