"""Data-free encoding by a few threads, some blocks ahead of what is written."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tersely.job import Job
from tersely.units import encoded_free

_AHEAD_BYTES = 256_000_000
"""Of the source's blocks that are encoded before they are written."""


@contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """Two threads for data-free encoding; in them PyTorch starts none of its own, since rounding is bound by memory."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(2, initializer=_alone)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        # Always: the count of this thread has not changed, but threads made from now on would take the pool's.
        torch.set_num_threads(threads)


def _alone() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


class Ahead(Iterator[tuple[dict[str, Tensor], dict[str, Any]]]):
    """Blocks encoded by workers, in order, a few ahead of the one that is taken."""

    def __init__(self, pool: ThreadPoolExecutor, job: Job, groups: Mapping[str, Sequence[str]]) -> None:
        self._pool, self._job = pool, job
        block = max(sum(w.spec.nbytes for w in job.graph.unit(unit)) for unit in job.graph.units)
        self._ahead = max(3, _AHEAD_BYTES // block)
        self._rest = deque(unit for units in groups.values() for unit in units)
        self._futures: deque[Future[tuple[dict[str, Tensor], dict[str, Any]]]] = deque()
        self._fill()

    def __next__(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if not self._futures:
            raise StopIteration
        result = self._futures.popleft().result()
        self._fill()
        return result

    def _fill(self) -> None:
        while self._rest and len(self._futures) < self._ahead:
            self._futures.append(self._pool.submit(encoded_free, self._job, self._rest.popleft()))
