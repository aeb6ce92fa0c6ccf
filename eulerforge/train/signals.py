"""Signals that ask a run to stop: SIGTERM, SIGINT, SIGUSR1.

While a run is being set up nothing is worth keeping, so a signal ends it at once. During training it only sets a
flag, which all processes agree on at the end of the step: they then stop at the same step, whichever was asked.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from eulerforge.errors import StoppedError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopWatch:
    """Listens for stop signals while its context is open.

    Attributes:
        received: name of the first signal, None so far.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._deferred = False

    def defer(self) -> None:
        """From now on a signal sets the flag only.

        Raises:
            StoppedError: one came in the very moment before.
        """
        self._deferred = True
        if self.received is not None:
            raise _stopped(self.received)

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopWatch]:
        """Install the handlers, and put back what was there before. Main thread only."""
        before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        first = self.received is None
        if first:
            self.received = signal.Signals(number).name
        if not self._deferred and first:
            raise _stopped(str(self.received))


def _stopped(name: str) -> StoppedError:
    return StoppedError(f"stopped by {name} while the run was being set up", "start it again when you like")
