"""From the numbers of each predicted token to those of a text: losses, divergences, bins, and what is compared.

S = sequences, T = predicted tokens, L = tokens of a sequence, F = facts of a token, K = bins.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tersely.calibrate import Sequences
from tersely.errors import DataError
from tersely.evaluation.statistics import paired, ratio
from tersely.evaluation.vocabulary import Vocabulary
from tersely.results import Bin, Divergence, Estimate, TextResult
from tersely.runtime import Loaded

FACTS = ("loss", "base_loss", "kl", "top1", "top5", "lost", "gained", "rank", "outside")
"""Of each predicted token."""
_APART = 0.1
"""Share of a document's bytes by which two tokenizers may see other parts of it."""
_RANKS = ((1, 1), (2, 5), (6, 10), (11, 100), (101, None))
_QUANTILES = ("0.5", "0.9", "0.99", "0.999", "1")
_ABOVE, _SHARE = (0.0, math.inf), (0.0, 1.0)
"""What an estimate can be: any number that is not negative, and a share."""


@dataclass(frozen=True, eq=False)
class Measured:
    """What a text gave, and the sums over each document that a comparison needs."""

    result: TextResult
    totals: tuple[float, ...]
    base_totals: tuple[float, ...]
    """Losses of the documents that could be compared; empty without a base."""
    sizes: tuple[int, ...]
    notes: tuple[str, ...]
    own: Mapping[int, tuple[float, int]]
    """Document -> the model's loss in nats, and the bytes that it is of."""
    unit: Literal["nats", "bits"] = "nats"
    """Of totals: nats, with tokens as sizes; or bits, with bytes."""


def perplexity(loss: float) -> float:
    """exp(loss), with loss in nats a token; inf where that is beyond a float."""
    return math.exp(loss) if loss < 700 else math.inf


def summarized(
    data: Sequences,
    order: Sequence[int],
    facts: dict[int, Tensor],
    models: Sequence[Loaded],
    ids: dict[int, Tensor] | None,
    vocabulary: Vocabulary,
    name: str,
    context: int,
    available: int,
    seed: int,
) -> Measured:
    """Everything that follows from the facts of the tokens."""
    sizes = [len(data.ids[i]) - 1 for i in order]
    totals = _totals([facts[i] for i in order])
    loss = ratio(totals[:, 0].tolist(), sizes, seed=seed, bounds=_ABOVE)
    both = [place for place, i in enumerate(order) if len(models) > 1 and (ids is None or i in ids)]
    compared = torch.cat([facts[order[place]] for place in both]) if both else None
    divergence = None
    if compared is not None:
        divergence = _divergence(totals[both], [sizes[place] for place in both], compared, vocabulary, seed)
    result = TextResult(
        text=name,
        kind=data.kind,
        sha256=_sha256(data, order),
        documents=len(order),
        available=available,
        tokens=sum(sizes),
        context=context,
        loss=loss,
        perplexity=perplexity(loss.value),
        bits_per_byte=ratio(
            (totals[:, 0] / math.log(2)).tolist(), [data.nbytes[i] for i in order], seed=seed, bounds=_ABOVE
        ),
        by_position=_bins(data, order, facts, both, _positions, seed),
        by_frequency=_bins(data, order, facts, both, _frequencies(data, order), seed),
        divergence=divergence,
    )
    return Measured(
        result,
        tuple(totals[both, 0].tolist()),
        tuple(totals[both, 1].tolist()),
        tuple(sizes[place] for place in both),
        _notes(result, models),
        {i: (float(totals[place, 0]), data.nbytes[i]) for place, i in enumerate(order)},
    )


def by_bytes(model: Measured, base: Measured, models: Sequence[Loaded]) -> Measured:
    """Losses of the same documents, cut by two tokenizers: bits a byte can be compared where tokens cannot. Those that
    are cut alike would not do: in a trimmed vocabulary they are the ones that lost nothing.

    A first token is not predicted, and a long document is cut off: where this leaves the two other bytes of a document,
    the base's bits are those of its own, at the size of the model's; one that differs by more than a tenth is left out.
    """
    both = [
        i
        for i, (_, size) in model.own.items()
        if i in base.own and abs(base.own[i][1] - size) <= _APART * size and base.own[i][1]
    ]
    if not both:
        raise DataError(
            f"{models[0].name} and {models[1].name} see other parts of every document; give a longer --context"
        )
    bits = math.log(2)
    alike = 0 if model.result.divergence is None else model.result.divergence.documents
    note = (
        f"the tokenizers of {models[0].name} and {models[1].name} cut {alike} of {len(model.own)} documents alike: "
        f"losses are compared by bits a byte, on {len(both)} documents; all else is of those that are cut alike"
    )
    return replace(
        model,
        totals=tuple(model.own[i][0] / bits for i in both),
        base_totals=tuple(base.own[i][0] / bits * model.own[i][1] / base.own[i][1] for i in both),
        sizes=tuple(model.own[i][1] for i in both),
        notes=(*model.notes, note),
        unit="bits",
    )


