"""Which blocks and weights of a compressed model cost how much, and how the error grows along the depth.

One site at a time gets the base's weights back ("restore"), or one site of the base is compressed ("spoil"), and the
change of KL(base || model) on the same tokens is its cost. Costs of sites are not additive: errors of one site may hide
or feed those of another.

The network that runs is recorded once for each micro-batch. A site in block i is then measured by a pass in which the
blocks before i answer with what they gave in the record, so that it costs the blocks from i on, and the head.

S = sequences, B = sequences of a micro-batch, L = tokens of a sequence, R = tokens worked on at once, V = vocabulary,
D = hidden size, N = blocks.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from math import prod
from pathlib import Path
from time import monotonic
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tersely import __version__
from tersely.calibrate import Sequences, micro_batches, read_text, sequences
from tersely.checkpoint import open_checkpoint
from tersely.errors import CheckpointError, DataError, OutputError, UsageError
from tersely.evaluation.statistics import ratio
from tersely.evaluation.store import Store
from tersely.evaluation.subject import setting, subject
from tersely.graph import Graph, Piece, Weight, read_graph
from tersely.results import Blame, Depth, Estimate, Site
from tersely.runtime import load_model, load_tokenizer, max_positions, model_kind, quiet, read_config

Direction = Literal["restore", "spoil"]
Progress = Callable[[str, float], None]
"""Called with what is being done and the share that is done, 0 to 1."""

KEPT_BYTES = 2**30
"""Bound on what is kept of all micro-batches, so that it need not be computed again for the weights."""
_DEFAULT_SAMPLES, _MOST_SAMPLES = 64, 256
_ENOUGH = 16
"""Documents that blocks are measured on, if the time allows, before the time goes into weights."""
_DEFAULT_CONTEXT = 512
_CHECK_TOKENS = 256
_PILOT_TOKENS = 2048
_ROUNDS = 6
_CHUNK_BYTES_CPU, _CHUNK_BYTES_ACCELERATOR = 8 * 2**20, 64 * 2**20
# Of the budget: what is planned, when nothing new is begun, and when what is begun is given up.
_PLANNED, _FULL, _OVER = 0.9, 0.97, 1.05


@dataclass(frozen=True, eq=False)
class _Swap:
    """A site that can be swapped. first: the first block that its swap touches, N for what follows the blocks."""

    name: str
    level: Literal["block", "weight"]
    block: int | None
    role: str
    parameters: int
    bits: float | None
    first: int
    regions: tuple[tuple[Tensor, Tensor], ...]
    """Memory of the network that runs, and what is put there for a pass; empty for a block, which is swapped whole."""
    change: float
    """|w_model - w_base|^2 / |w_base|^2."""


@dataclass(frozen=True, eq=False)
class _Networks:
    """The network in which sites are swapped, the other one where they come from, and the blocks of both."""

    running: Any
    other: Any
    base_runs: bool
    blocks: tuple[nn.Module, ...]
    other_blocks: tuple[nn.Module, ...]
    """Empty, as `blocks`, where the models' blocks do not correspond."""
    device: str


@dataclass(frozen=True, eq=False)
class _Found:
    """What differs between two models. sites: blocks, and weights outside them; weights: those inside."""

    networks: _Networks
    sites: tuple[_Swap, ...]
    weights: tuple[_Swap, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Batch:
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
        return f"{site} {_sha256([self.index, self.lengths])[:16]}"


@dataclass(frozen=True, eq=False)
class _Record:
    """Of a micro-batch: the base's log-probabilities, (L - 1) x V for each row, and what the running blocks gave."""

    log_p: tuple[Tensor, ...]
    outputs: tuple[Any, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.log_p, *map(_hidden, self.outputs)))


@dataclass(frozen=True)
class _Pace:
    """Seconds a token takes: a record, what follows the blocks with the KL, and one block."""

    record: float
    head: float
    block: float


@dataclass(frozen=True, eq=False)
class _Plan:
    """Micro-batches in the order in which they are measured; a round is a sample without regard to length."""

    rounds: tuple[tuple[_Batch, ...], ...]
    pace: _Pace | None


@dataclass(eq=False)
class _Clock:
    """Time that has passed of the budget, and what is reported of the work."""

    start: float
    budget: float | None
    progress: Progress | None
    total: float = 1.0
    spent: float = 0.0
    share: float = 0.0

    @property
    def elapsed(self) -> float:
        return monotonic() - self.start

    def left(self, share: float = 1.0) -> float:
        """Seconds until this share of the budget is used; without one, inf."""
        return math.inf if self.budget is None else share * self.budget - self.elapsed

    def say(self, what: str, amount: float = 0.0) -> None:
        """Report that work is being done, after so much more of it."""
        self.spent += amount
        share = self.spent / self.total if self.budget is None else self.elapsed / self.budget
        self.share = max(self.share, min(0.99, share))
        if self.progress is not None:
            self.progress(what, 1.0 if what == "finished" else self.share)


