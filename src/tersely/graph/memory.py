"""What stored weights fill of the parameters that transformers has in memory."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tersely.families import numbered
from tersely.graph.weight import Weight


@dataclass(frozen=True)
class Piece:
    """What a stored tensor fills of a parameter in memory: rows [start, start + rows) of slot `index`."""

    weight: Weight
    index: int | None
    """Slot along the parameter's first axis, or None where the parameter has no expert axis."""
    start: int
    rows: int


def pieces_of(weights: Sequence[Weight], memory: Mapping[str, str]) -> Mapping[str, tuple[Piece, ...]]:
    """What fills each parameter of a block, in order; memory: the block list's part of the family's table."""
    parameters: dict[str, tuple[Piece, ...]] = {}
    moved: set[str] = set()
    for parameter, text in memory.items():
        pieces: list[Piece] = []
        rows_filled: dict[int | None, int] = {}
        for term in text.split("+"):
            pattern = re.compile(numbered(term.strip()))
            for weight in weights:
                if weight.leaf == "weight" and pattern.fullmatch(weight.path):
                    start, rows = rows_filled.get(weight.expert, 0), weight.spec.shape[0]
                    pieces.append(Piece(weight, weight.expert, start, rows))
                    rows_filled[weight.expert] = start + rows
        if pieces:
            parameters[parameter] = tuple(pieces)
            moved |= {piece.weight.name for piece in pieces}
    for weight in weights:
        if weight.name not in moved:
            rows = weight.spec.shape[0] if weight.spec.shape else 1
            parameters[weight.parameter] = (Piece(weight, None, 0, rows),)
    return parameters


def slot(parameter: Tensor, piece: Piece) -> Tensor:
    """What a stored weight fills of a parameter."""
    part = parameter if piece.index is None else parameter[piece.index]
    return part[piece.start : piece.start + piece.rows]


def filled(parameter: Tensor, pieces: Sequence[Piece], values: Mapping[str, Tensor]) -> Tensor:
    """A parameter as transformers holds it, out of the weights that fill it.

    values: by stored name, linear ones as (outputs, inputs); what is not among them stays. The result has the dtype of
    the parameter, and gradients flow to the values.
    """

    def piece_of(piece: Piece) -> Tensor:
        value = values.get(piece.weight.name)
        if value is None:
            return slot(parameter, piece)
        return (value.t() if piece.weight.transposed else value).to(parameter.dtype)

    ordered = sorted(pieces, key=lambda piece: (piece.index or 0, piece.start))
    if len(ordered) == 1 and ordered[0].index is None:
        return piece_of(ordered[0])
    slots: dict[int | None, list[Tensor]] = {}
    for piece in ordered:
        slots.setdefault(piece.index, []).append(piece_of(piece))
    rows = [torch.cat(own) if len(own) > 1 else own[0] for own in slots.values()]
    return rows[0] if None in slots else torch.stack(rows)
