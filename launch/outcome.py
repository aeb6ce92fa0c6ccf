"""How one worker of a launched run tells the parent how it ended, so that an error is shown once and not per rank.

A file per rank in the launch directory, because a file outlives its writer. torchrun itself passes on exit codes
only, and takes any but 0 for a failure, also the 75 of an orderly stop.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

LAUNCH_DIR = "EULERFORGE_LAUNCH_DIR"
"""Environment variable: the launch directory. Only workers started by `launch.torchrun` have it."""

ORDERLY = (0, 75)
"""Exit codes of a run that ended as it should: finished, or stopped on a signal with a checkpoint."""


@dataclass(frozen=True)
class Outcome:
    """How one rank ended.

    Attributes:
        rank: the rank.
        exit_code: the exit code of `eulerforge` that it stands for.
        message: what to show the user; empty for an end that needs no words.
        secondary: the error only follows from the end of another rank.
        time: when, in seconds since the epoch.
    """

    rank: int
    exit_code: int
    message: str
    secondary: bool
    time: float

    @property
    def orderly(self) -> bool:
        """Whether this is not a failure."""
        return self.exit_code in ORDERLY


def started_by_launcher() -> bool:
    """Whether `launch.torchrun` started this process as a worker, and thus shows its error."""
    return LAUNCH_DIR in os.environ and "RANK" in os.environ


def write_outcome(exit_code: int, message: str, *, secondary: bool) -> bool:
    """Tell the parent how this rank ended. A failure told before stays.

    Returns:
        False, with nothing done, where no launcher waits for it (or its directory is gone): show the error yourself.
    """
    if not started_by_launcher():
        return False
    rank = int(os.environ["RANK"])
    path = _path(Path(os.environ[LAUNCH_DIR]), rank)
    earlier = _read(path)
    if earlier is not None and not earlier.orderly:
        return True
    try:
        write_json(path, asdict(Outcome(rank, exit_code, message, secondary, time.time())))
    except OSError:
        return False
    return True


def worker_status(exit_code: int) -> int:
    """What a worker returns to torchrun. An orderly end is 0: any other code makes torchrun end the other workers."""
    return 0 if exit_code in ORDERLY else exit_code


def read_outcomes(folder: Path) -> list[Outcome]:
    """All outcomes in a launch directory, by rank."""
    found = [_read(path) for path in folder.glob("outcome-*.json")]
    return sorted((outcome for outcome in found if outcome is not None), key=lambda outcome: outcome.rank)


def write_json(path: Path, content: object) -> None:
    """Write a file that readers see whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.replace(path)


def _path(folder: Path, rank: int) -> Path:
    return folder / f"outcome-{rank}.json"


def _read(path: Path) -> Outcome | None:
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Outcome(**json.loads(path.read_text(encoding="utf-8")))
    return None