@dataclass(eq=False)
class _Work:
    """What is measured, and what is known already. done: results as JSON, by site and micro-batch."""

    networks: _Networks
    done: MutableMapping[str, bytes]
    kept: dict[str, _Record] = field(default_factory=dict)
    latest: dict[str, _Record] = field(default_factory=dict)
    replays: bool = True

    def record(self, batch: _Batch) -> _Record:
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

    def _record(self, batch: _Batch) -> _Record:
        both, key = self.networks, batch.key("whole")
        outputs: list[Any] = []
        with _watched(both.blocks, lambda _, output: outputs.append(output)):
            running_BLV = _logits(both.running, batch, both.device)
        model_BLV = base_BLV = running_BLV
        sums = [[0.0] * 4 for _ in outputs]
        if key not in self.done or not both.base_runs:

            def compare(n: int, output: Any) -> None:
                hidden = (_hidden(outputs[n]), _hidden(output))
                sums[n] = _depth_sums(*(hidden[::-1] if both.base_runs else hidden), batch.lengths)

            with _watched(() if key in self.done else both.other_blocks, compare):
                other_BLV = _logits(both.other, batch, both.device)
            model_BLV, base_BLV = (other_BLV, running_BLV) if both.base_runs else (running_BLV, other_BLV)
        log_p = tuple(
            torch.cat([base_BLV[row, cut].float().log_softmax(dim=-1) for cut in _cuts(length - 1, base_BLV)])
            for row, length in enumerate(batch.lengths)
        )
        if key not in self.done:
            self.done[key] = json.dumps({"kl": _divergences(log_p, model_BLV), "depth": sums}).encode()
        return _Record(log_p, tuple(outputs))

    def whole(self, batch: _Batch) -> Mapping[str, list[Any]]:
        """ "kl": of the model, summed over the tokens of each document; "depth": the sums behind each block."""
        if batch.key("whole") not in self.done:
            self.record(batch)
        found: Mapping[str, list[Any]] = json.loads(self.done[batch.key("whole")])
        return found

    def has(self, swap: _Swap, batches: Iterable[_Batch]) -> bool:
        """Whether a site is measured on all of these."""
        return all(batch.key(swap.name) in self.done for batch in batches)

    def measure(self, swap: _Swap, batch: _Batch) -> list[float]:
        """KL(base || network with the site swapped), summed over the tokens of each document."""
        key = batch.key(swap.name)
        if key not in self.done:
            self.done[key] = json.dumps(self.divergences((swap,), batch)).encode()
        totals: list[float] = json.loads(self.done[key])
        return totals

    def divergences(self, swaps: Sequence[_Swap], batch: _Batch, first: int | None = None) -> list[float]:
        """As `measure`, with these sites swapped together."""
        record = self.record(batch)
        return _divergences(record.log_p, self.logits(swaps, batch, first))

    def logits(self, swaps: Sequence[_Swap], batch: _Batch, first: int | None = None) -> Tensor:
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
        with _instead(forwards), _replaced(regions):
            return _logits(both.running, batch, both.device)


