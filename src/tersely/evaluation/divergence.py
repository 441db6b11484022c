"""Loss on a text, and divergence from a base model on the same tokens.

Streamed: of the logits only those of one micro-batch exist, of each predicted token a few numbers are kept.

S = sequences, T = predicted tokens, B = sequences of a micro-batch, L = tokens of a sequence, V = vocabulary, F = facts
of a token.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tersely.calibrate import MicroBatch, Sequences, micro_batches, sequences
from tersely.errors import CheckpointError, DataError
from tersely.evaluation.distributions import as_float32, compare, cuts, workspace
from tersely.evaluation.statistics import paired, ratio
from tersely.evaluation.vocabulary import Vocabulary, match
from tersely.results import Bin, Divergence, Estimate, TextResult
from tersely.runtime import Loaded, context_within, quiet, text_logits

_DEFAULT_CONTEXT = 2048
_FACTS = ("loss", "base_loss", "kl", "top1", "top5", "lost", "gained", "rank", "outside")
_PILOT_TOKENS = 2048
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


def measure_text(
    models: Sequence[Loaded],
    content: str,
    name: str,
    *,
    context: int | None = None,
    samples: int | None = None,
    tokens_per_batch: int = 4096,
    budget: float | None = None,
    seed: int = 0,
    unfinished: MutableMapping[str, bytes] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Measured:
    """Measure a causal language model, models[0], on a text, against models[1] if there is one.

    The first token of a document or window is predicted from nothing and does not count. Losses are float32
    log-softmax of the logits. Rows are padded on the right and run without a mask: in a causal model later tokens do
    not touch earlier ones, and what the padding predicts is not counted.

    Where the vocabularies differ, tokens are matched by their text: documents that both tokenizers cut alike are
    compared, over the tokens that both know (see `Divergence`). Where some are cut otherwise, the losses of all are
    compared, by the byte. budget: seconds; sequences are then drawn by `seed`, as many as fit. unfinished: what is
    measured already, by micro-batch; it is filled as the work goes on.

    Raises UsageError: a bad number; DataError: the text, or models that share nothing; CheckpointError: a model that
    gives NaN.
    """
    start = time.monotonic()
    context = context_within(context, [model.network for model in models], _DEFAULT_CONTEXT)
    tokenizers = list(dict.fromkeys(model.tokenizer for model in models))  # models may share one
    tokenized = [
        sequences(
            content, tokenizer, context=context, samples=samples, seed=seed, purpose="the evaluation", at_most=True
        )
        for tokenizer in tokenizers
    ]
    data = tokenized[0]
    available = len(data.ids)
    vocabulary, ids = match(models, tokenized)
    unlike = ids is not None and len(ids) < available and data.kind == "documents"
    if unlike:
        budget = None if budget is None else budget / 2
    order = list(range(available))
    if budget is not None:
        random.Random(seed).shuffle(order)
    facts: dict[int, Tensor] = {}
    finished = 0

    def run(chosen: Sequence[int]) -> None:
        nonlocal finished
        compared = [i for i in chosen if ids is None or i in ids]
        for subset, pair in ((compared, models), ([i for i in chosen if i not in set(compared)], models[:1])):
            part = Sequences(tuple(data.ids[i] for i in subset), data.kind, tuple(data.nbytes[i] for i in subset), "")
            for batch in micro_batches(part, tokens=tokens_per_batch, pad=True) if subset else ():
                index = [subset[i] for i in batch.index]
                base = None if ids is None or len(pair) < 2 else [ids[i] for i in index]
                for i, facts_LF in zip(
                    index, _remembered(unfinished, pair, batch, base, index, vocabulary), strict=True
                ):
                    facts[i] = facts_LF
                _require_finite(models, facts, index, data.kind)
                finished += sum(len(data.ids[i]) for i in index)
                if progress is not None:
                    progress(min(1.0, finished / max(1, wanted)) / (1 + unlike))

    wanted = data.tokens
    if budget is None:
        run(order)
    else:
        count = _count(unfinished, order, data, budget - (time.monotonic() - start), run)
        wanted = sum(len(data.ids[i]) for i in order[:count])
        run([i for i in order[:count] if i not in facts])
        order = sorted(order[:count])
    measured = _measured(data, order, facts, models, ids, vocabulary, name, context, available, seed)
    if not unlike:
        return measured
    base = measure_text(
        models[1:],
        content,
        name,
        context=context,
        samples=samples,
        tokens_per_batch=tokens_per_batch,
        budget=budget,
        seed=seed,
        progress=None if progress is None else lambda share: progress(0.5 + share / 2),
    )
    return _by_bytes(measured, base, models)


def _count(
    done: MutableMapping[str, bytes] | None,
    order: Sequence[int],
    data: Sequences,
    seconds: float,
    run: Callable[[Sequence[int]], None],
) -> int:
    """How many sequences fit into the time: by a few that are timed, after one that warms up; at least those."""
    if done is not None and "text count" in done:
        return int(done["text count"])
    begin = time.monotonic()
    run(order[:1])
    pilot = 1
    tokens = 0
    while pilot < len(order) and tokens < _PILOT_TOKENS:
        tokens += len(data.ids[order[pilot]])
        pilot += 1
    timed = time.monotonic()
    run(order[1:pilot])
    now = time.monotonic()
    room = max(0.0, 0.95 * seconds - (now - begin)) * tokens / max(now - timed, 1e-9)
    count = pilot
    while count < len(order) and (room := room - len(data.ids[order[count]])) >= 0:
        count += 1
    if done is not None:
        done["text count"] = str(count).encode()
    return count


def _remembered(
    done: MutableMapping[str, bytes] | None,
    models: Sequence[Loaded],
    batch: MicroBatch,
    base_ids: Sequence[Tensor] | None,
    index: Sequence[int],
    vocabulary: Vocabulary,
) -> list[Tensor]:
    """The facts of each row of a micro-batch, L - 1 x F float32, from an earlier run where it has them."""
    lengths = [
        int(n) - 1
        for n in (batch.keep_BL.sum(1) if batch.keep_BL is not None else [batch.ids_BL.shape[1]] * len(index))
    ]
    key = "text " + hashlib.sha256(json.dumps([list(index), lengths]).encode()).hexdigest()
    if done is not None and key in done:
        facts_TF = torch.from_numpy(np.frombuffer(done[key], np.float32).reshape(-1, len(_FACTS)).copy())
    else:
        facts_TF = _measure(models, batch, base_ids, vocabulary)
        if done is not None:
            done[key] = facts_TF.numpy().tobytes()
    return list(torch.split(facts_TF, lengths))


def _measure(
    models: Sequence[Loaded], batch: MicroBatch, base_ids: Sequence[Tensor] | None, vocabulary: Vocabulary
) -> Tensor:
    """The facts of the predicted tokens of a micro-batch, row after row without padding, T x F float32."""
    device = torch.device(models[0].device)
    inputs = [batch.ids_BL.to(device)] * len(models)
    if base_ids is not None:
        inputs[1] = torch.nn.utils.rnn.pad_sequence(list(base_ids), batch_first=True).to(device)
    length = batch.ids_BL.shape[1]
    lengths = [length] * len(batch.index) if batch.keep_BL is None else batch.keep_BL.sum(1).tolist()
    columns = [None if c is None else c.to(device) for c in (vocabulary.model_C, vocabulary.base_C)]
    with quiet(), torch.inference_mode():
        logits = [text_logits(model.network, ids_BL) for model, ids_BL in zip(models, inputs, strict=True)]
        widest = max(each_BLV.shape[-1] for each_BLV in logits)
        space = workspace(widest, device, 4)
        compared = []
        for row, tokens in enumerate(lengths):
            for cut in cuts(tokens - 1, widest, device):
                piece = [as_float32(each_BLV[row, cut], own) for each_BLV, own in zip(logits, space, strict=False)]
                targets = [ids_BL[row, 1:][cut] for ids_BL in inputs]
                compared.append(compare(piece, targets, columns, space[2:]))
        return _facts([torch.cat(each) for each in zip(*compared, strict=True)]).cpu()


def _facts(compared: list[Tensor]) -> Tensor:
    """The facts of each token from what `compare` gave, T x F float32; without a base all but the first are zero."""
    facts_TF = compared[0].new_zeros(len(compared[0]), len(_FACTS))
    facts_TF[:, 0] = compared[0]
    if len(compared) == 1:
        return facts_TF
    _, base_loss_T, kl_T, outside_T, top_TK, base_top_TK, truth_T, far_T = compared
    same_TKK = top_TK[:, :, None] == base_top_TK[:, None, :]
    right_T, base_right_T = top_TK[:, 0] == truth_T, base_top_TK[:, 0] == truth_T
    facts = (
        base_loss_T,
        kl_T,
        same_TKK[:, 0, 0],
        same_TKK.sum((1, 2)) / top_TK.shape[1],
        base_right_T & ~right_T,
        right_T & ~base_right_T,
        torch.where(far_T > 0, far_T, 1 + same_TKK[:, :, 0].int().argmax(1)),
        outside_T,
    )
    for place, fact_T in enumerate(facts, start=1):
        facts_TF[:, place] = fact_T
    return facts_TF


def _require_finite(models: Sequence[Loaded], facts: dict[int, Tensor], index: Sequence[int], kind: str) -> None:
    what = kind.removesuffix("s")
    for i in index:
        finite = facts[i].isfinite().all(0).tolist()
        for model, fine in zip(models, finite, strict=False):
            if not fine:
                raise CheckpointError(
                    f"{model.name}: the model gives NaN or infinite losses on {what} {i}; "
                    "its weights are broken or its dtype overflows: try dtype=float32, or compress it again"
                )
        if not finite[_FACTS.index("kl")]:
            raise CheckpointError(
                f"{models[0].name}: on {what} {i} the model gives no chance to tokens that {models[1].name} allows "
                "(infinite KL); evaluate without a base"
            )


def _measured(
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


def _by_bytes(model: Measured, base: Measured, models: Sequence[Loaded]) -> Measured:
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
    column = {name: totals_SF[:, place].tolist() for place, name in enumerate(_FACTS)}
    rank_T = facts_TF[:, _FACTS.index("rank")]
    kl_T = facts_TF[:, _FACTS.index("kl")].double().numpy()
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
