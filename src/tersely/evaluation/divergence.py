"""Loss on a text, and divergence from a base model on the same tokens.

B = sequences of a micro-batch, L = tokens of a sequence, R = rows (predicted tokens) worked on at once,
V = vocabulary.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tersely.calibrate import MicroBatch, Sequences, micro_batches, read_text, sequences
from tersely.errors import CheckpointError, DataError, UsageError
from tersely.evaluation.statistics import Estimate, ratio
from tersely.runtime import load_model, load_tokenizer, max_positions, model_kind, quiet

# Of one float32 R x V tensor. On a CPU what fits its cache is three times faster; an accelerator wants more.
_CHUNK_BYTES_CPU, _CHUNK_BYTES_ACCELERATOR = 4 * 2**20, 64 * 2**20
_DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class Evaluation:
    """What was measured, on what and how. Fields against a base are None where none was given.

    sha256 names the data (see `calibrate.Sequences`); tokens are the predicted ones; dtype is the model's.
    loss: nats a token; perplexity = exp(loss); bits_per_byte: of the text that the predicted tokens stand
    for. loss_difference: loss - base_loss, paired. kl: mean over tokens of KL(base || model) = sum over the
    vocabulary of p_base * (log p_base - log p_model), nats. top1_agreement: share of tokens where both find
    the same token most likely. seconds is not compared.
    """

    model: str
    base: str | None
    text: str
    kind: Literal["documents", "windows"]
    sha256: str
    documents: int
    tokens: int
    context: int
    dtype: str
    device: str
    loss: Estimate
    perplexity: float
    bits_per_byte: Estimate
    base_loss: Estimate | None = None
    loss_difference: Estimate | None = None
    kl: Estimate | None = None
    top1_agreement: Estimate | None = None
    seconds: float = field(default=0.0, compare=False)

    def to_json(self) -> str:
        """As JSON; an infinite number is written as null."""
        return json.dumps(_without_infinity(asdict(self)), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Evaluation":
        """The inverse of `to_json`. Raises DataError: not the JSON of an Evaluation."""
        try:
            facts = json.loads(text)
            for name in [f.name for f in fields(cls) if "Estimate" in str(f.type)]:
                if facts[name] is not None:
                    facts[name] = Estimate(**_with_infinity(facts[name]))
            return cls(**_with_infinity(facts, "perplexity"))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"not an evaluation ({error!r}); expected what Evaluation.to_json wrote") from error


def perplexity(loss: float) -> float:
    """exp(loss), with loss in nats a token; inf where that is beyond a float."""
    return math.exp(loss) if loss < 700 else math.inf


def evaluate(
    model: str | Path,
    text: str | Path,
    *,
    against: str | Path | None = None,
    context: int | None = None,
    samples: int | None = None,
    tokens_per_batch: int = 4096,
    device: str = "cpu",
    dtype: Literal["auto"] | torch.dtype = "auto",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure a causal language model on a text, and its divergence from a base model on the same tokens.

    text: a file, or some of its documents: `sample.txt[-200:]`; context, samples, seed: see
    `calibrate.sequences`; context is by default the model's positions, at most 2048. The first token of a
    document or window is predicted from nothing and does not count. Losses are float32 log-softmax of the
    logits; standard errors are over documents or windows (`statistics.ratio`).

    Rows are padded on the right and run without a mask: in a causal model later tokens do not touch earlier
    ones, and what the padding predicts is not counted. Memory: the models, and the logits of one micro-batch
    (tokens_per_batch x V) for each. progress(done, all) is called after each micro-batch with sequences.

    Raises UsageError: not a causal language model, or a bad number; DataError: the text, or models whose
    vocabularies differ; CheckpointError: a model that cannot be loaded or gives NaN.
    """
    start = time.monotonic()
    folders = [Path(model)] + ([] if against is None else [Path(against)])
    for folder in folders:
        if (kind := model_kind(folder)) != "causal":
            raise UsageError(
                f"{folder}: only causal language models are evaluated, this one is {kind}; "
                "give a checkpoint such as LlamaForCausalLM"
            )
    content = read_text(text)
    networks = [load_model(folder, device=device, dtype=dtype) for folder in folders]
    context = _context(context, networks)
    tokenized = [
        sequences(content, load_tokenizer(f), context=context, samples=samples, seed=seed, purpose="the evaluation")
        for f in folders
    ]
    data = tokenized[0]
    if len(folders) == 2:
        _require_same_vocabulary(folders, networks, tokenized)
    sums_SF = torch.zeros(len(data.ids), 4, dtype=torch.float64)
    done = 0
    for batch in micro_batches(data, tokens=tokens_per_batch, pad=True):
        index = list(batch.index)
        sums_SF[index] = _measure(networks, batch, device)
        _require_finite(folders, sums_SF, index, data)
        done += len(index)
        if progress is not None:
            progress(done, len(data.ids))
    loss_S, base_S, kl_S, agree_S = (column.tolist() for column in sums_SF.T)
    sizes = [len(ids_L) - 1 for ids_L in data.ids]
    loss = ratio(loss_S, sizes)
    paired: dict[str, Estimate] = {}
    if against is not None:
        differences = [mine - base for mine, base in zip(loss_S, base_S, strict=True)]
        paired = {
            "base_loss": ratio(base_S, sizes),
            "loss_difference": ratio(differences, sizes),
            "kl": ratio(kl_S, sizes),
            "top1_agreement": ratio(agree_S, sizes),
        }
    return Evaluation(
        model=str(model),
        base=None if against is None else str(against),
        text=str(text),
        kind=data.kind,
        sha256=data.sha256,
        documents=len(data.ids),
        tokens=sum(sizes),
        context=context,
        dtype=str(networks[0].dtype).removeprefix("torch."),
        device=device,
        loss=loss,
        perplexity=perplexity(loss.value),
        bits_per_byte=ratio([total / math.log(2) for total in loss_S], data.nbytes),
        seconds=time.monotonic() - start,
        **paired,
    )