def blame(
    model: str | Path,
    text: str | Path,
    *,
    against: str | Path,
    direction: Direction = "restore",
    context: int | None = None,
    samples: int | None = None,
    budget: float | None = None,
    weights: int | None = None,
    device: str = "cpu",
    dtype: Literal["auto"] | torch.dtype = "auto",
    seed: int = 0,
    tokens_per_batch: int = 4096,
    unfinished: MutableMapping[str, bytes] | None = None,
    store: Store | None = None,
    progress: Progress | None = None,
) -> Blame:
    """Say what each block of a compressed causal language model costs, and each weight of the dearest blocks.

    Blocks come first, and what lies outside them (embedding, last norm, head); then the weights, those of the dearest
    block first and in it the most changed first. Sites that are equal in both models are left out.

    text: a file, or some of its documents: `sample.txt[-200:]`. context: tokens of a sequence, by default the models'
    positions, at most 512 (more texts say more of the sites than longer ones). samples: documents or windows of the
    text; by default 64, and with a budget as many as fit, at most 256.
    budget: seconds for everything, loading included. Sequences are then drawn by `seed`: as many as leave time for
    all blocks and weights, but at least 16 where the time allows so many for the blocks; what is not reached is
    named in the notes. weights: at most so many of those inside the blocks; None: all, 0: blocks only.
    dtype: of both models; "auto" is the wider of what the two are stored in. unfinished: results are kept there as
    they come, and taken from there, so that a killed run continues. store: keeps them instead, under a name of the
    models, the text and the settings, and the finished result in their place.

    Memory: both models; of a micro-batch (tokens_per_batch) the logits of both, the base's log-probabilities in
    float32 and the outputs of all blocks. The last two are kept for all micro-batches as far as 1 GiB goes, and
    computed again beyond.

    Raises UsageError: not causal language models, a base that is quantized itself, a bad direction or number;
    DataError: the text, or tokenizers or vocabularies that differ; CheckpointError: a model that cannot be loaded or
    gives NaN; OutputError: `unfinished` holds another measurement.
    """
    clock = _Clock(monotonic(), budget, progress)
    folders = (Path(model), Path(against))
    if store is not None and unfinished is not None:
        raise UsageError("store and unfinished are given: one place to keep what is measured is enough")
    _require(folders, direction, samples=samples, budget=budget, weights=weights, tokens_per_batch=tokens_per_batch)
    content = read_text(text)
    graph = read_graph(open_checkpoint(folders[1]))
    clock.say("loading")
    where = setting(device, packages=["compressed-tensors"])
    networks = _load(folders, device, dtype)
    data, limit = _data(content, networks, folders, context, samples, budget, seed)
    subjects = [
        subject(folder, dtype=str(network.dtype).removeprefix("torch."))
        for folder, network in zip(folders, networks, strict=True)
    ]
    found = _differences(graph, networks, folders, direction, device)
    job = {
        "versions": [__version__, torch.__version__],
        "models": [[s.fingerprint, s.dtype] for s in subjects],
        "text": data.sha256,
        "numbers": [direction, limit, samples, seed, tokens_per_batch, budget],
        "device": device,
    }
    kept = store.unfinished(f"blame {_sha256(job)}") if store is not None else unfinished
    work = _Work(found.networks, {} if kept is None else kept)
    sequence = _order(work.done, job, data, budget, seed)
    short = _Batch(
        (sequence[0],), data.ids[sequence[0]][None, :_CHECK_TOKENS], (min(_CHECK_TOKENS, len(data.ids[sequence[0]])),)
    )
    notes = [*found.notes, *_check(work, found, short)]
    plan = _plan(work, found, data, sequence, short, tokens_per_batch, clock)
    batches, pace = _measure_sites(work, found, plan, clock, weights)
    kl = [each for batch in batches for each in work.whole(batch)["kl"]]
    sizes = [length - 1 for batch in batches for length in batch.lengths]

    def cost(swap: _Swap) -> Estimate:
        changed = [each for batch in batches for each in work.measure(swap, batch)]
        if direction == "spoil":
            return ratio(changed, sizes, seed=seed, bounds=(0.0, math.inf))
        return ratio([before - after for before, after in zip(kl, changed, strict=True)], sizes, seed=seed)

    costs = {swap.name: cost(swap) for swap in found.sites if work.has(swap, batches)}
    inner = _dearest(found.weights, found.sites, costs)
    _measure_weights(work, inner[:weights], batches, pace, clock)
    costs |= {swap.name: cost(swap) for swap in inner[:weights] if work.has(swap, batches)}
    clock.say("finished")
    taken = sorted(i for batch in batches for i in batch.index)
    notes += _unreached(found.sites, inner, costs, weights, budget)
    notes += _sampled(len(taken), len(data.ids), data.kind, str(text), budget)
    result = Blame(
        model=subjects[0],
        base=subjects[1],
        setting=where,
        direction=direction,
        text=str(text),
        sha256=data.sha256 if len(taken) == len(data.ids) else _sha256([data.sha256, taken]),
        documents=len(taken),
        tokens=sum(sizes),
        context=limit,
        kl=ratio(kl, sizes, seed=seed, bounds=(0.0, math.inf)),
        sites=tuple(
            Site(swap.name, swap.level, swap.block, swap.role, swap.parameters, swap.bits, costs[swap.name])
            for swap in sorted((*found.sites, *inner), key=lambda s: -costs[s.name].value if s.name in costs else 0)
            if swap.name in costs
        ),
        depth=_depths(work, batches, graph.units),
        notes=tuple(notes),
        budget=budget,
        seconds=clock.elapsed,
    )
    if store is not None:
        store.add(result)
        work.done.clear()
    return result


def _require(folders: Sequence[Path], direction: str, **numbers: float | None) -> None:
    if direction not in ("restore", "spoil"):
        raise UsageError(
            f"direction={direction!r}: expected 'restore' (the base's weights, site by site, in the compressed model) "
            "or 'spoil' (a compressed site in the base)"
        )
    for name, number in numbers.items():
        if number is not None and (number < 0 or (number == 0 and name != "weights")):
            raise UsageError(f"{name}={number}: expected {'0 or more' if name == 'weights' else 'more than 0'}")
    for folder in folders:
        if (kind := model_kind(folder)) != "causal":
            raise UsageError(
                f"{folder}: blame is for causal language models, this one is {kind}; "
                "give a checkpoint such as LlamaForCausalLM"
            )
    if "quantization_config" in read_config(folders[1]):
        raise UsageError(
            f"{folders[1]} is quantized itself; give the model in full precision that {folders[0]} was made from"
        )


