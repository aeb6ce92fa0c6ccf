"""What asks a run to stop: SIGTERM, SIGINT, SIGUSR1, and the clock (`training.max_minutes`).

While a run is being set up nothing is worth keeping, so it ends at once, wherever the program is. During training a
signal only sets a flag, which all processes agree on at the end of the step: they then save and stop at the same
step, whichever of them was asked. A second signal changes nothing.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from eulerforge.errors import StoppedError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

_CLOCK_SECONDS = 2**31 - 1
"""The longest time that every platform's timer takes: 68 years."""


class StopWatch:
    """Listens for stop signals while its context is open.

    Attributes:
        received: name of the first signal, or `training.max_minutes`; None so far.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._deferred = False

    def set_timer(self, minutes: float) -> None:
        """Ask this process to stop after a time, as a signal would."""
        signal.setitimer(signal.ITIMER_REAL, min(minutes * 60, _CLOCK_SECONDS))

    def defer(self) -> None:
        """From now on a signal sets the flag only.

        Raises:
            StoppedError: one came before (and other code may have swallowed the exception).
        """
        self._deferred = True
        if self.received is not None:
            raise self.stopped_early()

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopWatch]:
        """Install the handlers. Main thread only.

        They stay in place when the context ends, and only take notes: a signal that comes while the process is
        leaving must not turn the end of a finished or saved run into a death by signal.
        """
        for number in (*STOP_SIGNALS, signal.SIGALRM):
            signal.signal(number, self._receive)
        try:
            yield self
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._deferred = True

    def stopped_early(self) -> StoppedError:
        """The end of a run that was asked to stop before training had begun."""
        cause = self.received or "a signal to another process"
        return StoppedError(f"stopped by {cause} while the run was being set up", agreed=False)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        first = self.received is None
        if first:
            self.received = "training.max_minutes" if number == signal.SIGALRM else signal.Signals(number).name
        if first and not self._deferred:
            raise self.stopped_early()
