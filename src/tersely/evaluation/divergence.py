"""Loss on a text, and divergence from a base model on the same tokens.

Streamed: of the logits only those of one micro-batch exist, of each predicted token a few numbers are kept.

S = sequences, T = predicted tokens, B = sequences of a micro-batch, L = tokens of a sequence, V = vocabulary, F = facts
of a token.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, MutableMapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tersely.calibrate import MicroBatch, Sequences, micro_batches, sequences
from tersely.errors import CheckpointError
from tersely.evaluation.distributions import as_float32, compare, cuts, workspace
from tersely.evaluation.text_result import FACTS, Measured, by_bytes, summarized
from tersely.evaluation.vocabulary import Vocabulary, match
from tersely.runtime import Loaded, context_within, quiet, text_logits

_DEFAULT_CONTEXT = 2048
_PILOT_TOKENS = 2048


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
    measured = summarized(data, order, facts, models, ids, vocabulary, name, context, available, seed)
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
    return by_bytes(measured, base, models)


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
        facts_TF = torch.from_numpy(np.frombuffer(done[key], np.float32).reshape(-1, len(FACTS)).copy())
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
    facts_TF = compared[0].new_zeros(len(compared[0]), len(FACTS))
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
        if not finite[FACTS.index("kl")]:
            raise CheckpointError(
                f"{models[0].name}: on {what} {i} the model gives no chance to tokens that {models[1].name} allows "
                "(infinite KL); evaluate without a base"
            )
