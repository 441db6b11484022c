"""Passes of a network in which sites are swapped, and the KL divergence from the base that they give.

The network that runs is recorded once for each micro-batch. A site in block i is then measured by a pass in which the
blocks before i answer with what they gave in the record, so that it costs the blocks from i on, and the head.

B = sequences of a micro-batch, L = tokens of a sequence, R = tokens worked on at once, V = vocabulary, D = hidden size.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tersely.calibrate import Sequences, micro_batches
from tersely.errors import CheckpointError
from tersely.evaluation.distributions import as_float32, cuts, distribution, divergence, workspace
from tersely.evaluation.swapping import Differences, Networks, Swap, instead, replaced, watched
from tersely.runtime import quiet, text_logits

KEPT_BYTES = 2**30
"""Bound on what is kept of all micro-batches, so that it need not be computed again for the weights."""


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch of the sequences `index`, padded on the right; later tokens do not touch earlier ones."""

    index: tuple[int, ...]
    ids_BL: Tensor
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Without padding."""
        return sum(self.lengths)

    def key(self, site: str) -> str:
        """Names the result of a site on this micro-batch."""
        return f"{site} {digest([self.index, self.lengths])[:16]}"


@dataclass(frozen=True, eq=False)
class Record:
    """Of a micro-batch: the base's logits in float32, (L - 1) x V for each row, and what the running blocks gave."""

    base: tuple[Tensor, ...]
    outputs: tuple[Any, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.base, *map(_hidden, self.outputs)))


@dataclass(eq=False)
class Work:
    """What is measured, and what is known already. done: results as JSON, by site and micro-batch."""

    networks: Networks
    done: MutableMapping[str, bytes]
    kept: dict[str, Record] = field(default_factory=dict)
    latest: dict[str, Record] = field(default_factory=dict)
    replays: bool = True

    def record(self, batch: Batch) -> Record:
        """Run both networks on a micro-batch, unless that is kept; the model's KL and its depths go to `done`."""
        key = batch.key("")
        for held in (self.kept, self.latest):
            if key in held:
                return held[key]
        self.latest.clear()
        made = self._record(batch)
        room = KEPT_BYTES - sum(record.nbytes for record in self.kept.values())
        (self.kept if made.nbytes <= room else self.latest)[key] = made
        return made

    def _record(self, batch: Batch) -> Record:
        both, key = self.networks, batch.key("whole")
        outputs: list[Any] = []
        with watched(both.blocks, lambda _, output: outputs.append(output)):
            running_BLV = _logits(both.running, batch, both.device)
        model_BLV = base_BLV = running_BLV
        sums = [[0.0] * 4 for _ in outputs]
        if key not in self.done or not both.base_runs:

            def compare(n: int, output: Any) -> None:
                hidden = (_hidden(outputs[n]), _hidden(output))
                sums[n] = _depth_sums(*(hidden[::-1] if both.base_runs else hidden), batch.lengths)

            with watched(() if key in self.done else both.other_blocks, compare):
                other_BLV = _logits(both.other, batch, both.device)
            model_BLV, base_BLV = (other_BLV, running_BLV) if both.base_runs else (running_BLV, other_BLV)
        base = tuple(
            base_BLV[row, : length - 1].to(torch.float32, copy=True) for row, length in enumerate(batch.lengths)
        )
        if key not in self.done:
            self.done[key] = json.dumps({"kl": _divergences(base, model_BLV), "depth": sums}).encode()
        return Record(base, tuple(outputs))

    def whole(self, batch: Batch) -> Mapping[str, list[Any]]:
        """ "kl": of the model, summed over the tokens of each document; "depth": the sums behind each block."""
        if batch.key("whole") not in self.done:
            self.record(batch)
        found: Mapping[str, list[Any]] = json.loads(self.done[batch.key("whole")])
        return found

    def has(self, swap: Swap, batches: Iterable[Batch]) -> bool:
        """Whether a site is measured on all of these."""
        return all(batch.key(swap.name) in self.done for batch in batches)

    def measure(self, swap: Swap, batch: Batch) -> list[float]:
        """KL(base || network with the site swapped), summed over the tokens of each document."""
        key = batch.key(swap.name)
        if key not in self.done:
            self.done[key] = json.dumps(self.divergences((swap,), batch)).encode()
        totals: list[float] = json.loads(self.done[key])
        return totals

    def divergences(self, swaps: Sequence[Swap], batch: Batch, first: int | None = None) -> list[float]:
        """As `measure`, with these sites swapped together."""
        record = self.record(batch)
        return _divergences(record.base, self.logits(swaps, batch, first))

    def logits(self, swaps: Sequence[Swap], batch: Batch, first: int | None = None) -> Tensor:
        """Logits with sites swapped, B x L x V. The network is afterwards as it was, bit by bit.

        first: how many blocks answer from the record; by default those before the first that is swapped.
        """
        both = self.networks
        outputs = self.record(batch).outputs
        if first is None:
            first = min((swap.first for swap in swaps), default=0) if self.replays else 0
        forwards = [(block, _answer(output)) for block, output in zip(both.blocks[:first], outputs, strict=False)]
        blocks = [swap.block for swap in swaps if swap.level == "block" and swap.block is not None]
        forwards += [(both.blocks[n], _call(both.other_blocks[n])) for n in blocks]
        regions = [region for swap in swaps for region in swap.regions]
        with instead(forwards), replaced(regions):
            return _logits(both.running, batch, both.device)


