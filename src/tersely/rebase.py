"""Change of basis of one space, in every weight that writes it and every weight that reads it.

One engine function for smoothing, rotating and cutting: from the family table alone, on the stored tensors. A
basis that keeps every coordinate leaves the model's output as it is.

With x the activations in a space as row vectors of N coordinates:

    Index(index_K)        x' = x[..., index_K]    a permutation, or a selection that drops coordinates
    Diagonal(scale_N)     x' = x * scale_N
    Orthogonal(basis_NN)  x' = x @ basis_NN

A weight (O, I) that writes x becomes basis.T @ weight, one that reads it weight @ inverse(basis).T.
Index and Orthogonal change the coordinates, and so all spaces that share them (residual with attn_in, mlp_in,
head_in ...); Diagonal changes one space, which is what folding a scale into a norm or a matrix is.

Shapes: N coordinates, K kept ones, H heads of D coordinates each, O outputs, I inputs.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from tersely.bases import Basis, Diagonal, Index, Orthogonal, along, axes, checked, precise, scaled
from tersely.errors import UsageError
from tersely.families import LOOKUPS
from tersely.graph import Graph, Weight


def rebase(
    graph: Graph,
    tensors: Mapping[str, Tensor],
    space: str,
    basis: Basis,
    *,
    unit: str = "",
    expert: int | None = None,
    only: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """The stored tensors that change when `space` gets a new basis, in their stored precision and layout.

    `unit` names the block of a space that each block has for itself (mlp, v, attn_in under a Diagonal ...)
    and is "" for one that runs through the model (residual); `expert` likewise. For the spaces that attention
    mixes (v, attn) a basis is inside a head: of the size of one head, for all heads; or an Index or Diagonal
    of the size of v, for each key/value head in turn (query heads that share it get the same).

    `only`: of these tensors, so that a space that runs through the model can be changed a few at a time.
    An Index that drops coordinates changes shapes; the config is the caller's to change.

    Raises UsageError, with the space and the reason, where the change would not leave the function alone.
    """
    scope = _scope(graph, space, basis, unit, expert)
    weights = _weights(graph, scope, unit, expert)
    _refuse(graph, tensors, space, basis, scope, weights, only)
    bases = _bases(graph, space, basis, scope)
    changed: dict[str, Tensor] = {}
    for weight in weights:
        if only is not None and weight.name not in only:
            continue
        old = tensors[weight.name]
        new = old
        for dim, axis, reads in axes(weight):
            if any(part.space in bases for part in axis.parts):
                new = along(graph, weight, new, dim, axis, bases, reads)
        if new is not old:
            changed[weight.name] = new.contiguous()
    return changed


def check_rebase(
    graph: Graph, tensors: Mapping[str, Tensor], space: str, basis: Basis, *, unit: str = "", expert: int | None = None
) -> None:
    """What `rebase` would raise, without reading a matrix. An Orthogonal one passes where norms could yet be folded."""
    scope = _scope(graph, space, basis, unit, expert)
    _refuse(graph, tensors, space, basis, scope, _weights(graph, scope, unit, expert), only=())
    if not isinstance(basis, Orthogonal):  # whose own check is a product of matrices
        _bases(graph, space, basis, scope)


def fold_norms(
    graph: Graph,
    tensors: Mapping[str, Tensor],
    space: str = "residual",
    *,
    only: Collection[str] | None = None,
    readers: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """The stored tensors that change when the gain of each norm that reads `space` goes into its readers.

    weight (O, I) -> weight * gain_I, gain -> 1, norm bias -> bias / gain: what a rotation of the space needs
    first. A norm that writes a space which others write too (Gemma's after attention) cannot be folded and
    stays; `rebase` then says so.

    `only`: of these norms, and `readers`: into these weights, so that a model can be changed a few at a time. Raises
    UsageError where a gain cannot go into a head tied to the embedding, or is zero with a bias.
    """
    _known(graph, space)
    changed: dict[str, Tensor] = {}
    group = _same_coordinates(graph, space)
    for norm in graph.weights:
        if norm.kind != "norm" or norm.reads.spaces[0] not in group or not _foldable(graph, norm):
            continue
        if only is not None and norm.name not in only:
            continue
        target = norm.writes.spaces[0]
        if graph.tied and target == graph.head_space:
            raise UsageError(
                f"{target}: the gain of {norm.name} cannot go into the head, which is tied to the embedding; "
                "untie the model first (store lm_head, tie_word_embeddings = false)"
            )
        stored = tensors[norm.name]
        gain_N = stored.to(precise(stored)) + graph.family.norm_offset
        changed[norm.name] = torch.full_like(stored, 1 - graph.family.norm_offset)
        unit = norm.unit
        near = graph.weights if _global(graph, target) else graph.unit(unit)
        bias = next((w for w in graph.unit(unit) if w.path == norm.path and w.kind == "bias"), None)
        if bias is not None:
            bias_N = tensors[bias.name]
            if bool(((gain_N == 0) & (bias_N != 0)).any()):
                raise UsageError(f"{target}: {norm.name} has a gain of zero where its bias is not; it cannot be folded")
            folded_N = bias_N.to(gain_N.dtype) / torch.where(gain_N == 0, torch.ones_like(gain_N), gain_N)
            changed[bias.name] = folded_N.to(bias_N.dtype)
        for weight in near:
            if (
                weight.kind == "linear"
                and target in weight.reads.spaces
                and (readers is None or weight.name in readers)
            ):
                old = changed[weight.name] if weight.name in changed else tensors[weight.name]
                changed[weight.name] = scaled(old, gain_N, 0 if weight.transposed else 1)
    return changed


def _known(graph: Graph, space: str) -> None:
    if space not in graph.coordinates:
        near = difflib.get_close_matches(space, graph.coordinates, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"they are {', '.join(graph.coordinates)}"
        raise UsageError(f"{space}: this model has no space of that name; {hint}")


def _same_coordinates(graph: Graph, space: str) -> frozenset[str]:
    own = graph.coordinates[space]
    return frozenset(s for s, c in graph.coordinates.items() if c == own)


def _global(graph: Graph, space: str) -> bool:
    """Whether a space runs through the model: something outside the blocks writes or reads it."""
    outside = {s for w in graph.unit("") for axis in (w.reads, w.writes) for s in axis.spaces}
    return space in outside or space == graph.head_space


def _scope(graph: Graph, space: str, basis: Basis, unit: str, expert: int | None) -> frozenset[str]:
    """The spaces that change together; checks that `unit` and `expert` say where."""
    _known(graph, space)
    mixed = next((pair for pair in graph.family.mixes.items() if space in pair), None)
    if mixed:
        spaces = frozenset(mixed)
    else:
        spaces = frozenset({space}) if isinstance(basis, Diagonal) else _same_coordinates(graph, space)
    wide = any(_global(graph, s) for s in spaces)
    if wide and unit:
        raise UsageError(f"{space}: runs through the whole model, not through {unit} alone; leave the unit out")
    if not wide and unit not in graph.units:
        known = f"{graph.units[0]} to {graph.units[-1]}"
        raise UsageError(f"{space}: each block has its own; name one as unit ({known}), not {unit!r}")
    touching = [w for w in graph.unit(unit) if spaces & {*w.reads.spaces, *w.writes.spaces}]
    if not wide and not touching:
        raise UsageError(f"{space}: {unit} has no weight that reads or writes it")
    experts = {w.expert for w in touching}
    each = not wide and None not in experts
    if each != (expert is not None) or (each and expert not in experts):
        own = f"each of {len(experts)} experts has its own; name one" if each else "it is not an expert's own"
        raise UsageError(f"{space}: expert = {expert}, but {own}")
    return spaces


def _weights(graph: Graph, scope: frozenset[str], unit: str, expert: int | None) -> list[Weight]:
    return [
        w
        for w in (graph.unit(unit) if unit else graph.weights)
        if scope & {*w.reads.spaces, *w.writes.spaces} and (expert is None or w.expert == expert)
    ]


def _refuse(
    graph: Graph,
    tensors: Mapping[str, Tensor],
    space: str,
    basis: Basis,
    scope: frozenset[str],
    weights: Sequence[Weight],
    only: Collection[str] | None,
) -> None:
    """Raise UsageError where the change of basis would change the function; gains of norms are read of `only` these."""
    readers = [w for w in weights if w.kind != "bias" and scope & set(w.reads.spaces)]
    norms = [w for w in weights if w.kind == "norm"]
    acts = [w for w in weights if any(p.act and p.space in scope for p in w.writes.parts)]
    fixed = sorted((scope & LOOKUPS) - {"tokens"})
    if fixed:
        raise UsageError(f"{space}: {fixed[0]} are given by the model's own code and cannot change")
    if "tokens" in scope and not isinstance(basis, Index):
        raise UsageError(f"{space}: token ids can be selected or reordered, not scaled or rotated")
    if isinstance(basis, Diagonal):
        stop = next((w for w in readers if w.kind == "norm"), None)
        if stop is not None:
            raise UsageError(f"{space}: {stop.name} reads it, and a norm does not let a scale pass")
        table = any(w.kind == "lookup" and w.reads.spaces == ("tokens",) for w in weights)
        if graph.tied and (table or graph.head_space in scope):
            raise UsageError(f"{space}: the head is tied to the embedding and both would change; untie first")
    if not any(w.kind in ("linear", "lookup") for w in readers):
        raise UsageError(
            f"{space}: no weight reads it (attention scores, a router or the output do), so its coordinates "
            "are fixed by the model's own code"
        )
    if isinstance(basis, Diagonal) and not any(p.space in scope and not p.act for w in weights for p in w.writes.parts):
        paths = ", ".join(w.path for w in acts if w.kind != "bias")
        raise UsageError(f"{space}: only act(...) weights write it ({paths}), and no scale passes their non-linearity")
    if isinstance(basis, Orthogonal):
        if acts:
            raise UsageError(f"{space}: a non-linearity after {acts[0].name} acts on each of its coordinates")
        for norm in norms:
            if not _foldable(graph, norm):
                gain = tensors[norm.name].float() + graph.family.norm_offset
                if not bool((gain == 1).all()):
                    written = norm.writes.spaces[0]
                    raise UsageError(
                        f"{space}: {norm.name} writes {written} directly, so that its gain cannot be folded "
                        "into what follows; a rotation does not pass it"
                    )
        if norms and graph.family.norm == "layer" and not _keeps_mean(basis.basis_NN):
            raise UsageError(
                f"{space}: {norms[0].name} is a LayerNorm and subtracts the mean over the coordinates; only "
                "a rotation that maps the all-ones vector to plus or minus itself passes it"
            )
        for norm in norms:
            if only is not None and norm.name not in only:
                continue
            gain = tensors[norm.name].float() + graph.family.norm_offset
            if not bool((gain == 1).all()):
                raise UsageError(f"{space}: the gain of {norm.name} is not folded into its readers; fold_norms first")


def _foldable(graph: Graph, norm: Weight) -> bool:
    """Whether nothing but this norm writes what it writes, and nothing but matrices read it."""
    target = norm.writes.spaces[0]
    near = graph.weights if _global(graph, target) else graph.unit(norm.unit)
    others = [w for w in near if target in w.writes.spaces and (w.unit, w.path) != (norm.unit, norm.path)]
    readers = [w for w in near if w.kind != "bias" and target in w.reads.spaces]
    head = graph.tied and target == graph.head_space
    return not others and all(w.kind == "linear" for w in readers) and (bool(readers) or head)


def _keeps_mean(basis_NN: Tensor) -> bool:
    sums_N = basis_NN.double().sum(0)
    return bool(torch.allclose(sums_N, torch.sign(sums_N[:1]).expand_as(sums_N), atol=1e-4))


def _bases(graph: Graph, space: str, basis: Basis, scope: frozenset[str]) -> Mapping[str, Basis]:
    """The basis of each space of the scope, checked; of mixed spaces, as long as the axis or a head."""
    mixed = next((pair for pair in graph.family.mixes.items() if space in pair), None)
    if mixed is None:
        size = graph.size(space)
        return dict.fromkeys(scope, checked(space, basis, (size,) if size is not None else ()))
    whole, part = (graph.size(s) for s in mixed)
    if whole is None or part is None:
        raise UsageError(f"{space}: config.json does not give its size")
    shared = graph.sizes["heads"] // graph.sizes["kv_heads"]
    head = part // graph.sizes["kv_heads"]
    if isinstance(basis, Orthogonal):
        return dict.fromkeys(mixed, checked(space, basis, (head,)))
    heads = part // head
    if isinstance(basis, Diagonal):
        checked(space, basis, (head, part))
        scale_HD = basis.scale_N.view(-1, head).expand(heads, head)
        return {
            mixed[1]: Diagonal(scale_HD.reshape(-1)),
            mixed[0]: Diagonal(scale_HD.repeat_interleave(shared, 0).reshape(-1)),
        }
    checked(space, basis, (part,))
    index_K = basis.index_K
    if int(index_K.max()) < head:
        kept_HK = index_K.expand(heads, -1)
    else:
        kept_HK = index_K.view(heads, -1) % head if len(index_K) % heads == 0 else index_K[None]
        if not torch.equal((kept_HK + torch.arange(heads)[:, None] * head).reshape(-1), index_K):
            raise UsageError(f"{space}: each of its {heads} heads must keep as many of its own coordinates, in turn")
    kept = {mixed[1]: kept_HK, mixed[0]: kept_HK.repeat_interleave(shared, 0)}
    return {s: Index((k + torch.arange(len(k))[:, None] * head).reshape(-1)) for s, k in kept.items()}