def _totals(facts: Sequence[Tensor]) -> Tensor:
    """Sums over each document, S x F float64."""
    return torch.stack([facts_LF.sum(0, dtype=torch.float64) for facts_LF in facts])


def _divergence(totals_SF: Tensor, sizes: list[int], facts_TF: Tensor, vocabulary: Vocabulary, seed: int) -> Divergence:
    column = {name: totals_SF[:, place].tolist() for place, name in enumerate(FACTS)}
    rank_T = facts_TF[:, FACTS.index("rank")]
    kl_T = facts_TF[:, FACTS.index("kl")].double().numpy()
    full = vocabulary.model_C is None

    def found(name: str, bounds: tuple[float, float]) -> Estimate:
        return ratio(column[name], sizes, seed=seed, bounds=bounds)

    return Divergence(
        vocabulary="full" if full else "shared",
        shared=vocabulary.shared,
        tokens=len(facts_TF),
        documents=len(sizes),
        base_loss=found("base_loss", _ABOVE),
        loss_difference=paired((totals_SF[:, 0] - totals_SF[:, 1]).tolist(), sizes, seed=seed)[0],
        kl=found("kl", _ABOVE),
        kl_quantiles={q: float(np.quantile(kl_T, float(q))) for q in _QUANTILES},
        top1_agreement=found("top1", _SHARE),
        top5_agreement=found("top5", _SHARE),
        lost=found("lost", _SHARE),
        gained=found("gained", _SHARE),
        rank={
            f"{low}" if low == high else f"{low}-{high or ''}": float(
                ((rank_T >= low) & (rank_T <= (high or math.inf))).double().mean()
            )
            for low, high in _RANKS
        },
        mean_reciprocal_rank=float((1 / rank_T.double()).mean()),
        outside=None if full else found("outside", _SHARE),
    )


def _positions(ids_L: Tensor) -> Tensor:
    """The place of each predicted token in its sequence; the first one, 0, is not predicted."""
    return torch.arange(1, len(ids_L))


def _frequencies(data: Sequences, order: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """How often each predicted token is predicted in all the data."""
    counts_V = torch.bincount(torch.cat([data.ids[i][1:] for i in order]))
    return lambda ids_L: counts_V[ids_L[1:]]


def _bins(
    data: Sequences,
    order: Sequence[int],
    facts: dict[int, Tensor],
    compared: Sequence[int],
    property_of: Callable[[Tensor], Tensor],
    seed: int,
) -> tuple[Bin, ...]:
    """Tokens sorted by a whole number from 1 up, in bins 1, 2-3, 4-7, ...: losses and KL of each."""
    bins_S = [torch.log2(property_of(data.ids[i]).double()).floor().long() for i in order]
    count = 1 + max(int(bins_L.max()) for bins_L in bins_S)
    sums_SKF = torch.zeros(len(order), count, 3, dtype=torch.float64)
    sizes_SK = torch.zeros(len(order), count, dtype=torch.int64)
    for place, (i, bins_L) in enumerate(zip(order, bins_S, strict=True)):
        sums_SKF[place].index_add_(0, bins_L, facts[i][:, :3].double())
        sizes_SK[place] = torch.bincount(bins_L, minlength=count)
    made = []
    for k in range(count):
        own = sizes_SK[:, k].nonzero().squeeze(1)
        if not len(own):
            continue
        both = [place for place in compared if sizes_SK[place, k]]
        shared = sizes_SK[both, k].tolist()
        made.append(
            Bin(
                first=2**k,
                last=2 ** (k + 1) - 1,
                tokens=int(sizes_SK[:, k].sum()),
                loss=ratio(sums_SKF[own, k, 0].tolist(), sizes_SK[own, k].tolist(), seed=seed, bounds=_ABOVE),
                base_loss=ratio(sums_SKF[both, k, 1].tolist(), shared, seed=seed, bounds=_ABOVE) if both else None,
                kl=ratio(sums_SKF[both, k, 2].tolist(), shared, seed=seed, bounds=_ABOVE) if both else None,
            )
        )
    return tuple(made)


def _notes(result: TextResult, models: Sequence[Loaded]) -> tuple[str, ...]:
    notes = []
    found = result.divergence
    if result.documents < result.available:
        notes.append(f"{result.documents} of {result.available} {result.kind} of {result.text} fitted into the time")
    if found is not None and found.documents < result.documents and result.kind == "windows":
        notes.append(
            f"the tokenizers of {models[0].name} and {models[1].name} cut {found.documents} of {result.documents} "
            "windows alike; only these are compared"
        )
    if found is not None and found.vocabulary == "shared":
        notes.append(
            f"the vocabularies differ: KL, agreement and ranks are over the {found.shared} tokens that both models have"
        )
    return tuple(notes)


def _sha256(data: Sequences, order: Sequence[int]) -> str:
    """Of the data, or of what was taken of them."""
    if list(order) == list(range(len(data.ids))):
        return data.sha256
    return hashlib.sha256(f"{data.sha256} {list(order)}".encode()).hexdigest()
