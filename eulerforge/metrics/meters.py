"""Speed of a run, and numbers as people read them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

_WINDOW = 20


class SpeedMeter:
    """Steps and tokens per second over the last steps, and the time left.

    A window of recent steps, so that a slow first step (warm-up of kernels, first checkpoint) does not colour the
    whole run.

    Args:
        clock: seconds, monotonic.
        before: seconds of training before a resume.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, before: float = 0.0) -> None:
        self._clock = clock
        self._before = before
        self._start = clock()
        self._marks: deque[tuple[float, int, float]] = deque([(self._start, 0, 0.0)], maxlen=_WINDOW + 1)

    def step_done(self, tokens: int, waited: float = 0.0) -> None:
        """Note one finished step that trained on `tokens` tokens and waited for them, in seconds."""
        self._marks.append((self._clock(), tokens, waited))

    @property
    def elapsed(self) -> float:
        """Seconds of training."""
        return self._before + self._clock() - self._start

    @property
    def steps_per_second(self) -> float:
        """Over the window; 0 before the first step."""
        return (len(self._marks) - 1) / self._window_seconds

    @property
    def tokens_per_second(self) -> float:
        """Over the window; 0 before the first step."""
        return sum(tokens for _, tokens, _ in list(self._marks)[1:]) / self._window_seconds

    @property
    def data_wait(self) -> float:
        """Share of the window's time that was spent waiting for data."""
        return sum(waited for _, _, waited in list(self._marks)[1:]) / self._window_seconds

    @property
    def _window_seconds(self) -> float:
        return max(self._marks[-1][0] - self._marks[0][0], 1e-9)

    def seconds_left(self, steps: int) -> float:
        """Estimated seconds for `steps` more steps."""
        return steps / self.steps_per_second if len(self._marks) > 1 else 0.0


def clock_time(seconds: float) -> str:
    """`0:12:40`."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def counted(processes: int) -> str:
    """`1 process`, `2 processes`."""
    return f"{processes} process{'' if processes == 1 else 'es'}"


def binary_size(size: float) -> str:
    """`1.5 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
