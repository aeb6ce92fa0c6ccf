"""Micro-batches made ahead of time by a thread, and on a GPU copied there while the step before is computed."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from eulerforge.data.rows import MicroBatch

_AHEAD = 2
"""Steps that are ready, or being made, before they are asked for."""


def _leave_signals() -> None:
    """Leave signals to the main thread, which handles them: what another thread is given does not wake it up."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGALRM})


class BatchLoader:
    """The micro-batches of a step, on the device.

    Args:
        make: the micro-batches of a step (0-based), in main memory.
        steps: none are made ahead from this step on (a run that skipped steps asks for some).
    """

    def __init__(self, make: Callable[[int], Iterable[MicroBatch]], device: torch.device, steps: int) -> None:
        self._make = make
        self._device = device
        self._steps = steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches", initializer=_leave_signals)
        self._pending: dict[int, Future[tuple[list[MicroBatch], Any]]] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.waited = 0.0
        """Seconds that training has waited for data."""

    def __call__(self, step: int) -> Sequence[MicroBatch]:
        """The micro-batches of a step. What making them raises is raised here."""
        start = time.monotonic()
        for number in range(step, max(step + 1, min(step + _AHEAD + 1, self._steps))):
            if number not in self._pending:
                self._pending[number] = self._thread.submit(self._prepare, number)
        batches, copied = self._pending.pop(step).result()
        self.waited += time.monotonic() - start
        if copied is not None:
            self._receive(batches, copied)
        return batches

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, step: int) -> tuple[list[MicroBatch], Any]:
        batches = list(self._make(step))
        if self._stream is None:
            return [batch.to(self._device) for batch in batches], None
        with torch.cuda.stream(self._stream):
            # From pinned memory the copy runs beside the computation.
            moved = [batch.map(torch.Tensor.pin_memory).to(self._device) for batch in batches]
            return moved, self._stream.record_event()

    def _receive(self, batches: Sequence[MicroBatch], copied: Any) -> None:
        """Let the computation wait for the copy, and keep the memory until the computation is done with it."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copied)

        def mark(tensor: torch.Tensor) -> torch.Tensor:
            tensor.record_stream(current)
            return tensor

        for batch in batches:
            batch.map(mark)
