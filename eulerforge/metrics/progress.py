"""Progress of tokenising: a bar where a person is watching, a line now and then where none is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from eulerforge.metrics.console import Console
from eulerforge.metrics.meters import binary_size, clock_time

_SECONDS_BETWEEN_LINES = 10.0


class TokenizingProgress:
    """Adds up what has been read and written.

    Args:
        total: bytes of the corpus on disk.
        clock: seconds, monotonic.
    """

    def __init__(self, console: Console, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._total = total
        self._clock = clock
        self._start = self._last_line = clock()
        self._size = self._skipped = self._documents = self._tokens = 0

    def __call__(self, size: int, documents: int, tokens: int) -> None:
        """More bytes have been read, more documents and tokens written."""
        self._size += size
        self._documents += documents
        self._tokens += tokens
        if not self._tokens:
            self._skipped = self._size  # finished parts of an earlier build say nothing about the speed
        self._console.move_bar(size, self._rates())
        if not self._console.has_bar and self._clock() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = self._clock()
            self._console.say(self._line())

    def _rates(self) -> dict[str, str]:
        seconds = max(self._clock() - self._start, 1e-9)
        return {"documents/s": f"{self._documents / seconds:,.0f}", "tokens/s": f"{self._tokens / seconds:,.0f}"}

    def _line(self) -> str:
        seconds = max(self._clock() - self._start, 1e-9)
        done = self._size - self._skipped
        left = f"ETA {clock_time((self._total - self._size) * seconds / done)}" if done else "ETA unknown"
        share = self._size / max(self._total, 1)
        rates = " | ".join(f"{value} {name}" for name, value in self._rates().items())
        return (
            f"Tokenized {share:.0%} of {binary_size(self._total)} | {self._documents:,} documents | {rates} | {left}"
        )


@contextlib.contextmanager
def tokenizing(console: Console, total: int) -> Iterator[TokenizingProgress]:
    """Show progress over `total` bytes while the block runs."""
    console.start_bar(total, 0, unit="B")
    try:
        yield TokenizingProgress(console, total)
    finally:
        console.close_bar()
