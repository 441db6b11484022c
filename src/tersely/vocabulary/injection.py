"""What a chat model knows of conversations, put back into a copy of it that has learnt new tokens.

Shapes: V rows of the old vocabulary, M of the new one, D coordinates.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tersely.checkpoint import Checkpoint
from tersely.errors import CheckpointError, UsageError
from tersely.graph import Graph, read_graph

_PARALLEL = 0.9995


@dataclass(frozen=True)
class ElChat:
    """Post-hoc injection (Yamaguchi et al., 2024, arXiv 2412.11704).

    A chat model got new tokens and was trained on plain text, its first two and last two blocks and its tables only,
    and forgot how to converse. What comes out has

    - the chat model's blocks, but for these four, which are mixed: (1 - t) adapted + t chat, t = `outer` in the first
      and the last block, `inner` in the second and the last but one (`slerp`: along the arc between the two tensors);
    - the tables of the adapted model (embedding, head, its bias), but for the rows of special tokens, which are the
      chat model's.

    The authors leave the biases of a block out; here each of its tensors is mixed.
    """

    outer: float = 0.3
    inner: float = 0.5
    slerp: bool = True

    def __post_init__(self) -> None:
        for name, share in (("outer", self.outer), ("inner", self.inner)):
            if not 0 <= share <= 1:
                raise UsageError(f"{name}={share:g}: the chat model's share; expected 0 to 1")


def inject(
    chat: Checkpoint, adapted: Checkpoint, special: Collection[int], settings: ElChat
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Unit ("model.layers.0", ..., "" for what lies outside the blocks) and its tensors by their names in `adapted`.

    special: ids of the special tokens, the same in both. One block of each model is in memory at a time. UsageError: a
    model with more than one list of blocks or fewer than four, no special token, or one that the chat model lacks;
    CheckpointError: models that are not one and the same but for their vocabulary, or values that are not finite.
    """
    theirs, own = read_graph(chat), read_graph(adapted)
    _compare(theirs, own, chat, adapted, special)
    last = len(own.units) - 1
    shares = {0: settings.outer, last: settings.outer, 1: settings.inner, last - 1: settings.inner}
    # transformers may write a tensor with the family's prefix or without it.
    names = {(w.unit, w.parameter): w.name for w in theirs.weights}
    for n, unit in enumerate([*own.units, ""]):
        made = {}
        for weight in own.unit(unit):
            new = adapted[weight.name]
            old = chat[names[unit, weight.parameter]]
            if not unit:
                by_token = "tokens" in (*weight.reads.spaces, *weight.writes.spaces)
                made[weight.name] = _restored(new, old, special) if by_token else old.to(new.dtype)
            elif n in shares:
                mixed = slerp if settings.slerp else linear
                made[weight.name] = mixed(new.float(), old.float(), shares[n]).to(new.dtype)
            else:
                made[weight.name] = old.to(new.dtype)
            if not bool(made[weight.name].isfinite().all()):
                raise CheckpointError(f"{weight.name}: a value is not finite in one of the models; give sound ones")
        yield unit, made


def linear(adapted: Tensor, chat: Tensor, share: float) -> Tensor:
    """(1 - share) adapted + share chat; either end exactly."""
    if share in (0, 1):
        return chat if share else adapted
    return (1 - share) * adapted + share * chat


def slerp(adapted: Tensor, chat: Tensor, share: float) -> Tensor:
    """Between two tensors along the arc, each taken whole, in float64; either end exactly.

        sin((1 - share) angle) / sin(angle) adapted + sin(share angle) / sin(angle) chat

    Linear where they are all but parallel (|cos| above 0.9995), or one is zero.
    """
    one, other = adapted.double().flatten(), chat.double().flatten()
    length = float(one.norm() * other.norm())
    cosine = float(one @ other) / length if length else 1.0
    if share in (0, 1) or abs(cosine) > _PARALLEL:
        return linear(adapted, chat, share)
    angle = torch.tensor(cosine, dtype=torch.float64).acos()
    first, second = (torch.sin(part * angle) / torch.sin(angle) for part in (1 - share, share))
    return (first * one + second * other).view(adapted.shape).to(adapted.dtype)


def _restored(table: Tensor, chat: Tensor, special: Collection[int]) -> Tensor:
    """Rows (or entries) of special tokens from the chat model."""
    ids = torch.tensor(sorted(special))
    table = table.clone()
    table[ids] = chat[ids].to(table.dtype)
    return table


def _compare(theirs: Graph, own: Graph, chat: Checkpoint, adapted: Checkpoint, special: Collection[int]) -> None:
    if len({w.stack for w in own.weights if w.unit}) != 1:
        raise UsageError(f"{adapted.source} has more than one list of blocks; post-hoc injection is for decoders")
    if len(own.units) < 4:
        raise UsageError(f"{adapted.source} has {len(own.units)} blocks; the first two and the last two need four")
    before = {(w.unit, w.parameter): w for w in theirs.weights}
    after = {(w.unit, w.parameter): w for w in own.weights}
    if theirs.family != own.family or before.keys() != after.keys():
        missing = sorted(".".join(filter(None, key)) for key in before.keys() ^ after.keys())
        raise CheckpointError(
            f"{chat.source} ({theirs.family.name}) and {adapted.source} ({own.family.name}) are not one model with "
            f"another vocabulary: only one has {', '.join(missing[:3]) or 'its family'}"
        )
    for key, weight in after.items():
        old, new = before[key].spec.shape, weight.spec.shape
        by_token = "tokens" in (*weight.reads.spaces, *weight.writes.spaces)
        if old[1:] != new[1:] or (old != new and not by_token):
            raise CheckpointError(f"{weight.name} is {list(old)} in {chat.source}, but {list(new)} in {adapted.source}")
        if by_token and (not special or not 0 <= min(special) <= max(special) < min(old[0], new[0])):
            most = min(old[0], new[0]) - 1
            raise UsageError(f"special tokens {sorted(special)[:5]}: expected ids that both models have, 0 to {most}")