def check(work: Work, found: Differences, batch: Batch) -> list[str]:
    """On one sequence: whether blocks can answer from the record, and whether the sites are all that differs."""
    if not found.sites:
        return []
    both = work.networks
    count = len(both.blocks)
    notes: list[str] = []
    plain_BLV = _logits(both.running, batch, both.device)
    distances = [_distance(plain_BLV, work.logits((), batch, first)) for first in {count, count // 2} - {0}]
    # Some kernels of accelerators give two results for two passes.
    if any(distances) and max(distances) > 2 * _distance(plain_BLV, _logits(both.running, batch, both.device)):
        work.replays = False
        notes.append(
            "blocks of this model take more than their input from those before: "
            "each site was measured by a whole pass, which takes longer"
        )
    whole = math.fsum(work.whole(batch)["kl"])
    together = math.fsum(work.divergences(found.sites, batch))
    rest = together if not both.base_runs else abs(together - whole)
    if rest > 1e-3 * whole + 1e-6 * batch.tokens:
        notes.append(
            f"the sites are not all that differs: on one sequence all of them together leave "
            f"{100 * rest / whole if whole else 100:.1f} % of the KL unexplained"
        )
    work.kept.clear()
    return notes


def in_batches(data: Sequences, chosen: Sequence[int], tokens: int) -> tuple[Batch, ...]:
    part = Sequences(tuple(data.ids[i] for i in chosen), data.kind, tuple(data.nbytes[i] for i in chosen), "")
    return tuple(
        Batch(tuple(chosen[i] for i in batch.index), batch.ids_BL, tuple(len(data.ids[chosen[i]]) for i in batch.index))
        for batch in micro_batches(part, tokens=tokens, pad=True)
    )


def _depth_sums(model_BLD: Tensor, base_BLD: Tensor, lengths: Sequence[int]) -> list[float]:
    """Sums of |h_model - h_base|^2, |h_base|^2, cosine and tokens; without padding and first tokens."""
    sums = torch.zeros(4, dtype=torch.float64)
    for row, length in enumerate(lengths):
        model_LD, base_LD = model_BLD[row, 1:length].float(), base_BLD[row, 1:length].float()
        dot_L, model_L, base_L = (
            torch.linalg.vecdot(a, b).double()
            for a, b in ((model_LD, base_LD), (model_LD, model_LD), (base_LD, base_LD))
        )
        cosine_L = dot_L / (model_L * base_L).sqrt().clamp(min=1e-30)
        difference = (model_LD - base_LD).square().sum(dtype=torch.float64)
        sums += torch.stack([difference, base_L.sum(), cosine_L.sum(), base_L.new_tensor(length - 1)]).cpu()
    return [float(each) for each in sums]


def _divergences(base: Sequence[Tensor], logits_BLV: Tensor) -> list[float]:
    """KL(base || softmax(logits)), summed over the tokens of each row; base: logits in float32, (L - 1) x V each."""
    vocabulary, device = logits_BLV.shape[-1], logits_BLV.device
    space = workspace(vocabulary, device, 4)
    totals = []
    for row, base_LV in enumerate(base):
        total = torch.zeros((), dtype=torch.float64, device=device)
        for cut in cuts(len(base_LV), vocabulary, device):
            base_RV, model_RV = base_LV[cut], as_float32(logits_BLV[row, cut], space[0])
            p = distribution(base_RV, base_RV.amax(-1, keepdim=True), space[1])
            q = distribution(model_RV, model_RV.amax(-1, keepdim=True), space[2])
            total += divergence(p, q, space[3]).sum(dtype=torch.float64)
        totals.append(float(total))
    if not all(map(math.isfinite, totals)):
        raise CheckpointError(
            "the models give NaN or an infinite KL on this text; their weights are broken or their dtype overflows: "
            "try dtype=float32, or compress the model again"
        )
    return totals


def _logits(network: Any, batch: Batch, device: str) -> Tensor:
    with quiet(), torch.inference_mode():
        return text_logits(network, batch.ids_BL.to(device))


def _distance(one_BLV: Tensor, other_BLV: Tensor) -> float:
    return 0.0 if torch.equal(one_BLV, other_BLV) else float((one_BLV - other_BLV).abs().max())


def _hidden(output: Any) -> Tensor:
    """The hidden states of a block's output, B x L x D."""
    hidden_BLD: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden_BLD


def _answer(output: Any) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: output


def _call(block: nn.Module) -> Callable[..., Any]:
    # Not the module itself, which PyTorch would make a part of the other.
    return lambda *args, **kwargs: block(*args, **kwargs)


def digest(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()
