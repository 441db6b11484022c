"""AQLM: additive vector codebooks, fitted to a layer's outputs (Egiazarian et al., ICML 2024, arXiv 2401.06118).

Shapes: O outputs, I inputs, V inputs in a vector, N vectors per row (I / V), M codebooks, K entries of each, H
hypotheses of a beam, P points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersely.codecs import Encoded
from tersely.codecs.integer import check_group
from tersely.codecs.vectors import VectorForm, Vectors, sum_entries
from tersely.errors import UsageError
from tersely.measure import Statistics
from tersely.methods.protocol import Work

_MEANS_TURNS = 25
_SOLVE_TURNS = 20
_PRICE = 1e-4
"""Of a change of a codebook, relative to its share of the diagonal."""
_PRECISION = 1e-11
"""Of float32, squared: what is left below it is noise."""
_CHUNK = 1 << 24
"""Distances that are held at once."""


@dataclass(frozen=True)
class AQLM:
    """Each vector of `group` inputs of an output is scale_o times a sum of one entry from each codebook.

    Start: scales are root mean squares, codebooks are k-means of what those before them leave. Then in turns, as long
    as tr(D H D^T), D = W - W_hat, falls by `tolerance`: the least squares codebooks (conjugate gradients, where the
    authors take steps of Adam) and scales; and new codes, vector by vector given all others, by beam search over the
    codebooks. H is the Gram matrix with damping. The stored bits per weight are codebooks * bits / group, and the
    codebooks': 2 x 8 bits for 8 inputs (the default) suits large weights; small ones need small codebooks, such as 6
    bits for 4 inputs. The authors' tuning of whole blocks afterwards is not part of this.
    """

    name: ClassVar[str] = "aqlm"
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    row_wise: ClassVar[bool] = False
    keeps_zeros: ClassVar[bool] = False

    codebooks: int = 2
    bits: int = 8
    """Of a code: a codebook has 2^bits entries."""
    group: int = 8
    """Inputs in a vector."""
    beam: int = 4
    """Hypotheses that are kept in the search of the codes of a vector."""
    rounds: int = 10
    """At most."""
    tolerance: float = 0.01
    """A round that gains less is the last."""
    damping: float = 0.01
    """Added to the diagonal, relative to its mean."""
    minimum_tokens: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.codebooks <= 8:
            raise UsageError(f"codebooks={self.codebooks}: expected 1 to 8")
        if not 1 <= self.bits <= 16:
            raise UsageError(f"bits={self.bits}: codes of 1 to 16 bits can be stored")
        if self.group < 1:
            raise UsageError(f"group={self.group}: expected 1 or more inputs in a vector (8 is usual)")
        if self.beam < 1 or self.rounds < 1:
            raise UsageError(f"beam={self.beam}, rounds={self.rounds}: expected 1 or more of both")
        if not 0 <= self.tolerance < 1:
            raise UsageError(f"tolerance={self.tolerance}: expected a share from 0 to below 1 (0.01 is usual)")
        if not 0 <= self.damping <= 1:
            raise UsageError(f"damping={self.damping}: expected 0 to 1 (0.01 is usual)")
        if not self.minimum_tokens >= 0:
            raise UsageError(f"minimum_tokens={self.minimum_tokens}: expected 0 or more")

    def check(self, columns: int) -> None:
        check_group(self.group, columns)

    def forms(self, rows: int, columns: int) -> tuple[VectorForm]:  # noqa: ARG002 (of the protocol)
        return (VectorForm(self.codebooks, self.bits, self.group),)

    def work(self, rows: int, columns: int) -> Work:
        searched = 2.0 * rows * columns * self.codebooks * (1 << self.bits)
        turn = searched * self.beam + 2.0 * rows * columns**2 * (_SOLVE_TURNS + 5)
        return Work(
            flops=_MEANS_TURNS * searched + self.rounds * turn,
            loops=(self.rounds * columns // self.group + _MEANS_TURNS) * self.codebooks,
            memory=4 * columns**2 + 16 * rows * columns + 8 * _CHUNK,
        )

    def __call__(self, weight_OI: Tensor, stats: Statistics) -> Encoded:
        rows, columns = weight_OI.shape
        (form,) = self.forms(rows, columns)
        dtype, notes = weight_OI.dtype, []
        w = weight_OI.float()
        if stats.gram_II is None or stats.tokens < self.minimum_tokens * columns:
            notes.append(
                f"{stats.tokens} calibration tokens for {columns} inputs, fewer than {self.minimum_tokens:g} per "
                "input: fitted to the weight alone"
            )
            gram = torch.eye(columns, device=w.device)
        else:
            gram = damped(stats.gram_II, self.damping)
        entries, vectors = 1 << self.bits, rows * columns // self.group
        if entries > vectors:
            notes.append(f"codebooks of {entries} entries for {vectors} vectors; fewer bits would do")

        scale = w.square().mean(1, keepdim=True).sqrt().to(dtype).float()
        codes, books = start(w / torch.where(scale == 0, 1, scale), self.codebooks, entries, self.group)
        books = books.to(dtype).float()
        loss = output_loss(w, gram, codes, books, scale)
        for _ in range(self.rounds):
            next_books = solve_codebooks(w, gram, codes, books, scale)
            next_scale = solve_scales(w, gram, codes, next_books, scale).to(dtype).float()
            next_books = next_books.to(dtype).float()
            next_codes = search_codes(w, gram, codes, next_books, next_scale, self.beam)
            next_loss = output_loss(w, gram, next_codes, next_books, next_scale)
            gain = loss - next_loss
            if gain > 0:
                codes, books, scale, loss = next_codes, next_books, next_scale, next_loss
            if not gain > self.tolerance * (loss + gain):
                break
        return Encoded((Vectors(codes, books.to(dtype), scale.to(dtype), form),), "; ".join(notes))


def damped(gram_II: Tensor, damping: float) -> Tensor:
    """The Gram matrix over the mean of its diagonal, plus the damping on the diagonal; identity where it is zero."""
    mean = gram_II.diagonal().mean()
    if not mean > 0:
        return torch.eye(len(gram_II), device=gram_II.device)
    scaled = gram_II / mean
    scaled.diagonal().add_(damping)
    return scaled


def output_loss(weight_OI: Tensor, gram_II: Tensor, codes_ONM: Tensor, books_MKV: Tensor, scale_O1: Tensor) -> float:
    """tr(D gram D^T), D = W - W_hat."""
    delta = sum_entries(codes_ONM, books_MKV).mul_(scale_O1).sub_(weight_OI)
    return float((delta @ gram_II).mul_(delta).sum(dtype=torch.float64))


def start(weight_OI: Tensor, codebooks: int, entries: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes (O, N, M) int32 and codebooks (M, K, V): k-means of the vectors, then of what is left, and so on."""
    left_PV = weight_OI.reshape(-1, group)
    codes, books = [], []
    for _ in range(codebooks):
        book_KV, codes_P = cluster(left_PV, entries)
        left_PV = left_PV - book_KV[codes_P]
        books.append(book_KV)
        codes.append(codes_P.view(len(weight_OI), -1))
    return torch.stack(codes, -1).to(torch.int32), torch.stack(books)


