"""The weights of one checkpoint, the sizes of their spaces, and what is asked of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tersely.families import Family
from tersely.graph.memory import Piece, pieces_of
from tersely.graph.selection import select
from tersely.graph.weight import Weight


@dataclass(frozen=True)
class Graph:
    """The weights of one checkpoint, in table order, with the sizes of their spaces."""

    family: Family
    model_type: str
    weights: tuple[Weight, ...]
    units: tuple[str, ...]
    """Blocks in the order in which they run: "model.layers.0", ... (module names, prefix included)."""
    sizes: Mapping[str, int]
    """What the config gives: spaces, head counts, lengths of the block lists."""
    coordinates: Mapping[str, str]
    """Space -> the space whose coordinates it has ("attn_in" -> "residual"); every space is a key."""
    tied: bool
    """The head is not stored: it is the embedding. A stored head counts, whatever the config says."""
    head_space: str
    """What the head reads, stored or tied."""
    extra: tuple[str, ...]
    """Stored tensors that the model does not read (ignored buffers, blocks beyond the config's count)."""
    _by_name: Mapping[str, Weight] = field(repr=False, compare=False)
    _by_unit: Mapping[str, tuple[Weight, ...]] = field(repr=False, compare=False)

    def weight(self, name: str) -> Weight:
        return self._by_name[name]

    def unit(self, unit: str) -> tuple[Weight, ...]:
        """Weights of one block, or with "" those outside the blocks."""
        return self._by_unit.get(unit, ())

    def readers(self, space: str) -> tuple[Weight, ...]:
        return tuple(w for w in self.weights if w.kind != "bias" and space in w.reads.spaces)

    def writers(self, space: str) -> tuple[Weight, ...]:
        """Weights and biases that write a space."""
        return tuple(w for w in self.weights if space in w.writes.spaces)

    def size(self, space: str) -> int | None:
        """Number of coordinates of a space; None where no config key gives it."""
        return self.sizes.get(self.coordinates.get(space, space))

    @property
    def head(self) -> Weight | None:
        """The stored weight that gives the logits; None where it is tied to the embedding."""
        return next((w for w in self.weights if w.role == "head" and w.kind == "linear"), None)

    @property
    def has_experts(self) -> bool:
        return any(w.expert is not None for w in self.weights)

    def stages(self, unit: str) -> tuple[str, ...]:
        """Steps of a block in the order in which its weights run (q/k/v, then o, then gate/up, then down)."""
        return tuple(dict.fromkeys(w.stage for w in self.unit(unit) if w.kind == "linear"))

    def parameters(self, unit: str) -> Mapping[str, tuple[Piece, ...]]:
        """What fills each parameter and buffer that transformers has in memory for a block.

        Names are those inside the block ("mlp.experts.gate_up_proj"); for unit "" whole names of what is
        outside the blocks ("transformer.wte.weight", prefix included even where it is not stored).
        """
        weights = self.unit(unit)
        return pieces_of(weights, self.family.memory.get(f"{weights[0].stack}.{{i}}" if unit and weights else "", {}))

    def select(self, where: str) -> tuple[Weight, ...]:
        """Weights that a `where` pattern selects; the patterns are explained in docs/recipes.md.

        `|` joins alternatives, white space narrows, `!` negates. A term is `linear` (all linear weights of
        the blocks but routers), `attention`, `mlp`, `experts`, `router`, `head`, `blocks N` or
        `blocks A-B` (both ends included, counted over the whole model), or a glob on the path in the block
        or on the whole name (`mlp.*`, `*.down_proj`, `model.layers.0.*`).

        Routers and whatever lies outside the blocks (the head above all) are seldom meant. They are selected
        only by a term that can mean nothing else: `router`, `head`, or a glob that matches no other weight
        (`mlp.gate`, `lm_head`); so `mlp.*` and `!attention` leave the router of a mixture out. The table of
        embeddings is no linear weight; it is selected by the alternative `embedding` alone.

        Raises UsageError where a term matches nothing in the model, or an alternative selects nothing.
        """
        return select(where, self.weights, self.units, self.tied)