def _load(folders: Sequence[Path], device: str, dtype: Literal["auto"] | torch.dtype) -> tuple[Any, Any]:
    """Model and base in one dtype: what is swapped must not be rounded on the way."""
    model: Any
    base: Any
    model, base = (load_model(folder, device=device, dtype=dtype) for folder in folders)
    if model.dtype != base.dtype:
        wider = torch.promote_types(model.dtype, base.dtype)
        model, base = model.to(wider), base.to(wider)
    return model, base


def _data(
    content: str,
    networks: Sequence[Any],
    folders: Sequence[Path],
    context: int | None,
    samples: int | None,
    budget: float | None,
    seed: int,
) -> tuple[Sequences, int]:
    """The sequences that both tokenizers give, and how long they may be."""
    limits = [limit for network in networks if (limit := max_positions(network.config)) is not None]
    if context is None:
        context = min([*limits, _DEFAULT_CONTEXT])
    elif limits and context > min(limits):
        raise UsageError(f"context={context} exceeds the models' {min(limits)} positions; use at most that")
    sizes = [int(network.config.get_text_config().vocab_size) for network in networks]
    if sizes[0] != sizes[1]:
        raise DataError(
            f"{folders[0]} has a vocabulary of {sizes[0]} and {folders[1]} one of {sizes[1]}: their weights cannot be "
            "swapped; compare them with `tersely evaluate`"
        )

    def tokenized(folder: Path) -> Sequences:
        def taken(count: int | None) -> Sequences:
            return sequences(content, tokenizer, context=context, samples=count, seed=seed, purpose="blame")

        tokenizer = load_tokenizer(folder)
        try:
            return taken(samples or (_DEFAULT_SAMPLES if budget is None else _MOST_SAMPLES))
        except DataError:
            return taken(samples)

    data = tokenized(folders[0])
    if all(_same_file(folders, name) for name in ("tokenizer.json", "tokenizer_config.json")):
        return data, context
    theirs = tokenized(folders[1])
    if len(data.ids) != len(theirs.ids) or not all(map(torch.equal, data.ids, theirs.ids)):
        raise DataError(
            f"the tokenizers of {folders[0]} and {folders[1]} cut this text differently: predictions cannot be "
            "compared token by token; give both the same tokenizer"
        )
    return data, context


def _same_file(folders: Sequence[Path], name: str) -> bool:
    files = [folder / name for folder in folders]
    return all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes()


def _differences(
    graph: Graph, networks: Sequence[Any], folders: Sequence[Path], direction: Direction, device: str
) -> _Found:
    """Find every place that holds other numbers in the model than in the base."""
    base_runs = direction == "spoil"
    states = [_state(network) for network in networks]
    blocks, notes = _blocks(graph, networks, folders)
    rows = _stored(folders[0])
    sites: list[_Swap] = []
    weights: list[_Swap] = []
    misshapen: list[str] = []
    folded: list[str] = []
    for n, unit in enumerate(graph.units if blocks[0] else ()):
        places = _places(graph, unit, states)
        bad = [place for place in places if not _alike(place)]
        changed = [place for place in places if _alike(place) and not _equal(place)]
        misshapen += [_shapes(place) for place in bad]
        if {"norm", "linear"} <= {weight.kind for weight, _, _ in changed}:
            folded.append(str(n))
        linear = [weight for weight in graph.unit(unit) if weight.kind == "linear"]
        # What an MLP has inside does not show outside it; heads do, in the rotary angles that blocks are given.
        if (bad or changed) and all(weight.role in ("mlp", "expert", "router") for weight, _, _ in bad):
            parameters = sum(map(_numel, linear))
            sites.append(_Swap(unit, "block", n, "block", parameters, _bits(linear, rows), n, (), 0.0))
        weights += [_swap(place, n, n, rows, base_runs) for place in changed]
    outside = _outside(graph, networks, states)
    tied = _shared(outside, base_runs)
    for place in outside:
        if not _alike(place):
            misshapen.append(_shapes(place))
        elif place[0].name in tied:
            notes.append(
                f"{place[0].name} cannot be swapped alone: one of the models has its head and its embedding in one "
                "tensor, the other has not"
            )
        elif not _equal(place):
            spaces = {*place[0].reads.spaces, *place[0].writes.spaces}
            behind = place[0].role == "head" or (place[0].role != "embedding" and graph.head_space in spaces)
            first = len(blocks[0]) if behind else 0
            sites.append(_swap(place, None, first, rows, base_runs))
    if misshapen:
        more = f" and {len(misshapen) - 5} more" if len(misshapen) > 5 else ""
        notes.append(f"not swapped, their shapes differ (model, base): {'; '.join(misshapen[:5])}{more}")
    if folded:
        notes.append(
            f"norms differ as well in {_named('block', folded)}: if scales were moved between weights, a weight "
            "swapped alone means little there; the blocks as a whole hold"
        )
    if not sites and not weights and not notes:
        notes.append("the weights of both models are equal: nothing costs anything")
    running, other = networks[::-1] if base_runs else networks
    ours, theirs = blocks[::-1] if base_runs else blocks
    return _Found(
        _Networks(running, other, base_runs, ours, theirs, device), tuple(sites), tuple(weights), tuple(notes)
    )


