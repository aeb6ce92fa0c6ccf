"""Start torchrun as a `LaunchPlan` says, pass signals on to its workers, and end with one exit code and one error.

`run` is the parent of everything. Its promises: a signal reaches every worker once; after the first failure the whole
run is gone within seconds; no process is left behind; the error that started it is shown, once.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from launch.agent import PARENT
from launch.devices import LaunchError
from launch.job import Job
from launch.outcome import LAUNCH_DIR
from launch.plan import TORCHRUN_VARIABLES, LaunchPlan, split_endpoint
from launch.processes import STOP_SIGNALS


def torchrun_argv(plan: LaunchPlan, arguments: Sequence[str], *, module: str = "eulerforge") -> list[str]:
    """The command line that `run` starts: torchrun inside `launch.agent`."""
    return [sys.executable, "-m", "launch.agent", *_options(plan), "-m", module, *arguments]


def shown_command(plan: LaunchPlan, arguments: Sequence[str], *, module: str = "eulerforge") -> str:
    """The line that a user could type to the same effect."""
    return shlex.join(["torchrun", *_options(plan), "-m", module, *arguments])


def run(plan: LaunchPlan, arguments: Sequence[str], *, module: str = "eulerforge") -> int:
    """Start the workers, wait until all are gone, show the root cause of a failure on stderr.

    Args:
        plan: a plan of mode `torchrun`.
        arguments: of the module in each worker.
        module: what each worker runs.

    Returns:
        0 finished, 75 stopped on a signal, 2 wrong input, 1 anything else.

    Raises:
        LaunchError: the port of the rendezvous is taken.
    """
    if plan.nnodes > 1 and plan.node_rank == 0 and plan.rdzv_endpoint is not None:
        _check_port(split_endpoint(plan.rdzv_endpoint)[1])
    folder = Path(tempfile.mkdtemp(prefix="eulerforge_launch_"))
    try:
        with _caught_signals() as caught:
            agent = subprocess.Popen(
                torchrun_argv(plan, arguments, module=module),
                env=_environment(plan, folder),
                stdin=subprocess.DEVNULL,
                # Ctrl-C of a terminal goes to its foreground group; the agent and the workers are not in it.
                start_new_session=True,
            )
            job = Job(plan, folder, agent, caught)
            try:
                job.wait()
            finally:
                job.clear_away()
        code, message = job.verdict()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if message:
        sys.stdout.flush()
        sys.stderr.write(message.rstrip("\n") + "\n")
    return code


def _options(plan: LaunchPlan) -> list[str]:
    common = ["--nproc-per-node", str(plan.nproc), "--max-restarts", "0"]
    if plan.nnodes == 1:
        # Standalone is a store on a free port, so that two runs at once do not meet. By default workers would find
        # it by the host name, which not every machine can resolve.
        return ["--standalone", "--local-addr", "localhost", *common]
    # Without is_host each agent guesses by host name whether the endpoint is its own machine.
    return [
        "--nnodes",
        str(plan.nnodes),
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        str(plan.rdzv_endpoint),
        "--rdzv-id",
        "eulerforge",
        "--rdzv-conf",
        f"is_host={1 if plan.node_rank == 0 else 0}",
        *common,
    ]


def _environment(plan: LaunchPlan, folder: Path) -> dict[str, str]:
    """The agent's environment, which the workers inherit."""
    # PET_* variables are torchrun options (PET_NNODES, PET_STANDALONE, ...): the plan has decided those.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PET_") and name not in TORCHRUN_VARIABLES
    }
    environment[LAUNCH_DIR] = str(folder)
    environment[PARENT] = str(os.getpid())
    if plan.device == "cpu" and "OMP_NUM_THREADS" not in environment:
        # torchrun would set 1 for several workers and leave cores idle; with none set each worker takes all cores.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment["OMP_NUM_THREADS"] = str(max(1, cores // plan.nproc))
    return environment


def _check_port(port: int) -> None:
    """Binding tells at once what torchrun tells late and unclearly. All addresses, as torchrun's store does."""
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            probe = socket.socket(family, socket.SOCK_STREAM)
        except OSError:
            continue  # a machine without IPv6
        with probe:
            # As the store: a port that is only waiting after an earlier run counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                probe.bind((address, port))
            except PermissionError:
                raise LaunchError(
                    f"port {port} of --rdzv-endpoint may not be used by this user",
                    "choose a port above 1023, the same on all machines",
                ) from None
            except OSError as error:
                if family == socket.AF_INET6 and error.errno not in (98, 48):  # EADDRINUSE of Linux, of macOS
                    continue
                raise LaunchError(
                    f"port {port} of --rdzv-endpoint is taken",
                    "choose another port, the same on all machines, or wait for the run that holds it to end",
                ) from None


@contextlib.contextmanager
def _caught_signals() -> Iterator[deque[signal.Signals]]:
    """Collect stop signals instead of dying of them.

    The handlers stay in place afterwards: a signal that comes while this process is leaving must not turn the end of
    a finished or saved run into a death by signal.
    """
    caught: deque[signal.Signals] = deque()

    def remember(number: int, frame: FrameType | None) -> None:
        caught.append(signal.Signals(number))

    if threading.current_thread() is not threading.main_thread():  # Python allows no handlers there
        yield caught
        return
    for number in STOP_SIGNALS:
        signal.signal(number, remember)
    yield caught
