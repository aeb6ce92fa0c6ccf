"""The most memory that this process has used since a mark: of its GPU, or of the machine."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import psutil
import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Begins to watch when it is made.

    CUDA: what torch's allocator has handed out at most, the model that is there already too. CPU: resident memory
    above what it was at the mark, so the mark belongs before the model is loaded.

    Args:
        device: whose memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = 0
            return
        self._before = psutil.Process().memory_info().rss
        # The kernel forgets the peak so far (man 5 proc). Where it is not Linux, or not permitted, a peak from before
        # the mark hides a lower one after it.
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")

    def bytes(self) -> int | None:
        """The peak; None where the system does not tell."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        most = _most_resident()
        return None if most is None else max(0, most - self._before)


def _most_resident() -> int | None:
    """Bytes; of the whole life of the process, or since the kernel was told to forget."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return getattr(psutil.Process().memory_info(), "peak_wset", None)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