_Place = tuple[Weight, Tensor, Tensor | None]
"""A weight, where the base has it in memory, and where the model has it (None: nowhere)."""


def _state(network: Any) -> dict[str, Tensor]:
    named = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach() for name, tensor in named}


def _blocks(
    graph: Graph, networks: Sequence[Any], folders: Sequence[Path]
) -> tuple[tuple[tuple[nn.Module, ...], tuple[nn.Module, ...]], list[str]]:
    """The blocks of model and base, in order; none, and why, where they do not correspond."""
    stack = graph.units[0].rpartition(".")[0]
    stacks: list[Any] = []
    for network, folder in zip(networks, folders, strict=True):
        try:
            stacks.append(network.get_submodule(stack))
        except AttributeError:
            return ((), ()), [f"{folder} has no {stack}: its blocks do not correspond to the base's, and are left out"]
    counts = [len(blocks) for blocks in stacks]
    if counts[0] != counts[1]:
        return ((), ()), [
            f"{folders[0]} has {counts[0]} blocks and {folders[1]} has {counts[1]}: they do not correspond, and are "
            "left out"
        ]
    widths = [network.get_input_embeddings().weight.shape[1] for network in networks]
    if widths[0] != widths[1]:
        return ((), ()), [
            f"{folders[0]} has hidden states of {widths[0]} numbers and {folders[1]} of {widths[1]}: no block of one "
            "fits into the other"
        ]
    return (tuple(stacks[0]), tuple(stacks[1])), []


def _places(graph: Graph, unit: str, states: Sequence[Mapping[str, Tensor]]) -> list[_Place]:
    model, base = states
    found: list[_Place] = []
    for parameter, pieces in graph.parameters(unit).items():
        name = f"{unit}.{parameter}" if unit else parameter
        here, there = base[name], model.get(name)
        for piece in pieces:
            if there is None:
                # Libraries that compress mixtures of experts may have unstacked them.
                alone = f"{unit}.{piece.weight.parameter}" if unit else piece.weight.parameter
                found.append((piece.weight, _region(here, piece), model.get(alone)))
            elif here.shape != there.shape:
                found.append((piece.weight, here, there))
            else:
                found.append((piece.weight, _region(here, piece), _region(there, piece)))
    return found


def _region(tensor: Tensor, piece: Piece) -> Tensor:
    """What a stored tensor fills of a parameter."""
    slot = tensor if piece.index is None else tensor[piece.index]
    return slot if slot.ndim == 0 else slot[piece.start : piece.start + piece.rows]


def _outside(graph: Graph, networks: Sequence[Any], states: Sequence[Mapping[str, Tensor]]) -> list[_Place]:
    """The weights outside the blocks; a head of its own that only one of the models has counts, too."""
    found = _places(graph, "", states)
    heads = [network.get_output_embeddings().weight.detach() for network in networks]
    apart = [
        head.data_ptr() != network.get_input_embeddings().weight.data_ptr()
        for head, network in zip(heads, networks, strict=True)
    ]
    if graph.head is None and any(apart):
        own = apart.index(True)
        name = next(name for name, tensor in states[own].items() if tensor.data_ptr() == heads[own].data_ptr())
        embedding = next(weight for weight in graph.weights if weight.role == "embedding")
        found.append((replace(embedding, name=name, role="head", kind="linear"), heads[1], heads[0]))
    return found


def _shared(places: Sequence[_Place], base_runs: bool) -> set[str]:
    """Names of those that are one tensor in the network that runs, and several in the other."""
    alike = [
        (weight.name, *((base, model) if base_runs else (model, base)))
        for weight, base, model in places
        if model is not None
    ]
    return {
        name
        for name, running, other in alike
        for other_name, its_running, its_other in alike
        if name != other_name
        and running.data_ptr() == its_running.data_ptr()
        and other.data_ptr() != its_other.data_ptr()
    }


def _alike(place: _Place) -> bool:
    return place[2] is not None and place[1].shape == place[2].shape


def _equal(place: _Place) -> bool:
    _, base, model = place
    return model is not None and torch.equal(base, model.to(base.dtype))


def _shapes(place: _Place) -> str:
    weight, base, model = place
    return f"{weight.name} {'none' if model is None else list(model.shape)}, {list(base.shape)}"


