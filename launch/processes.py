"""The processes of one launched run, found by the launch directory in their environment.

By environment and not by parentage, because a process whose parent died (a killed agent, a killed worker with loader
processes) belongs to init, and every process of the run must be gone at the end.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path

import psutil

from launch.outcome import LAUNCH_DIR

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What asks a run to stop and save; passed on to the workers."""


def rank_of(process: psutil.Process, folder: Path) -> int | None:
    """The rank of a worker of this run; None for anything else, also a worker that is not quite started."""
    # Between fork and exec a child still shows the environment of the agent, which has no RANK.
    with contextlib.suppress(psutil.Error, OSError, ValueError):
        environment = process.environ()
        if environment.get(LAUNCH_DIR) == str(folder):
            return int(environment["RANK"]) if "RANK" in environment else None
    return None


def alive(process: psutil.Process) -> bool:
    """Whether it still runs. A zombie does not: its parent has only not looked yet."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def members(folder: Path) -> list[psutil.Process]:
    """All living processes of this run but the calling one. Looks at every process of the machine: not for a loop."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(LAUNCH_DIR) == str(folder) and alive(process):
                found.append(process)
    return found


def send(process: psutil.Process, number: int) -> None:
    """Send a signal; nothing if the process is gone."""
    with contextlib.suppress(psutil.Error):
        process.send_signal(number)


def kill(processes: Iterable[psutil.Process], timeout: float = 5.0) -> None:
    """SIGKILL, then wait until they are gone (a process in an uninterruptible system call may need longer)."""
    doomed = [process for process in processes if alive(process)]
    for process in doomed:
        send(process, signal.SIGKILL)
    psutil.wait_procs(doomed, timeout=timeout)


def ready_for_signals(pid: int) -> bool:
    """Whether a process has set up what it does on each stop signal.

    A Python that has not come so far yet would simply die of SIGTERM, so a signal is held back until then. Linux
    tells by the masks of caught and ignored signals; where there is none of that, the answer is yes.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return True
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigCgt:", "SigIgn:"))]
    if not masks:
        return True
    handled = 0
    for mask in masks:
        handled |= mask
    return all(handled >> (number - 1) & 1 for number in STOP_SIGNALS)