def _context(context: int | None, networks: list[Any]) -> int:
    limits = [limit for network in networks if (limit := max_positions(network.config)) is not None]
    if context is None:
        return min([*limits, _DEFAULT_CONTEXT])
    if limits and context > min(limits):
        raise UsageError(f"context={context} exceeds the model's {min(limits)} positions; use at most that")
    return context


def _require_same_vocabulary(folders: list[Path], networks: list[Any], tokenized: list[Sequences]) -> None:
    model, base = folders
    sizes = [network.config.get_text_config().vocab_size for network in networks]
    if sizes[0] != sizes[1]:
        raise DataError(
            f"{model} has a vocabulary of {sizes[0]} and {base} one of {sizes[1]}: their predictions cannot "
            "be compared token by token; evaluate each alone and compare bits_per_byte"
        )
    mine, theirs = (data.ids for data in tokenized)
    same = len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))
    if not same:
        raise DataError(
            f"the tokenizers of {model} and {base} cut this text differently: predictions cannot be compared "
            "token by token; give both the same tokenizer, or evaluate each alone and compare bits_per_byte"
        )


def _measure(networks: list[Any], batch: MicroBatch, device: str) -> Tensor:
    """Sums over the predicted tokens of each row, B x 4, float64: loss, base loss, KL, agreement."""
    ids_BL = batch.ids_BL.to(device)
    rows, length = ids_BL.shape[0], ids_BL.shape[1] - 1
    targets_R = ids_BL[:, 1:].reshape(-1)
    with quiet(), torch.inference_mode():
        logits = [network(input_ids=ids_BL, use_cache=False).logits for network in networks]
        V = logits[0].shape[-1]
        on_cpu = torch.device(device).type == "cpu"
        step = max(1, (_CHUNK_BYTES_CPU if on_cpu else _CHUNK_BYTES_ACCELERATOR) // (4 * V))
        sums_BF = torch.zeros(rows, 4, dtype=torch.float64)
        keep_BL = torch.ones(rows, length, dtype=torch.bool) if batch.keep_BL is None else batch.keep_BL[:, 1:]
        kept_K = keep_BL.reshape(-1).nonzero().squeeze(1)
        for chunk_R in torch.split(kept_K, step):
            b_R, l_R = chunk_R // length, chunk_R % length
            rows_RV = [each_BLV[b_R.to(device), l_R.to(device)].float() for each_BLV in logits]
            facts_RF = _divergence(rows_RV, targets_R[chunk_R.to(device)])
            sums_BF.index_add_(0, b_R, facts_RF.double().cpu())
    return sums_BF


def _divergence(logits_RV: list[Tensor], targets_R: Tensor) -> Tensor:
    """Loss, base loss, KL(base || model) and agreement of each row, R x 4, float32; zeros without a base."""
    log_p_RV = [each_RV.log_softmax(dim=-1) for each_RV in logits_RV]
    losses = [-each_RV.gather(1, targets_R[:, None]).squeeze(1) for each_RV in log_p_RV]
    if len(logits_RV) == 1:
        nothing_R = torch.zeros_like(losses[0])
        return torch.stack([losses[0], nothing_R, nothing_R, nothing_R], dim=1)
    model_RV, base_RV = log_p_RV
    agree_R = (logits_RV[0].argmax(-1) == logits_RV[1].argmax(-1)).float()
    kl_R = (base_RV.exp() * (base_RV - model_RV)).sum(-1)
    return torch.stack([*losses, kl_R, agree_R], dim=1)


def _require_finite(folders: list[Path], sums_SF: Tensor, index: list[int], data: Sequences) -> None:
    what = data.kind.removesuffix("s")
    for i in index:
        for folder, total in zip(folders, sums_SF[i, :2].tolist(), strict=False):
            if not math.isfinite(total):
                raise CheckpointError(
                    f"{folder}: the model gives NaN or infinite losses on {what} {i}; "
                    "its weights are broken or its dtype overflows: try dtype=float32, or compress it again"
                )
        if not math.isfinite(float(sums_SF[i, 2])):
            raise CheckpointError(
                f"{folders[0]}: on {what} {i} the model gives no chance to tokens that {folders[-1]} allows "
                "(infinite KL); evaluate without a base"
            )


def _without_infinity(facts: Any) -> Any:
    if isinstance(facts, dict):
        return {name: _without_infinity(value) for name, value in facts.items()}
    return None if facts == math.inf else facts


def _with_infinity(facts: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: math.inf if facts[name] is None and name in (names or facts) else facts[name] for name in facts}