def _swap(
    place: _Place, block: int | None, first: int, rows: Mapping[str, tuple[int, int]] | None, base_runs: bool
) -> _Swap:
    weight, base, model = place
    assert model is not None
    change = (model.float() - base.float()).square().sum() / base.float().square().sum().clamp(min=1e-30)
    stored = None if rows is None else rows.get(weight.name)
    return _Swap(
        name=weight.name,
        level="weight",
        block=block,
        role=weight.role,
        parameters=_numel(weight),
        bits=None if stored is None else 8 * stored[0] / stored[1],
        first=first,
        regions=((base, model) if base_runs else (model, base),),
        change=float(change),
    )


def _bits(weights: Sequence[Weight], rows: Mapping[str, tuple[int, int]] | None) -> float | None:
    """Stored bits a weight of several together; those without a row were kept as they are in the base."""
    if rows is None or not any(weight.name in rows for weight in weights):
        return None
    stored = [rows.get(weight.name, (weight.spec.nbytes, _numel(weight))) for weight in weights]
    return 8 * sum(nbytes for nbytes, _ in stored) / sum(count for _, count in stored)


def _stored(folder: Path) -> Mapping[str, tuple[int, int]] | None:
    """Name -> bytes and weights, of the weights that the folder's report.json lists; None where there is none."""
    try:
        rows = json.loads((folder / "report.json").read_text(encoding="utf-8"))["rows"]
        found = {str(row["name"]): (int(row["bytes_after"]), int(row["parameters"])) for row in rows}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return {name: (nbytes, count) for name, (nbytes, count) in found.items() if nbytes >= 0 and count > 0} or None


def _numel(weight: Weight) -> int:
    return prod(weight.spec.shape)


def _order(
    done: MutableMapping[str, bytes], job: Mapping[str, Any], data: Sequences, budget: float | None, seed: int
) -> list[int]:
    """In which order sequences are taken; drawn, where time decides how many. Refuses results of another job."""
    name = _sha256(job).encode()
    if done.setdefault("job", name) != name:
        raise OutputError(
            "what is kept of an unfinished run belongs to another measurement; clear it, or keep both apart"
        )
    order = list(range(len(data.ids)))
    if budget is not None:
        random.Random(seed).shuffle(order)
    return order


def _batches(data: Sequences, chosen: Sequence[int], tokens: int) -> tuple[_Batch, ...]:
    part = Sequences(tuple(data.ids[i] for i in chosen), data.kind, tuple(data.nbytes[i] for i in chosen), "")
    return tuple(
        _Batch(
            tuple(chosen[i] for i in batch.index), batch.ids_BL, tuple(len(data.ids[chosen[i]]) for i in batch.index)
        )
        for batch in micro_batches(part, tokens=tokens, pad=True)
    )


def _check(work: _Work, found: _Found, batch: _Batch) -> list[str]:
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


def _plan(
    work: _Work,
    found: _Found,
    data: Sequences,
    order: Sequence[int],
    short: _Batch,
    tokens_per_batch: int,
    clock: _Clock,
) -> _Plan:
    """How many sequences, in which rounds: all without a budget, else what a pilot says."""
    if clock.budget is None:
        return _Plan((_batches(data, order, tokens_per_batch),), None)
    pace = _pilot(work, data, order, short, tokens_per_batch, clock)
    if "count" not in work.done:
        sites = pace.record + _seconds(work, pace, found.sites)
        room = max(0.0, clock.left(_PLANNED))
        everything = room / (sites + _seconds(work, pace, found.weights))
        count = tokens = 0
        while count < len(order):
            tokens += len(data.ids[order[count]])
            if count and tokens > (max(everything, room / sites) if count < _ENOUGH else everything):
                break
            count += 1
        work.done["count"] = str(count).encode()
    chosen = order[: int(work.done["count"])]
    wanted = sum(len(data.ids[i]) for i in chosen) / _ROUNDS
    rounds: list[list[int]] = []
    tokens = 0
    for i in chosen:
        if not rounds or tokens >= wanted:
            rounds.append([])
            tokens = 0
        rounds[-1].append(i)
        tokens += len(data.ids[i])
    return _Plan(tuple(_batches(data, each, tokens_per_batch) for each in rounds), pace)


def _pilot(
    work: _Work, data: Sequences, order: Sequence[int], short: _Batch, tokens_per_batch: int, clock: _Clock
) -> _Pace:
    """Time a few sequences, within a tenth of the time that is left."""
    pace = _timed(work, short)
    each = pace.record + 2 * pace.head + pace.block * len(work.networks.blocks)
    room = min(_PILOT_TOKENS, tokens_per_batch, 0.1 * clock.left() / each)
    count = 0
    while count < len(order) and (room := room - len(data.ids[order[count]])) >= 0:
        count += 1
    return _timed(work, _batches(data, order[:count], tokens_per_batch)[0]) if count else pace


