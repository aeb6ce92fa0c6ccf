"""Start torchrun as a `LaunchPlan` says, pass signals on to its workers, and end with one exit code and one error.

`run` is the parent of everything. Its promises: a signal reaches every worker once; after the first failure the whole
run is gone within seconds; no process is left behind; the error that started it is shown, once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from launch.agent import FAILING, LOG, PARENT, REPORT
from launch.devices import LaunchError
from launch.outcome import LAUNCH_DIR, Outcome, read_outcomes
from launch.plan import TORCHRUN_VARIABLES, LaunchPlan, split_endpoint
from launch.processes import STOP_SIGNALS, alive, kill, members, rank_of, ready_for_signals, send

GRACE_SECONDS = 10.0
"""After the first failure: how long the other workers may take to end by themselves."""

AGENT_SECONDS = 3.0
"""After its last worker is gone: how long the agent may take to report and end."""

READY_SECONDS = 30.0
"""How long a signal waits for a worker to set up its handlers, before it is delivered anyway."""

START_SECONDS = 10.0
"""How long a signal waits for workers to be started (other nodes may never come), before the run is given up."""

POLL_SECONDS = 0.1

_ELSEWHERE = "Another node failed; its own output says why. The processes of this node were ended."


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
            job = _Job(plan, folder, agent, caught)
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
    """Collect stop signals instead of dying of them."""
    caught: deque[signal.Signals] = deque()

    def remember(number: int, frame: FrameType | None) -> None:
        caught.append(signal.Signals(number))

    if threading.current_thread() is not threading.main_thread():  # Python allows no handlers there
        yield caught
        return
    before = {number: signal.signal(number, remember) for number in STOP_SIGNALS}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class _Worker:
    process: psutil.Process
    rank: int
    waiting: deque[tuple[signal.Signals, float]] = field(default_factory=deque)
    """Signals not delivered yet, with the time when they will be in any case."""


class _Job:
    """One started agent with its workers."""

    def __init__(
        self, plan: LaunchPlan, folder: Path, agent: subprocess.Popen[bytes], caught: deque[signal.Signals]
    ) -> None:
        self._plan, self._folder, self._agent, self._caught = plan, folder, agent, caught
        self._agent_process = psutil.Process(agent.pid)
        self._workers: dict[int, _Worker] = {}
        self._received: list[tuple[signal.Signals, float]] = []
        self._killed: set[int] = set()
        self._failing_since: float | None = None
        self._agent_died = False
        self._given_up = False

    def wait(self) -> None:
        """Until agent and workers are gone."""
        while True:
            ended = self._agent.poll() is not None
            if not ended:
                self._find_workers(self._agent_process.children)
            elif not self._agent_died and not (self._folder / REPORT).exists():
                self._agent_died = True  # killed (out of memory, ...); its workers are nobody's children now
                self._find_workers(lambda: members(self._folder))
            living = [worker for worker in self._workers.values() if alive(worker.process)]
            if ended and not living:
                return
            self._pass_on_signals(living)
            now = time.monotonic()
            if self._failing_since is None and (ended or self._failed()):
                self._failing_since = now
                if ended:  # the agent cannot tell them any more
                    for worker in living:
                        send(worker.process, signal.SIGTERM)
            if self._failing_since is not None and now - self._failing_since > GRACE_SECONDS:
                return
            if self._received and not self._workers and now - self._received[0][1] > START_SECONDS:
                self._given_up = True
                return
            time.sleep(POLL_SECONDS)

    def clear_away(self) -> None:
        """Kill what is left: workers first, so that the agent can still report how each one ended."""
        left = [worker.process for worker in self._workers.values() if alive(worker.process)]
        self._killed |= {process.pid for process in left}
        for process in list(left):
            with contextlib.suppress(psutil.Error):
                left += process.children(recursive=True)
        kill(left)
        if not self._given_up:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._agent.wait(AGENT_SECONDS)
        self._agent.kill()
        self._agent.wait()
        # What escaped: processes of dead workers, workers started in the last moment. Twice, as they may fork.
        for _ in range(2):
            kill(members(self._folder))

    def verdict(self) -> tuple[int, str]:
        """The exit code, and what to show the user."""
        outcomes = read_outcomes(self._folder)
        report = _read_object(self._folder / REPORT)
        failures = report.get("failures", [])
        orderly = [outcome for outcome in outcomes if outcome.orderly]
        if len(orderly) == self._plan.nproc or (len(orderly) == len(outcomes) and report.get("succeeded")):
            return (75 if any(outcome.exit_code == 75 for outcome in orderly) else 0), ""
        if self._given_up:
            return 75, f"Stopped by {self._received[0][0].name} before the processes had started."
        outcome = _first(outcomes, secondary=False)
        if outcome is None and self._agent_died:
            return 1, self._torchrun_failed(report)
        if outcome is None:
            told = {outcome.rank for outcome in outcomes if not outcome.orderly}
            deaths = [failure for failure in failures if failure["rank"] not in told]
            # The agent ends the others with SIGTERM, and this process with SIGKILL: those deaths are consequences.
            causes = [
                death
                for death in deaths
                if death["pid"] not in self._killed and death["exit_code"] != -signal.SIGTERM
            ]
            if causes:
                return 1, _death(causes[0])
            outcome = _first(outcomes, secondary=True)
            if outcome is None and self._failed_elsewhere():
                return 1, _ELSEWHERE
            if outcome is None and deaths:
                return 1, _death(deaths[0])
        if outcome is not None:
            return (2 if outcome.exit_code == 2 else 1), outcome.message
        if self._workers and self._plan.nnodes > 1 and str(report.get("error")).startswith("Rendezvous"):
            return 1, _ELSEWHERE  # the node that held the store is gone
        return 1, self._torchrun_failed(report)

    def _find_workers(self, candidates: Callable[[], list[psutil.Process]]) -> None:
        # Not once all are known: psutil looks through all processes of the machine for the children of one.
        if len(self._workers) >= self._plan.nproc:
            return
        with contextlib.suppress(psutil.Error):
            for process in candidates():
                if process.pid not in self._workers and (rank := rank_of(process, self._folder)) is not None:
                    deadline = time.monotonic() + READY_SECONDS
                    waiting = deque((number, deadline) for number, _ in self._received)
                    self._workers[process.pid] = _Worker(process, rank, waiting)

    def _pass_on_signals(self, living: list[_Worker]) -> None:
        """To the workers only: torchrun itself would end them, and give them 30 s for their checkpoint."""
        while self._caught:
            number, now = self._caught.popleft(), time.monotonic()
            self._received.append((number, now))
            for worker in self._workers.values():
                worker.waiting.append((number, now + READY_SECONDS))
        for worker in living:
            while worker.waiting and (
                worker.waiting[0][1] < time.monotonic() or ready_for_signals(worker.process.pid)
            ):
                send(worker.process, worker.waiting.popleft()[0])

    def _failed(self) -> bool:
        if (self._folder / FAILING).exists():
            return True
        return any(not outcome.orderly for outcome in read_outcomes(self._folder))

    def _failed_elsewhere(self) -> bool:
        return bool(_read_object(self._folder / FAILING).get("remote"))

    def _torchrun_failed(self, report: dict[str, Any]) -> str:
        """torchrun ended and no worker is to blame: the end of what it logged."""
        code = self._agent.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        when = "" if self._workers else " before the processes were started"
        why = f": {report['error']}" if "error" in report else ""
        lines = [f"torchrun (pid {self._agent.pid}) {how}{when}{why}"]
        with contextlib.suppress(OSError):
            log = (self._folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
            lines += [f"  {line}" for line in log[-15:]]
        return "\n".join(lines)


def _first(outcomes: Sequence[Outcome], *, secondary: bool) -> Outcome | None:
    found = [outcome for outcome in outcomes if not outcome.orderly and outcome.secondary is secondary]
    return min(found, key=lambda outcome: outcome.time, default=None)


def _death(failure: dict[str, int]) -> str:
    code = failure["exit_code"]
    how = f"exited with code {code}"
    if code < 0:
        with contextlib.suppress(ValueError):
            how = f"was killed by {signal.Signals(-code).name}"
    return f"rank {failure['rank']} (pid {failure['pid']}) {how}"


def _read_object(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}
