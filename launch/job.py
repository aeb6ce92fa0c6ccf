"""One started torchrun with its workers: pass signals on, notice failures, clear away, say how it ended.

Used by `launch.torchrun.run` only, which starts the agent and shows the verdict.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from launch.agent import FAILING, LOG, REPORT
from launch.outcome import Outcome, read_outcomes
from launch.plan import LaunchPlan
from launch.processes import alive, kill, members, rank_of, ready_for_signals, send

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


@dataclass
class _Worker:
    process: psutil.Process
    rank: int
    waiting: deque[tuple[signal.Signals, float]] = field(default_factory=deque)
    """Signals not delivered yet, with the time when they will be in any case."""


class Job:
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
        stopped = [outcome for outcome in orderly if outcome.exit_code == 75]
        if len(orderly) == self._plan.nproc or (len(orderly) == len(outcomes) and report.get("succeeded")):
            return (75, _message(stopped)) if stopped else (0, "")
        if self._given_up:
            return 75, f"Stopped by {self._received[0][0].name} before the processes had started."
        outcome = _first(outcomes, secondary=False)
        if outcome is None and self._agent_died:
            return 1, self._torchrun_failed(report)
        if outcome is None:
            told = {outcome.rank for outcome in outcomes}
            deaths = [failure for failure in failures if failure["rank"] not in told]
            # The agent ends the others with SIGTERM, and this process with SIGKILL: those deaths are consequences.
            causes = [
                death
                for death in deaths
                if death["pid"] not in self._killed and death["exit_code"] != -signal.SIGTERM
            ]
            if causes:
                return 1, _death(causes[0])
            if stopped:  # one stopped while the run was being set up, and the others were ended
                return 75, _message(stopped)
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


def _message(outcomes: Sequence[Outcome]) -> str:
    return next((outcome.message for outcome in outcomes if outcome.message), "")


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
