"""Weighted clustering of numbers: tables of K values that lose little.

    loss = sum_i p_i (v_i - t_label(i))^2,   label(i) the nearest value of the table t

Each row is a problem of its own. In ascending order a cluster is a stretch, so that sums over it are differences of
running sums: a step of k-means costs one binary search per cluster, however many numbers there are.

Shapes: R rows, N numbers of a row, K clusters; E edges, one more than there are numbers or stretches. All in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

_ENDS = 64
"""Edges that are worked on at once."""


@dataclass(frozen=True)
class Ordered:
    """Numbers in ascending order with the running sums of their weights."""

    value_RN: Tensor
    mass_RE: Tensor
    """Sum of the weights before each number; the last column is the sum of all."""
    moment_RE: Tensor
    """The same of weight * number."""

    @property
    def count(self) -> int:
        """N."""
        return self.value_RN.shape[1]


def order(value_RN: Tensor, weight_RN: Tensor) -> Ordered:
    """Sort numbers; weights are none below 0, relative to the largest of their row, and 1 where a row has none."""
    value, index = value_RN.float().sort(dim=1, stable=True)
    weight = weight_RN.double().gather(1, index)
    largest = weight.amax(1, keepdim=True)
    weight = torch.where(largest > 0, weight / largest, 1.0)
    moment = weight * value
    return Ordered(value.double(), pad(weight.cumsum(1), (1, 0)), pad(moment.cumsum(1), (1, 0)))


def distinct(numbers: Ordered, clusters: int) -> tuple[Tensor, Tensor]:
    """Rows, (R,) bool, that have at most `clusters` different numbers; a table, (R, K), that holds these."""
    value = numbers.value_RN
    rank = pad((value.diff(dim=1) != 0).cumsum(1), (1, 0))
    # One place more, for all that have none.
    table = value[:, -1:].repeat(1, clusters + 1).scatter_(1, rank.clamp(max=clusters), value)
    return rank[:, -1] < clusters, table[:, :clusters]


def start(numbers: Ordered, clusters: int) -> Tensor:
    """A table, (R, K), for k-means to start from: the best whose clusters consist of whole stretches.

    The stretches are as dense as the values of a good table: as the cube root of weight per length (Panter and Dite,
    Proc. IRE 1951), summed over the numbers with the length up to their neighbours.
    """
    stretches = stretches_for(clusters)
    if numbers.count <= stretches:
        return exact(numbers, clusters)
    gap = numbers.value_RN.diff(dim=1)
    density = numbers.mass_RE.diff(dim=1).pow(1 / 3) * (pad(gap, (1, 0)) + pad(gap, (0, 1))).pow(2 / 3)
    running = density.cumsum(1)
    share = torch.arange(1, stretches, device=running.device, dtype=running.dtype) / stretches
    edges = pad(pad(torch.searchsorted(running, share * running[:, -1:]), (1, 0)), (0, 1), value=numbers.count)
    chosen = _best_edges(numbers.mass_RE.gather(1, edges), numbers.moment_RE.gather(1, edges), clusters)
    return _means(numbers, edges.gather(1, chosen))


def stretches_for(clusters: int) -> int:
    """How many are weighed up for a start. With 4 for each cluster k-means ends within half a percent of the optimum,
    on the mean; for large tables, whose work grows as the cube, they are fewer."""
    return max(clusters, min(4 * clusters, 128))


def kmeans(numbers: Ordered, table_RK: Tensor, iterations: int) -> Tensor:
    """Lloyd's iteration from an ascending table: the loss never grows. Clusters without weight keep their value."""
    edges = _edges(numbers, table_RK)
    for _ in range(iterations):
        table_RK = _means(numbers, edges, table_RK)
        moved = _edges(numbers, table_RK)
        if torch.equal(moved, edges):
            break
        edges = moved
    return table_RK


