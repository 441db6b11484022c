"""How much memory this process takes, or has made a device take."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import psutil


def resident() -> tuple[int, int]:
    """Resident bytes of this process, now and at most so far.

    On Linux VmRSS and VmHWM: the maximum that getrusage gives there is also that of the process it was forked from.
    """
    try:
        lines = Path("/proc/self/status").read_text("ascii", "replace").splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        now, peak = (1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    except (OSError, KeyError, ValueError):
        now, peak = _resident_elsewhere()
    return now, max(now, peak)


def _resident_elsewhere() -> tuple[int, int]:
    found: Any = psutil.Process().memory_info()
    if sys.platform == "win32":
        return found.rss, found.peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found.rss, peak if sys.platform == "darwin" else 1024 * peak


class DeviceMemory:
    """What libraries that allocate by themselves have taken of a CUDA device since this was made.

    Free bytes before minus free bytes now, so nothing else may run on the device; the most is that of all readings.
    """

    def __init__(self, device: str) -> None:
        import torch

        self._device, self._torch = torch.device(device), torch
        self._before, self._most = self._free(), 0

    def __call__(self) -> tuple[int, int]:
        """Bytes taken now, and at most so far."""
        now = max(0, self._before - self._free())
        self._most = max(self._most, now)
        return now, self._most

    def _free(self) -> int:
        return int(self._torch.cuda.mem_get_info(self._device)[0])
