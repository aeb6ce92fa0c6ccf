"""A command in processes of its own that a test signals, kills and waits for; afterwards none of them is left.

All processes of a command carry one marker in their environment, so that they are found whoever their parent is.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from launch.processes import ready_for_signals

MARKER = "EULERFORGE_TEST_MARKER"
PATIENCE = 120.0
"""Seconds that anything may take on a busy machine."""


_STEP_LINE = re.compile(r"^\[Pretrain\] step=(\d+)/.*\n", re.M)


def until(condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    """Wait for a condition; an `AssertionError` that names it when it takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for: {what}"
        time.sleep(0.01)


def marked(marker: str) -> list[psutil.Process]:
    """Living processes whose environment or command line has the marker."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            text = process.environ().get(MARKER, "") + " ".join(process.cmdline())
            if marker in text and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def shown(process: psutil.Process) -> str:
    """A process for people."""
    with contextlib.suppress(psutil.Error):
        return f"{process.pid} {' '.join(process.cmdline())[:150]}"
    return f"{process.pid} (gone)"


@dataclass(frozen=True)
class Command:
    """A started `python ARGUMENTS`. Its context kills what is left at the end.

    Attributes:
        process: the parent of all others.
        folder: where its output goes, and where its temporary directory is.
    """

    process: subprocess.Popen[bytes]
    folder: Path
    marker: str

    @classmethod
    def start(cls, *arguments: str, cwd: Path, **environment: str) -> Command:
        """Start `python ARGUMENTS`; its output goes to files, and its temporary files to a directory of its own."""
        marker = uuid.uuid4().hex
        folder = cwd / f"command-{marker[:8]}"
        (folder / "tmp").mkdir(parents=True)
        own = {MARKER: marker, "TMPDIR": str(folder / "tmp")}
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=cwd,
                env=os.environ | environment | own,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        return cls(process, folder, marker)

    def __enter__(self) -> Command:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _ in range(2):  # they may be starting others just now
            for process in marked(self.marker):
                with contextlib.suppress(psutil.Error):
                    process.kill()
        self.process.wait()

    @property
    def out(self) -> str:
        """What it has printed so far."""
        return (self.folder / "out").read_text(errors="replace")

    @property
    def err(self) -> str:
        """What it has printed to stderr so far."""
        return (self.folder / "err").read_text(errors="replace")

    def steps(self) -> list[int]:
        """The steps whose lines it has printed so far."""
        return [int(number) for number in _STEP_LINE.findall(self.out)]

    def until(self, condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
        """Wait for a condition while it runs."""

        def met_or_over() -> bool:
            return condition() or self.process.poll() is not None

        until(met_or_over, what, seconds)
        assert condition(), f"ended with {self.process.returncode} before: {what}\n{self.out}\n{self.err}"

    def end(self, seconds: float = PATIENCE) -> int:
        """Wait for the end; the exit code."""
        return self.process.wait(timeout=seconds)

    def rank(self, number: int) -> psutil.Process | None:
        """The worker of a rank, if it is there. A single process is its own worker."""
        for process in marked(self.marker):
            with contextlib.suppress(psutil.Error):
                parent = process.parent()
                # Helpers of a worker have its environment.
                by_torchrun = parent is not None and "RANK" not in parent.environ()
                if process.environ().get("RANK") == str(number) and by_torchrun:
                    return process
        return None

    def agent(self) -> psutil.Process | None:
        """The process that runs torchrun, if it is there."""
        for process in marked(self.marker):
            with contextlib.suppress(psutil.Error):
                if "launch.agent" in process.cmdline():
                    return process
        return None

    def signal(self, number: signal.Signals, rank: int | None = None) -> None:
        """Send a signal to the parent, or to one rank."""
        if rank is None:
            self.process.send_signal(number)
            return
        self.until(lambda: self.rank(rank) is not None, f"rank {rank}")
        worker = self.rank(rank)
        assert worker is not None
        worker.send_signal(number)

    def ready(self) -> bool:
        """Whether the parent listens to stop signals."""
        return ready_for_signals(self.process.pid)

    def left(self) -> list[str]:
        """What there is after the end and should not be: processes, temporary files."""
        names = [path.name for path in (self.folder / "tmp").iterdir()]
        # torch's compiler makes a cache directory of this name as soon as it is imported.
        return [shown(process) for process in marked(self.marker)] + [
            name for name in names if not name.startswith("torchinductor_")
        ]


@contextlib.contextmanager
def pretrain(preset: Path | str, *arguments: str, cwd: Path, **environment: str) -> Iterator[Command]:
    """`eulerforge pretrain` as a user starts it, killed at the end of the block if it still runs."""
    command = ("-m", "eulerforge", "pretrain", "--preset", str(preset), *arguments)
    with Command.start(*command, cwd=cwd, **environment) as run:
        yield run