def exact(numbers: Ordered, clusters: int) -> Tensor:
    """The table, (R, K), that loses least of all: dynamic programming, of order K N^2."""
    return _means(numbers, _best_edges(numbers.mass_RE, numbers.moment_RE, clusters))


def loss(numbers: Ordered, table_RK: Tensor) -> Tensor:
    """The loss of an ascending table less sum p v^2, which no table changes, of each row, (R,)."""
    edges = _edges(numbers, table_RK)
    mass, moment = numbers.mass_RE.gather(1, edges).diff(dim=1), numbers.moment_RE.gather(1, edges).diff(dim=1)
    return (table_RK * (table_RK * mass - 2 * moment)).sum(1)


def _edges(numbers: Ordered, table_RK: Tensor) -> Tensor:
    """Where each cluster starts among the numbers, (R, K + 1); a number in the middle goes to the lower one."""
    middles = (table_RK[:, 1:] + table_RK[:, :-1]) / 2
    inner = torch.searchsorted(numbers.value_RN, middles, right=True)
    return pad(pad(inner, (1, 0)), (0, 1), value=numbers.count)


def _means(numbers: Ordered, edges_RE: Tensor, otherwise_RK: Tensor | None = None) -> Tensor:
    """The weighted mean of each cluster; where it has no weight, `otherwise` or the number before its end."""
    mass = numbers.mass_RE.gather(1, edges_RE).diff(dim=1)
    moment = numbers.moment_RE.gather(1, edges_RE).diff(dim=1)
    first = numbers.value_RN.gather(1, edges_RE[:, :-1].clamp(max=numbers.count - 1))
    last = numbers.value_RN.gather(1, (edges_RE[:, 1:] - 1).clamp(min=0))
    # Differences of long sums round: a mean lies among its numbers all the same.
    mean = (moment / mass).clamp(first, last)
    return torch.where(mass > 0, mean, last if otherwise_RK is None else otherwise_RK)


def _best_edges(mass_RE: Tensor, moment_RE: Tensor, clusters: int) -> Tensor:
    """Edges of the clusters, (R, K + 1), that lose least; from running sums at all edges that may be taken.

    least(k, i) = min over j <= i of least(k - 1, j) + cost(j, i),  the cost of one cluster from edge j to edge i:
    sum p v^2 - (sum p v)^2 / sum p, of which the first is left out.
    """
    rows, count = mass_RE.shape
    least_KRE = mass_RE.new_empty((clusters, rows, count))
    for a in range(0, count, _ENDS):
        b = min(a + _ENDS, count)
        cost = _cost(mass_RE, moment_RE, torch.arange(a, b, device=mass_RE.device).expand(rows, -1), b)
        least_KRE[0, :, a:b] = cost[:, :, 0]
        for k in range(1, clusters):
            torch.amin(cost + least_KRE[k - 1, :, None, :b], dim=2, out=least_KRE[k, :, a:b])
    edge = torch.full((rows, 1), count - 1, device=mass_RE.device)
    edges = [edge]
    for k in range(clusters - 1, 0, -1):
        cost = _cost(mass_RE, moment_RE, edge, count)[:, 0]
        edge = (cost + least_KRE[k - 1]).argmin(dim=1, keepdim=True)
        edges.append(edge)
    return torch.cat([torch.zeros_like(edge), *reversed(edges)], dim=1)


def _cost(mass_RE: Tensor, moment_RE: Tensor, end_RX: Tensor, starts: int) -> Tensor:
    """Of one cluster, (R, X, starts), from each of the first edges to each given one; infinite where it ends before."""
    mass = mass_RE.gather(1, end_RX)[:, :, None] - mass_RE[:, None, :starts]
    moment = moment_RE.gather(1, end_RX)[:, :, None] - moment_RE[:, None, :starts]
    cost = torch.where(mass > 0, -moment.square() / mass, 0.0)
    return cost.masked_fill_(torch.arange(starts, device=mass.device) > end_RX[:, :, None], torch.inf)