def _timed(work: _Work, batch: _Batch) -> _Pace:
    count = len(work.networks.blocks)
    fresh = _Work(work.networks, {}, replays=work.replays)
    times = [monotonic()]
    fresh.record(batch)
    times.append(monotonic())
    for first in (count, count // 2):
        fresh.divergences((), batch, first)
        times.append(monotonic())
    record, head, half = (max(after - before, 1e-9) / batch.tokens for before, after in pairwise(times))
    return _Pace(record, head, max(0.0, half - head) / max(1, count - count // 2))


def _seconds(work: _Work, pace: _Pace, swaps: Iterable[_Swap]) -> float:
    """What a token of these sites takes, without its record."""
    count = len(work.networks.blocks)
    return sum(pace.head + pace.block * (count - swap.first * work.replays) for swap in swaps)


def _amount(work: _Work, swaps: Iterable[_Swap]) -> float:
    """The same in passes of a token through a block, for reports of progress."""
    return _seconds(work, _Pace(0.0, 1.0, 1.0), swaps)


def _measure_sites(
    work: _Work, found: _Found, plan: _Plan, clock: _Clock, weights: int | None
) -> tuple[tuple[_Batch, ...], _Pace | None]:
    """Measure the sites on the planned micro-batches, or on as many as the time allows; then how long a token took.

    Where not even the first micro-batch can be finished, some sites lack it.
    """
    taken: list[_Batch] = []
    per_record = 2 * len(work.networks.blocks) + 2
    per_token = per_record + _amount(work, (*found.sites, *found.weights[:weights]))
    clock.total = sum(batch.tokens for batches in plan.rounds for batch in batches) * per_token
    resumed = bool(found.sites) and work.has(found.sites[0], plan.rounds[0][:1])
    begin = monotonic()
    for batches in plan.rounds:
        tokens = sum(batch.tokens for batch in batches)
        if taken and clock.left(_FULL) * sum(batch.tokens for batch in taken) < (monotonic() - begin) * tokens:
            break
        for batch in batches:
            work.whole(batch)
            clock.say("both models", batch.tokens * per_record)
            for swap in found.sites:
                if clock.left(_OVER) < 0 and not work.has(swap, [batch]):
                    return tuple(taken or [batch]), plan.pace
                work.measure(swap, batch)
                clock.say(swap.name, batch.tokens * _amount(work, [swap]))
            taken.append(batch)
    pace = plan.pace
    if pace is not None and not resumed:
        tokens = sum(batch.tokens for batch in taken)
        planned = tokens * (pace.record + _seconds(work, pace, found.sites))
        off = (monotonic() - begin) / planned
        pace = _Pace(pace.record * off, pace.head * off, pace.block * off)
    return tuple(taken), pace


def _dearest(weights: Sequence[_Swap], sites: Sequence[_Swap], costs: Mapping[str, Estimate]) -> list[_Swap]:
    """Weights of the block that costs most first; in a block, the one that was changed most."""
    blocks = {site.block: costs[site.name].value for site in sites if site.level == "block" and site.name in costs}
    return sorted(weights, key=lambda swap: (-blocks.get(swap.block, -math.inf), swap.first, -swap.change))


def _measure_weights(
    work: _Work, swaps: Sequence[_Swap], batches: Sequence[_Batch], pace: _Pace | None, clock: _Clock
) -> None:
    """Measure weights on all micro-batches, block by block, as far as the time goes."""
    tokens = sum(batch.tokens for batch in batches)
    clock.total = clock.spent + tokens * _amount(work, swaps)
    groups = [list(swaps)] if pace is None else [list(group) for _, group in groupby(swaps, key=lambda s: s.block)]
    for group in groups:
        again = sum(batch.tokens for batch in batches if batch.key("") not in work.kept)
        cut = False
        if pace is not None:
            room = clock.left(_FULL) - pace.record * again
            fit = 0
            while fit < len(group) and (room := room - tokens * _seconds(work, pace, [group[fit]])) >= 0:
                fit += 1
            cut, group = fit < len(group), group[:fit]
        # A record that has to be made again serves all sites of the group.
        pairs = (
            [(swap, batch) for batch in batches for swap in group]
            if again
            else [(swap, batch) for swap in group for batch in batches]
        )
        for swap, batch in pairs:
            if clock.left(_OVER) < 0:
                return
            work.measure(swap, batch)
            clock.say(swap.name, batch.tokens * _amount(work, [swap]))
        if cut:
            return


def _unreached(
    sites: Sequence[_Swap],
    inner: Sequence[_Swap],
    costs: Mapping[str, Estimate],
    weights: int | None,
    budget: float | None,
) -> list[str]:
    """What was not measured, and why."""
    notes = []
    advice = f"not reached in {budget:g} s; give more time" if budget is not None else ""
    if left := [swap for swap in sites if swap.name not in costs]:
        names = [str(swap.block) if swap.level == "block" else swap.name for swap in left]
        notes.append(
            f"{_named('site', names) if any(s.block is None for s in left) else _named('block', names)} {advice}"
        )
    asked = inner[:weights]
    missing: list[str] = []
    for block, group in groupby(sorted(asked, key=lambda swap: swap.first), key=lambda swap: swap.block):
        own = list(group)
        lacking = sum(swap.name not in costs for swap in own)
        if lacking == len(own):
            missing.append(str(block))
        elif lacking:
            notes.append(f"{lacking} of {len(own)} weights of block {block} {advice}")
    if missing:
        notes.append(f"weights of {_named('block', missing)} {advice}")
    if weights and len(inner) > weights:
        notes.append(f"weights={weights}: {len(inner) - weights} other changed weights were not asked for")
    return notes


def _sampled(taken: int, available: int, kind: str, text: str, budget: float | None) -> list[str]:
    if taken == available:
        return []
    return [f"{taken} of {available} {kind} of {text} fitted into {budget:g} s"]


def _named(what: str, names: Sequence[str]) -> str:
    return f"{what} {names[0]}" if len(names) == 1 else f"{what}s {', '.join(names)}"


def _depths(work: _Work, batches: Sequence[_Batch], units: Sequence[str]) -> tuple[Depth, ...]:
    """Error and cosine behind each block, over all tokens but the first of each sequence."""
    sums = [work.whole(batch)["depth"] for batch in batches]
    found = []
    for n in range(len(work.networks.blocks)):
        difference, size, cosine, tokens = (math.fsum(each[n][place] for each in sums) for place in range(4))
        error = math.sqrt(difference / size) if size else 0.0
        found.append(Depth(units[n], n, error, cosine / tokens if tokens else 1.0))
    return tuple(found)


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


def _divergences(log_p: Sequence[Tensor], logits_BLV: Tensor) -> list[float]:
    """KL(p || softmax(logits)) = sum over v of p_v * (log p_v - log q_v), summed over the tokens of each row."""
    totals = []
    for row, base_LV in enumerate(log_p):
        total = torch.zeros((), dtype=torch.float64, device=logits_BLV.device)
        for cut in _cuts(len(base_LV), logits_BLV):
            base_RV = base_LV[cut]
            model_RV = logits_BLV[row, cut].float().log_softmax(dim=-1)
            total += torch.linalg.vecdot(base_RV.exp(), base_RV - model_RV).sum(dtype=torch.float64)
        totals.append(float(total))
    if not all(map(math.isfinite, totals)):
        raise CheckpointError(
            "the models give NaN or an infinite KL on this text; their weights are broken or their dtype overflows: "
            "try dtype=float32, or compress the model again"
        )
    return totals


def _cuts(length: int, logits_BLV: Tensor) -> Iterator[slice]:
    """Cuts of a row that fit the cache: on a CPU they take a third of the time."""
    nbytes = _CHUNK_BYTES_CPU if logits_BLV.device.type == "cpu" else _CHUNK_BYTES_ACCELERATOR
    step = max(1, nbytes // (4 * logits_BLV.shape[-1]))
    return (slice(first, min(first + step, length)) for first in range(0, length, step))


def _logits(network: Any, batch: _Batch, device: str) -> Tensor:
    with quiet(), torch.inference_mode():
        logits_BLV: Tensor = network(input_ids=batch.ids_BL.to(device), use_cache=False).logits
        return logits_BLV


def _distance(one_BLV: Tensor, other_BLV: Tensor) -> float:
    return 0.0 if torch.equal(one_BLV, other_BLV) else float((one_BLV - other_BLV).abs().max())


def _hidden(output: Any) -> Tensor:
    """The hidden states of a block's output, B x L x D."""
    hidden_BLD: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden_BLD


@contextmanager
def _watched(blocks: Sequence[nn.Module], see: Callable[[int, Any], None]) -> Iterator[None]:
    """Show the output of each block as it comes."""

    def hook(n: int) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _inputs, output: see(n, output)

    handles = [block.register_forward_hook(hook(n)) for n, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _instead(forwards: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Let blocks do something else than they do."""
    own = [(block, block.__dict__.get("forward")) for block, _ in forwards]
    try:
        for block, forward in forwards:
            block.forward = forward
        yield
    finally:
        for block, before in own:
            if before is not None:
                block.forward = before
            else:
                block.__dict__.pop("forward", None)


@contextmanager
def _replaced(regions: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Put other numbers into memory, and those that were there back."""
    saved: list[Tensor] = []
    with torch.no_grad():
        try:
            for place, value in regions:
                saved.append(place.clone())
                place.copy_(value)
            yield
        finally:
            for (place, _), before in zip(regions, saved, strict=False):
                place.copy_(before)


def _answer(output: Any) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: output


def _call(block: nn.Module) -> Callable[..., Any]:
    # Not the module itself, which PyTorch would make a part of the other.
    return lambda *args, **kwargs: block(*args, **kwargs)


def _sha256(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()
