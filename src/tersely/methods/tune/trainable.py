"""Parts of an encoded weight as something that gradients move.

What runs is always what is stored: `weight` has the value of `part().decode()`, bit for bit, and the gradients of a
smooth stand-in ("straight-through", Bengio et al., arXiv 1308.3432).

Two kinds of tensors move, both without units, so that one rate suits every weight:

- latents: where a code would lie if it were a real number, in steps of its grid. `settle` moves codes towards them.
- values: relative changes of scales, tables and codebooks, and of real zero points in steps of the grid.

Shapes: O outputs, I inputs, G groups per row, g inputs of a group, R rows of scales; V inputs in a vector, N vectors
per row, M codebooks, K entries of each or of a table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, final

import torch
from torch import Tensor

from tersely.codecs import Encoded, Form, IntegerForm, Integers, Part
from tersely.codecs.affine import Affine, AffineForm
from tersely.codecs.codebook import Lookup, LookupForm, nearest_labels
from tersely.codecs.ternary import Ternary, TernaryForm
from tersely.codecs.vectors import VectorForm, Vectors, sum_entries
from tersely.methods.encode.aqlm import nearest_entries

_EDGE = 0.49
"""Half a step of a grid, less a margin: a latent so far from a code still rounds to it."""
_UNIFORM = 12**0.5
"""The step of a grid over the root mean square of what rounding to it loses."""


class Trainable(Protocol):
    """A part, and what may move of it."""

    latents: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def smooth(self) -> Tensor:
        """The weight, (O, I) float32, up to the rounding of what is stored; differentiable."""
        ...

    def settle(self, limit: float, forget: float) -> None:
        """Move at most a share `limit` of the codes to where their latents are, the farthest first; then let all
        latents forget a share `forget` of their distance from their codes."""
        ...

    def part(self) -> Part:
        """As it would be stored now."""
        ...


def movable(forms: Sequence[Form]) -> bool:
    """Whether anything of parts of these forms can move."""
    return any(isinstance(form, IntegerForm | AffineForm | TernaryForm | LookupForm | VectorForm) for form in forms)


def trainable(encoded: Encoded, weight_OI: Tensor, reach: float = math.inf) -> tuple[Trainable, ...]:
    """Views of all parts, which begin at exactly these parts.

    weight_OI: what was encoded; latents begin as near to it as they can without leaving their codes.
    reach: how far latents may go from there; where it is finite, a scale that grows takes codes towards zero with it.
    Parts of other forms than integers, affine integers, trits, vectors and tables stay as they are.
    """
    decoded = [part.decode().float() for part in encoded.parts]
    views: list[Trainable] = []
    for place, part in enumerate(encoded.parts):
        others = sum((d for i, d in enumerate(decoded) if i != place), torch.zeros(()))
        if isinstance(part, Integers | Affine | Ternary):
            views.append(Grid(part, weight_OI.float() - others, reach))
        elif isinstance(part, Vectors):
            views.append(Codebooks(part, weight_OI.float() - others))
        elif isinstance(part, Lookup):
            views.append(Tables(part, weight_OI.float() - others))
        else:
            views.append(Fixed(part))
    return tuple(views)


def weight(views: tuple[Trainable, ...]) -> Tensor:
    """The weight, (O, I) float32: the value of what would be stored, the gradient of its smooth stand-in."""
    smooth = torch.stack([view.smooth() for view in views]).sum(0) if len(views) > 1 else views[0].smooth()
    return smooth + (encoded(views).decode().float() - smooth).detach()


def encoded(views: tuple[Trainable, ...], note: str = "") -> Encoded:
    """As it would be stored now."""
    return Encoded(tuple(view.part() for view in views), note)


@final
class Parts:
    """A weight of which each part moves by itself: what runs is always what would be stored."""

    def __init__(self, encoded: Encoded, weight_OI: Tensor, reach: float) -> None:
        """As `trainable` takes them."""
        self._views, self._note = trainable(encoded, weight_OI, reach), encoded.note

    @property
    def latents(self) -> tuple[Tensor, ...]:
        return tuple(latent for view in self._views for latent in view.latents)

    @property
    def values(self) -> tuple[Tensor, ...]:
        return tuple(value for view in self._views for value in view.values)

    def begin(self, share: float) -> None:
        pass

    def moving(self) -> Tensor:
        return weight(self._views)

    def settle(self, limit: float, forget: float) -> None:
        for view in self._views:
            view.settle(limit, forget)

    def stored(self) -> Encoded:
        return encoded(self._views, self._note)


@final
class Grid:
    """Codes on a grid with scales: integers, affine integers and trits.

        w = scale (code - shift)        scale = scale_0 (1 + value)        latent = start + moved

    Codes count from the zero point, which is fixed but for the shift of affine integers. `start` is w / scale_0, as
    far as it rounds to the code. With a finite reach it is divided by 1 + value, as in AutoRound, and |moved| <= reach.
    """

    def __init__(self, part: Integers | Affine | Ternary, weight_OI: Tensor, reach: float) -> None:
        self._part, self._reach = part, reach
        stored = part.scale_RG if isinstance(part, Ternary) else part.scale_OG
        self._scale_RG1 = stored.float()[:, :, None]
        rows, columns = part.codes_OI.shape
        self._shape = (rows, stored.shape[1], columns // stored.shape[1])
        levels, zero = _levels(part, self._scale_RG1)
        self._low, self._high = -zero, levels - zero
        self.codes_OGg = part.codes_OI.float().view(self._shape) - zero
        start = weight_OI.reshape(self._shape) / self._scale_RG1
        self._start_OGg = torch.minimum(torch.maximum(start, self.codes_OGg - _EDGE), self.codes_OGg + _EDGE)
        self._moved_OGg = torch.zeros_like(self._start_OGg, requires_grad=True)
        self._grown_RG1 = torch.zeros_like(self._scale_RG1, requires_grad=True)
        self.latents: tuple[Tensor, ...] = (self._moved_OGg,)
        self.values: tuple[Tensor, ...] = (self._grown_RG1,)
        self._shift_RG1 = torch.zeros_like(self._scale_RG1)
        if isinstance(part, Affine):
            self.values = (self._grown_RG1, self._shift_RG1.requires_grad_())

    def latent(self) -> Tensor:
        """(O, G, g), in steps of the grid from zero."""
        start = self._start_OGg if math.isinf(self._reach) else self._start_OGg / (1 + self._grown_RG1)
        return start + self._moved_OGg

    def smooth(self) -> Tensor:
        latent = self.latent()
        # Beyond the grid a code is that of its end, wherever the latent is.
        inside = (latent >= self._low - _EDGE) & (latent <= self._high + _EDGE)
        latent = torch.where(inside, latent, latent.detach())
        code = latent + (self.codes_OGg - latent).detach()
        return (self._scale_RG1 * (1 + self._grown_RG1) * (code - self._shift_RG1)).flatten(1)

    @torch.no_grad()
    def settle(self, limit: float, forget: float) -> None:
        self._grown_RG1.clamp_(min=-0.5)
        if not math.isinf(self._reach):
            self._moved_OGg.clamp_(-self._reach, self._reach)
        latent = torch.minimum(torch.maximum(self.latent(), self._low - _EDGE), self._high + _EDGE)
        # Offsets from zero may be broken numbers, and rounding is to whole codes.
        wanted = (latent - self._low).round_().add_(self._low)
        wanted = torch.minimum(torch.maximum(wanted, self._low), self._high)
        distance = torch.where(wanted == self.codes_OGg, 0.0, (latent - self.codes_OGg).abs())
        moves = farthest(distance.flatten(), limit).view(self._shape)
        self.codes_OGg = torch.where(moves, wanted, self.codes_OGg)
        if math.isinf(self._reach):
            # What lies beyond the grid is dropped, so that a latent comes back at once.
            latent.sub_(latent.sub(self.codes_OGg), alpha=forget)
            self._moved_OGg.copy_(latent.sub_(self._start_OGg))

    def part(self) -> Integers | Affine | Ternary:
        part = self._part
        codes = (self.codes_OGg.detach() - self._low).round_().to(torch.uint8).flatten(1)
        scale = (self._scale_RG1 * (1 + self._grown_RG1.detach()))[:, :, 0]
        if isinstance(part, Ternary):
            return replace(part, codes_OI=codes, scale_RG=scale.to(part.scale_RG.dtype))
        part = replace(part, codes_OI=codes, scale_OG=scale.to(part.scale_OG.dtype))
        if isinstance(part, Affine):
            zero = (self._shift_RG1.detach() - self._low)[:, :, 0]
            return replace(part, zero_OG=zero.to(part.zero_OG.dtype))
        return part


def _levels(part: Integers | Affine | Ternary, like_RG1: Tensor) -> tuple[int, Tensor]:
    """The largest code, and the code of zero by group, (R, G, 1)."""
    if isinstance(part, Ternary):
        return 2, torch.ones_like(like_RG1)
    levels = (1 << part.form.bits) - 1
    if part.zero_OG is None:
        return levels, torch.full_like(like_RG1, float(1 << (part.form.bits - 1)))
    return levels, part.zero_OG.float()[:, :, None]


@final
class Codebooks:
    """Sums of entries of codebooks, times a scale for each output.

    Latents are copies of the vectors before their scales, which begin at the sums, as in PV-Tuning. A vector's codes
    are searched one codebook after the other, each time for the nearest entry; with one codebook that is exact.
    """

    def __init__(self, part: Vectors, weight_OI: Tensor) -> None:
        self._part = part
        self._books_MKV, self._scale_O1 = part.codebooks_MKV.float(), part.scale_O1.float()
        self._sizes_M11 = self._books_MKV.square().mean((1, 2), keepdim=True).sqrt()
        self._codes_ONM = part.codes_ONM.clone()
        summed = sum_entries(self._codes_ONM, self._books_MKV)
        lost = weight_OI / torch.where(self._scale_O1 == 0, 1, self._scale_O1) - summed
        self._step = float(lost.square().mean().sqrt()) * _UNIFORM or 1.0
        self._start_OI = summed
        self._moved_OI = torch.zeros_like(summed, requires_grad=True)
        self._shifted_MKV = torch.zeros_like(self._books_MKV, requires_grad=True)
        self._grown_O1 = torch.zeros_like(self._scale_O1, requires_grad=True)
        self.latents: tuple[Tensor, ...] = (self._moved_OI,)
        self.values: tuple[Tensor, ...] = (self._shifted_MKV, self._grown_O1)

    def books(self) -> Tensor:
        return self._books_MKV + self._sizes_M11 * self._shifted_MKV

    def smooth(self) -> Tensor:
        summed = sum_entries(self._codes_ONM, self.books())
        passed = self._step * (self._moved_OI - self._moved_OI.detach())
        return self._scale_O1 * (1 + self._grown_O1) * (summed + passed)

    @torch.no_grad()
    def settle(self, limit: float, forget: float) -> None:
        books = self.books()
        rows, vectors, _ = self._codes_ONM.shape
        latent_PV = (self._start_OI + self._step * self._moved_OI).view(rows * vectors, -1)
        codes_PM = self._codes_ONM.view(rows * vectors, -1)
        far = latent_PV - sum_entries(codes_PM[:, None], books)
        # Of those that have not moved, none is searched.
        moves = farthest(torch.where(self._moved_OI.view_as(far) == 0, 0, far).square().sum(1), limit)
        codes_PM[moves] = nearer_codes(latent_PV[moves], codes_PM[moves], books)
        if forget:
            latent_PV += forget * (sum_entries(codes_PM[:, None], books) - latent_PV)
            self._moved_OI.copy_((latent_PV.view(rows, -1) - self._start_OI) / self._step)

    def part(self) -> Vectors:
        part = self._part
        books = self.books().detach().to(part.codebooks_MKV.dtype)
        scale = (self._scale_O1 * (1 + self._grown_O1.detach())).to(part.scale_O1.dtype)
        return replace(part, codes_ONM=self._codes_ONM.clone(), codebooks_MKV=books, scale_O1=scale)


@final
class Tables:
    """Labels into a table of values for each output. Latents are copies of the weights, which begin at their values."""

    def __init__(self, part: Lookup, weight_OI: Tensor) -> None:
        self._part = part
        self._table_OK, self._labels_OI = part.table_OK.float(), part.labels_OI.long()
        self._size_O1 = self._table_OK.square().mean(1, keepdim=True).sqrt()
        self._start_OI = self._table_OK.gather(1, self._labels_OI)
        lost_O1 = (weight_OI - self._start_OI).square().mean(1, keepdim=True).sqrt()
        self._step_O1 = torch.where(lost_O1 == 0, 1, lost_O1 * _UNIFORM)
        self._moved_OI = torch.zeros_like(self._start_OI, requires_grad=True)
        self._shifted_OK = torch.zeros_like(self._table_OK, requires_grad=True)
        self.latents: tuple[Tensor, ...] = (self._moved_OI,)
        self.values: tuple[Tensor, ...] = (self._shifted_OK,)

    def table(self) -> Tensor:
        return self._table_OK + self._size_O1 * self._shifted_OK

    def smooth(self) -> Tensor:
        passed = self._step_O1 * (self._moved_OI - self._moved_OI.detach())
        return self.table().gather(1, self._labels_OI) + passed

    @torch.no_grad()
    def settle(self, limit: float, forget: float) -> None:
        ascending, order = self.table().sort(1)
        latent = self._start_OI + self._step_O1 * self._moved_OI
        wanted = order.gather(1, nearest_labels(latent, ascending).long())
        distance = (latent - self.table().gather(1, self._labels_OI)).abs() / self._step_O1
        distance[(wanted == self._labels_OI) | (self._moved_OI == 0)] = 0
        moves = farthest(distance.flatten(), limit).view(distance.shape)
        self._labels_OI = torch.where(moves, wanted, self._labels_OI)
        if forget:
            latent += forget * (self.table().gather(1, self._labels_OI) - latent)
            self._moved_OI.copy_((latent - self._start_OI) / self._step_O1)

    def part(self) -> Lookup:
        table = self.table().detach().to(self._part.table_OK.dtype)
        return replace(self._part, labels_OI=self._labels_OI.to(torch.uint8), table_OK=table)


@final
class Fixed:
    """A part of which nothing moves."""

    latents: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()

    def __init__(self, part: Part) -> None:
        self._part = part
        self._decoded_OI = part.decode().float()

    def smooth(self) -> Tensor:
        return self._decoded_OI

    def settle(self, limit: float, forget: float) -> None:
        pass

    def part(self) -> Part:
        return self._part


def farthest(distance_P: Tensor, limit: float) -> Tensor:
    """Which of them are not zero and, where those are more than a share `limit` of all, among the largest."""
    moves = distance_P > 0
    most = int(limit * len(distance_P))
    if int(moves.sum()) <= most:
        return moves
    chosen = torch.zeros_like(moves)
    chosen[torch.topk(distance_P, most).indices] = True
    return chosen


def nearer_codes(points_PV: Tensor, codes_PM: Tensor, books_MKV: Tensor) -> Tensor:
    """Codes, (P, M), whose sums are no farther from the points than those given."""
    codes = codes_PM.clone()
    for m, book_KV in enumerate(books_MKV):
        others = sum_entries(codes[:, None], books_MKV) - book_KV[codes[:, m]]
        codes[:, m] = nearest_entries(points_PV - others, book_KV).to(codes.dtype)
    return codes
