"""Which blocks and weights of a compressed model cost how much, and how the error grows along the depth.

One site at a time gets the base's weights back ("restore"), or one site of the base is compressed ("spoil"), and the
change of KL(base || model) on the same tokens is its cost. Costs of sites are not additive: errors of one site may hide
or feed those of another.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, MutableMapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch

from tersely import __version__
from tersely.calibrate import Sequences, read_text, sequences
from tersely.checkpoint import open_checkpoint
from tersely.errors import DataError, OutputError, UsageError
from tersely.evaluation.passes import Batch, Work, check, digest
from tersely.evaluation.schedule import Progress, dearest, measure_sites, measure_weights, plan_rounds, start_clock
from tersely.evaluation.statistics import ratio
from tersely.evaluation.store import Store
from tersely.evaluation.subject import setting, subject
from tersely.evaluation.swapping import Direction, Swap, differences, named
from tersely.graph import read_graph
from tersely.results import Blame, Depth, Estimate, Site
from tersely.runtime import context_within, load_model, load_tokenizers, read_config, require_causal

_DEFAULT_SAMPLES, _MOST_SAMPLES = 64, 256
_DEFAULT_CONTEXT = 512
_CHECK_TOKENS = 256


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

    Memory: both models; of a micro-batch (tokens_per_batch) the logits of both, the base's logits in
    float32 and the outputs of all blocks. The last two are kept for all micro-batches as far as 1 GiB goes, and
    computed again beyond.

    Raises UsageError: not causal language models, a base that is quantized itself, a bad direction or number;
    DataError: the text, or tokenizers or vocabularies that differ; CheckpointError: a model that cannot be loaded or
    gives NaN; OutputError: `unfinished` holds another measurement.
    """
    clock = start_clock(budget, progress)
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
    found = differences(graph, networks, folders, direction, device)
    job = {
        "versions": [__version__, torch.__version__],
        "models": [[s.fingerprint, s.dtype] for s in subjects],
        "text": data.sha256,
        "numbers": [direction, limit, samples, seed, tokens_per_batch, budget],
        "device": device,
    }
    kept = store.unfinished(f"blame {digest(job)}") if store is not None else unfinished
    work = Work(found.networks, {} if kept is None else kept)
    sequence = _order(work.done, job, data, budget, seed)
    short = Batch(
        (sequence[0],), data.ids[sequence[0]][None, :_CHECK_TOKENS], (min(_CHECK_TOKENS, len(data.ids[sequence[0]])),)
    )
    notes = [*found.notes, *check(work, found, short)]
    plan = plan_rounds(work, found, data, sequence, short, tokens_per_batch, clock)
    batches, pace = measure_sites(work, found, plan, clock, weights)
    kl = [each for batch in batches for each in work.whole(batch)["kl"]]
    sizes = [length - 1 for batch in batches for length in batch.lengths]

    def cost(swap: Swap) -> Estimate:
        changed = [each for batch in batches for each in work.measure(swap, batch)]
        if direction == "spoil":
            return ratio(changed, sizes, seed=seed, bounds=(0.0, math.inf))
        return ratio([before - after for before, after in zip(kl, changed, strict=True)], sizes, seed=seed)

    costs = {swap.name: cost(swap) for swap in found.sites if work.has(swap, batches)}
    inner = dearest(found.weights, found.sites, costs)
    measure_weights(work, inner[:weights], batches, pace, clock)
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
        sha256=data.sha256 if len(taken) == len(data.ids) else digest([data.sha256, taken]),
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
        require_causal(folder, "can be blamed")
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
    context = context_within(context, networks, _DEFAULT_CONTEXT)
    sizes = [int(network.config.get_text_config().vocab_size) for network in networks]
    if sizes[0] != sizes[1]:
        raise DataError(
            f"{folders[0]} has a vocabulary of {sizes[0]} and {folders[1]} one of {sizes[1]}: their weights cannot be "
            "swapped; compare them with `tersely evaluate`"
        )

    count = samples or (_DEFAULT_SAMPLES if budget is None else _MOST_SAMPLES)

    def tokenized(tokenizer: Any) -> Sequences:
        return sequences(
            content,
            tokenizer,
            context=context,
            samples=count,
            seed=seed,
            purpose="blame",
            at_most=samples is None,
        )

    own, its = load_tokenizers(folders)
    data = tokenized(own)
    if its is own:
        return data, context
    theirs = tokenized(its)
    if len(data.ids) != len(theirs.ids) or not all(map(torch.equal, data.ids, theirs.ids)):
        raise DataError(
            f"the tokenizers of {folders[0]} and {folders[1]} cut this text differently: predictions cannot be "
            "compared token by token; give both the same tokenizer"
        )
    return data, context


def _order(
    done: MutableMapping[str, bytes], job: Mapping[str, Any], data: Sequences, budget: float | None, seed: int
) -> list[int]:
    """In which order sequences are taken; drawn, where time decides how many. Refuses results of another job."""
    name = digest(job).encode()
    if done.setdefault("job", name) != name:
        raise OutputError(
            "what is kept of an unfinished run belongs to another measurement; clear it, or keep both apart"
        )
    order = list(range(len(data.ids)))
    if budget is not None:
        random.Random(seed).shuffle(order)
    return order


def _unreached(
    sites: Sequence[Swap],
    inner: Sequence[Swap],
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
            f"{named('site', names) if any(s.block is None for s in left) else named('block', names)} {advice}"
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
        notes.append(f"weights of {named('block', missing)} {advice}")
    if weights and len(inner) > weights:
        notes.append(f"weights={weights}: {len(inner) - weights} other changed weights were not asked for")
    return notes


def _sampled(taken: int, available: int, kind: str, text: str, budget: float | None) -> list[str]:
    if taken == available:
        return []
    return [f"{taken} of {available} {kind} of {text} fitted into {budget:g} s"]


def _depths(work: Work, batches: Sequence[Batch], units: Sequence[str]) -> tuple[Depth, ...]:
    """Error and cosine behind each block, over all tokens but the first of each sequence."""
    sums = [work.whole(batch)["depth"] for batch in batches]
    found = []
    for n in range(len(work.networks.blocks)):
        difference, size, cosine, tokens = (math.fsum(each[n][place] for each in sums) for place in range(4))
        error = math.sqrt(difference / size) if size else 0.0
        found.append(Depth(units[n], n, error, cosine / tokens if tokens else 1.0))
    return tuple(found)
