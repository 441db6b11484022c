"""Hadamard matrices and products with them: orthogonal, of entries +1 and -1 (over the square root of the order).

Rotating by one spreads what stands out in a few coordinates over all of them (QuaRot, arXiv 2404.00456).

Shapes: N coordinates, ... leading axes.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tersely.errors import UsageError


def hadamard(x: Tensor, order: int) -> Tensor:
    """x (..., N) with each run of `order` coordinates multiplied by the normalised Sylvester matrix of that order.

    Symmetric and its own inverse. N log2(order) additions in float32 (float64 for such an x), in x's dtype.
    ValueError where the order is no power of two or does not divide N.
    """
    if order & (order - 1) or order < 1 or x.shape[-1] % order:
        raise ValueError(f"a Hadamard product of order {order} does not fit {x.shape[-1]} coordinates")
    y = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, order)
    width = 1
    while width < order:
        pairs = y.view(-1, order // (2 * width), 2, width)
        y = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2).view(-1, order)
        width *= 2
    return y.div_(float(order) ** 0.5).to(x.dtype).view(x.shape)


def check_order(order: int, columns: int) -> None:
    """UsageError where `hadamard` cannot take this order on this many inputs."""
    if order < 0 or order & (order - 1) or (order and columns % order):
        largest = columns & -columns
        raise UsageError(f"hadamard={order}: a power of two that divides {columns} is expected, at most {largest}")


def orthogonal(size: int, seed: int) -> Tensor:
    """A random rotation (N, N), float64: diag(random signs) H where a Hadamard matrix of the size is known (powers
    of two times the orders of Paley's constructions), else the Q of a Gaussian matrix."""
    generator = torch.Generator().manual_seed(seed)
    matrix = _hadamard_matrix(size)
    if matrix is None:
        q, r = torch.linalg.qr(torch.randn((size, size), generator=generator, dtype=torch.float64))
        return torch.mul(q, r.diagonal().sign())
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    return torch.mul(signs[:, None], matrix).div_(float(size) ** 0.5)


@cache
def _hadamard_matrix(size: int) -> Tensor | None:
    """(N, N) of +1 and -1 with orthogonal rows; None where neither Sylvester nor Paley gives one."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if (paley := _paley(size)) is not None:
        return paley
    half = _hadamard_matrix(size // 2) if size % 2 == 0 else None
    if half is None:
        return None
    return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])


def _paley(size: int) -> Tensor | None:
    """Paley's constructions: I for size = q + 1, q = 3 mod 4; II for size = 2 (q + 1), q = 1 mod 4; q an odd prime."""
    if size % 4:
        return None
    for q, first in ((size - 1, True), (size // 2 - 1, False)):
        if q < 3 or q % 4 != (3 if first else 1) or any(q % d == 0 for d in range(2, int(q**0.5) + 1)):
            continue
        squares = {i * i % q for i in range(1, q)}
        character = torch.tensor([0.0, *(1.0 if i in squares else -1.0 for i in range(1, q))], dtype=torch.float64)
        place = torch.arange(q)
        jacobsthal = character[(place[:, None] - place) % q]
        core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
        core[0, 1:], core[1:, 0], core[1:, 1:] = 1.0, -1.0 if first else 1.0, jacobsthal
        if first:
            return core + torch.eye(q + 1, dtype=torch.float64)
        one, two = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double()
        return torch.kron(core, one) + torch.kron(torch.eye(q + 1, dtype=torch.float64), two)
    return None
