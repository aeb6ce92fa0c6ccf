"""The run's voice: `[Pretrain] ...` lines, warnings, and a progress bar when a person is watching.

On a terminal a tqdm bar shows step, loss, tokens/s and ETA, and lines are printed above it; in a pipe there are only
lines. Ranks other than 0 get a console that is silent, so that nobody else asks for the rank.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm


class Console:
    """Prints to stdout, warnings included (they belong to the run's log).

    Args:
        prefix: the command, for example `Pretrain`.
        enabled: False for a silent console.
    """

    def __init__(self, prefix: str, enabled: bool = True) -> None:
        self._prefix = prefix
        self._enabled = enabled
        self._bar: tqdm[Any] | None = None

    def say(self, text: str) -> None:
        """Print a line."""
        if not self._enabled:
            return
        line = f"[{self._prefix}] {text}"
        try:
            if self._bar is None:
                print(line, flush=True)
            else:
                self._bar.write(line, file=sys.stdout)
                sys.stdout.flush()
        except BrokenPipeError:
            self._lose_output()

    def _lose_output(self) -> None:
        """Who read the lines is gone (`| head`, a closed ssh): hours of training need not end with them."""
        self._enabled = False
        # Python would otherwise meet the broken pipe again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"[{self._prefix}] Warning: nobody reads stdout any more; going on without it.", file=sys.stderr)

    def warn(self, text: str) -> None:
        """Print a warning line."""
        self.say(f"Warning: {text}")

    def start_bar(self, total: int, done: int, unit: str = "step") -> None:
        """Show a progress bar, if stderr is a terminal. Bytes (`B`) are shown as MB or GB."""
        if self._enabled and sys.stderr.isatty():
            scaled = unit == "B"
            self._bar = tqdm(total=total, initial=done, unit=unit, unit_scale=scaled, dynamic_ncols=True, leave=False)

    @property
    def has_bar(self) -> bool:
        """Whether a progress bar is on the screen."""
        return self._bar is not None

    def move_bar(self, amount: int, values: Mapping[str, str]) -> None:
        """More has been done; `values` are shown beside the bar."""
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)
            self._bar.update(amount)

    def close_bar(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