def cluster(points_PV: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """Means (K, V) and the nearest mean of every point, (P,) int64, by Lloyd's algorithm from evenly spread points.

    A mean without points goes to the point that is farthest from its own.
    """
    count = len(points_PV)
    means_KV = points_PV[torch.arange(entries, device=points_PV.device) * count // entries]
    codes_P = nearest_entries(points_PV, means_KV)
    for _ in range(_MEANS_TURNS):
        sorted_P, counts_K = sort_codes(codes_P, entries)
        sums_KV = entry_sums(sorted_P, counts_K, points_PV)
        means_KV = torch.where(counts_K[:, None] > 0, sums_KV / counts_K[:, None].clamp_min(1), means_KV)
        empty = (counts_K == 0).nonzero()[:count, 0]
        if len(empty):
            far = (points_PV - means_KV[codes_P]).square().sum(1).argsort(descending=True, stable=True)
            means_KV[empty] = points_PV[far[: len(empty)]]
        before, codes_P = codes_P, nearest_entries(points_PV, means_KV)
        if torch.equal(before, codes_P):
            break
    return means_KV, codes_P


def nearest_entries(points_PV: Tensor, book_KV: Tensor) -> Tensor:
    """The entry nearest to each point, (P,) int64; the first of equal ones."""
    size_K = book_KV.square().sum(1)
    pieces = torch.split(points_PV, max(1, _CHUNK // len(book_KV)))
    return torch.cat([torch.addmm(size_K, piece, book_KV.t(), alpha=-2).argmin(1) for piece in pieces])


def sort_codes(codes_P: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """The points by their codes, (P,), and how many have each, (K,): what `entry_sums` needs."""
    return codes_P.argsort(stable=True), torch.bincount(codes_P, minlength=entries)


def entry_sums(sorted_P: Tensor, counts_K: Tensor, values_PV: Tensor) -> Tensor:
    """Sums (K, V) of the values of the points with each code, added in the same order on every run."""
    sums: Tensor = torch.segment_reduce(values_PV[sorted_P], "sum", lengths=counts_K, unsafe=True)
    return sums


def solve_codebooks(
    weight_OI: Tensor, gram_II: Tensor, codes_ONM: Tensor, books_MKV: Tensor, scale_O1: Tensor
) -> Tensor:
    """Codebooks with less tr(D gram D^T) for given codes and scales, by preconditioned conjugate gradients.

    What one codebook may add and another take away is not determined: a small price on every change keeps it in place.
    """
    codebooks, entries, group = books_MKV.shape
    orders = [sort_codes(codes_ONM[:, :, m].flatten(), entries) for m in range(codebooks)]

    def gathered(values_OI: Tensor) -> Tensor:
        values = (values_OI * scale_O1).view(-1, group)
        return torch.stack([entry_sums(*order, values) for order in orders])

    def applied(x_MKV: Tensor) -> Tensor:
        return gathered((sum_entries(codes_ONM, x_MKV) * scale_O1) @ gram_II)

    shape_OI = weight_OI.shape
    weights_MKV = gathered(gram_II.diagonal() * scale_O1.expand(shape_OI))
    inverse = torch.where(weights_MKV > 0, 1 / weights_MKV, 0)
    x = books_MKV.clone()
    wanted = gathered(weight_OI @ gram_II)
    left = wanted - applied(x)
    direction = inverse * left
    product = (left * direction).sum()
    smallest = _PRECISION * (wanted * inverse * wanted).sum()
    for _ in range(_SOLVE_TURNS):
        if not product > smallest:
            break
        image = applied(direction) + _PRICE * weights_MKV * direction
        step = product / (direction * image).sum()
        x += step * direction
        left -= step * image
        fixed = inverse * left
        product, before = (left * fixed).sum(), product
        direction = fixed + product / before * direction
    return x


def solve_scales(weight_OI: Tensor, gram_II: Tensor, codes_ONM: Tensor, books_MKV: Tensor, scale_O1: Tensor) -> Tensor:
    """The least squares scale of every output, w gram d / d gram d, d being its sum of entries."""
    summed_OI = sum_entries(codes_ONM, books_MKV)
    image_OI = summed_OI @ gram_II
    above, below = (image_OI * weight_OI).sum(1, keepdim=True), (image_OI * summed_OI).sum(1, keepdim=True)
    return torch.where(below > 0, above / below, scale_O1)


def search_codes(
    weight_OI: Tensor, gram_II: Tensor, codes_ONM: Tensor, books_MKV: Tensor, scale_O1: Tensor, beam: int
) -> Tensor:
    """New codes, (O, N, M) int32, with no more tr(D gram D^T): one vector after the other, given all others.

    Within a vector, hypotheses take a new entry from one codebook after the other, and the `beam` best are kept: with
    as many as entries and at most two codebooks, the best codes are found.
    """
    group = books_MKV.shape[2]
    codes = codes_ONM.clone()
    delta_OI = (sum_entries(codes, books_MKV) * scale_O1).sub_(weight_OI)
    slope_OI = delta_OI @ gram_II
    for n in range(codes.shape[1]):
        own = slice(n * group, (n + 1) * group)
        corner_VV = gram_II[own, own]
        value_OV = sum_entries(codes[:, n : n + 1], books_MKV) * scale_O1
        wanted_OV = value_OV @ corner_VV - slope_OI[:, own]
        step = max(1, _CHUNK // (beam * books_MKV.shape[1]))
        pieces = zip(
            torch.split(codes[:, n], step), torch.split(wanted_OV, step), torch.split(scale_O1, step), strict=True
        )
        codes[:, n] = torch.cat([_beam(c, w, s, corner_VV, books_MKV, beam) for c, w, s in pieces])
        change_OV = (sum_entries(codes[:, n : n + 1], books_MKV) * scale_O1).sub_(value_OV)
        slope_OI.addmm_(change_OV, gram_II[own])
    return codes


def _beam(
    codes_OM: Tensor, wanted_OV: Tensor, scale_O1: Tensor, corner_VV: Tensor, books_MKV: Tensor, beam: int
) -> Tensor:
    """Codes, (O, M), of the c with the least (s c) corner (s c) - 2 (s c) wanted."""
    rows, entries = len(codes_OM), books_MKV.shape[1]
    codes_OHM = codes_OM[:, None]
    scale = scale_O1[:, :, None]
    for m, book_KV in enumerate(books_MKV):
        others_OHV = scale * sum(
            (books_MKV[i][codes_OHM[:, :, i]] for i in range(len(books_MKV)) if i != m),
            torch.zeros((), device=wanted_OV.device),
        )
        others_OHV = others_OHV.expand(rows, codes_OHM.shape[1], book_KV.shape[1])
        image_OHV = others_OHV @ corner_VV
        pull_OHV = image_OHV - wanted_OV[:, None]
        own_OHK = 2 * scale * (pull_OHV @ book_KV.t()) + scale**2 * (book_KV @ corner_VV * book_KV).sum(1)
        rest_OH1 = (others_OHV * (pull_OHV - wanted_OV[:, None])).sum(2, keepdim=True)
        scores = (own_OHK + rest_OH1).flatten(1)
        best = scores.topk(min(beam, scores.shape[1]), largest=False).indices
        codes_OHM = codes_OHM.gather(1, (best // entries)[:, :, None].expand(-1, -1, len(books_MKV))).clone()
        codes_OHM[:, :, m] = best % entries
    return codes_OHM[:, 0]
