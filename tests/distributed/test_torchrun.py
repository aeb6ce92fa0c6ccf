"""`launch.torchrun.run` with a real torchrun and scripted workers: exit codes, signals, one error, nothing left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.kit.processes import MARKER, marked, shown, until

REPOSITORY = Path(__file__).resolve().parents[2]
PARENT = """
import json, sys
from launch import job, torchrun
from launch.devices import LaunchError
from launch.plan import LaunchRequest, resolve_plan
try:
    asked = json.loads(sys.argv[1])
    vars(job).update(asked.pop("constants"))
    plan = resolve_plan(LaunchRequest(**asked), (), {})
    sys.exit(torchrun.run(plan, sys.argv[2:], module="tests.kit.fake_worker"))
except LaunchError as error:
    sys.exit(f"LaunchError: {error} Fix: {error.fix}")
"""

SHORT = {"GRACE_SECONDS": 3.0, "START_SECONDS": 2.0}
"""Where what happens after the time matters, and not its length."""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="checks signals and processes in /proc")


@dataclass
class Run:
    """A started parent."""

    folder: Path
    process: subprocess.Popen[str]
    began: float = field(default_factory=time.monotonic)
    out: str = ""
    err: str = ""

    def wait_for(self, *names: str) -> None:
        """Until the workers have made these files."""
        until(lambda: all((self.folder / name).exists() for name in names), f"{names} in {self.folder}")

    def go(self, name: str = "go") -> None:
        """Make a file that workers wait for."""
        (self.folder / name).touch()

    def started(self, rank: int) -> dict[str, Any]:
        """What a worker told about itself."""
        self.wait_for(f"started-{rank}")
        return json.loads((self.folder / f"started-{rank}").read_text())

    def signals(self, rank: int) -> list[str]:
        """The signals that a worker got."""
        path = self.folder / f"signals-{rank}"
        return path.read_text().split() if path.exists() else []

    def end(self) -> int:
        """Wait for the parent's end."""
        self.out, self.err = self.process.communicate(timeout=60)
        return self.process.returncode

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.began


class Launch:
    """Starts parents whose processes all carry one marker, in a temporary directory of their own."""

    def __init__(self, path: Path) -> None:
        self.marker = uuid.uuid4().hex
        self.temporary = path / "tmp"
        self.temporary.mkdir()
        self._path = path
        self.runs: list[Run] = []

    def __call__(
        self, script: dict[str, list[list[Any]]], *, environment: dict[str, str] | None = None, **asked: Any
    ) -> Run:
        folder = self._path / f"run{len(self.runs)}"
        folder.mkdir()
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                PARENT,
                json.dumps({"device": "cpu", "nproc": 2, "constants": {}} | asked),
                str(folder),
                json.dumps(script),
            ],
            cwd=REPOSITORY,
            env=os.environ | {MARKER: self.marker, "TMPDIR": str(self.temporary)} | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.runs.append(Run(folder, process))
        return self.runs[-1]

    def left(self) -> list[str]:
        """Processes that still live."""
        return [shown(process) for process in marked(self.marker)]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Afterwards no process and no temporary file is left."""
    launcher = Launch(tmp_path)
    try:
        yield launcher
        for run in launcher.runs:
            assert run.process.poll() is not None, "the parent still runs"
        assert launcher.left() == []
        # torch's compiler makes a cache directory of this name as soon as it is imported.
        left = [path.name for path in launcher.temporary.iterdir() if not path.name.startswith("torchinductor_")]
        assert left == []
    finally:
        for run in launcher.runs:
            run.process.kill()
            run.process.wait()
        for process in marked(launcher.marker):
            with contextlib.suppress(psutil.Error):
                process.kill()


ALL_STARTED = ["wait for", "started-0", "started-1"]


def test_an_orderly_end_of_four(launch: Launch) -> None:
    run = launch({"all": [["print", "hello"], ["end", 0]]}, nproc=4, environment={"PET_NNODES": "3"})
    assert run.end() == 0
    assert run.err == ""
    assert run.out.count("hello") == 4
    ranks = [run.started(rank)["environment"] for rank in range(4)]
    assert [(each["RANK"], each["LOCAL_RANK"], each["WORLD_SIZE"]) for each in ranks] == [
        (str(rank), str(rank), "4") for rank in range(4)
    ]
    assert {each["MASTER_ADDR"] for each in ranks} == {"localhost"}
    assert {each.get("TORCH_CPP_LOG_LEVEL") for each in ranks} == {os.environ.get("TORCH_CPP_LOG_LEVEL")}
    assert not any(name.startswith("PET_") for name in ranks[0])


def test_an_end_without_an_outcome_counts_as_its_exit_code(launch: Launch) -> None:
    good = launch({"all": [["return", 0]]})
    assert (good.end(), good.err) == (0, "")
    bad = launch({"0": [["return", 0]], "1": [["return", 3]]})
    assert bad.end() == 1
    assert bad.err == f"rank 1 (pid {bad.started(1)['pid']}) exited with code 3\n"


def test_an_error_is_shown_once_and_ends_the_run(launch: Launch) -> None:
    run = launch(
        {
            "0": [
                ALL_STARTED,
                ["wait for signals", 1],
                ["outcome", 1, "connection closed by peer", True],
                ["return", 1],
            ],
            "1": [ALL_STARTED, ["outcome", 1, "Traceback\nValueError: boom", False], ["return", 1]],
        }
    )
    assert run.end() == 1
    assert run.err == "Traceback\nValueError: boom\n"
    assert run.out == ""
    assert run.seconds < 25


def test_wrong_input_is_code_2(launch: Launch) -> None:
    run = launch({"all": [["outcome", 2, "bad preset\nFix: mend it", False], ["return", 2]]})
    assert (run.end(), run.err) == (2, "bad preset\nFix: mend it\n")


@pytest.mark.parametrize(
    ("death", "shown"),
    [(["exit hard", 9], "exited with code 9"), (["kill itself", "SIGKILL"], "was killed by SIGKILL")],
)
def test_a_death_without_a_word(launch: Launch, death: list[Any], shown: str) -> None:
    run = launch({"0": [ALL_STARTED, ["wait for signals", 1], ["end", 75]], "1": [ALL_STARTED, death]})
    assert run.end() == 1
    assert run.err == f"rank 1 (pid {run.started(1)['pid']}) {shown}\n"
    assert run.signals(0) == ["SIGTERM"]
    assert run.seconds < 25


def test_a_worker_that_does_not_end_is_killed_when_another_fails(launch: Launch) -> None:
    hang: list[list[Any]] = [["ignore", "SIGTERM"], ["touch", "deaf"], ["hang"]]
    run = launch({"0": hang, "1": [["wait for", "deaf"], ["outcome", 1, "boom", False], ["return", 1]]})
    assert (run.end(), run.err) == (1, "boom\n")
    assert 10 < run.seconds < 25


def test_a_failed_worker_that_does_not_end_is_killed(launch: Launch) -> None:
    script: dict[str, list[list[Any]]] = {
        "0": [["hang"]],
        "1": [["outcome", 1, "boom", False], ["ignore", "SIGTERM"], ["hang"]],
    }
    run = launch(script, constants=SHORT)
    assert (run.end(), run.err) == (1, "boom\n")
    assert run.seconds < 25


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_every_worker_once(launch: Launch, number: signal.Signals) -> None:
    run = launch({"all": [["wait for signals", 1], ["wait for", "go"], ["end", 75]]})
    run.wait_for("started-0", "started-1")
    run.process.send_signal(number)
    run.wait_for("signals-0", "signals-1")
    # SLURM and users may signal every process: the agent does not mind.
    agent = psutil.Process(run.started(0)["agent"])
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        agent.send_signal(each)
    run.process.send_signal(signal.SIGUSR1)
    until(lambda: all(len(run.signals(rank)) == 2 for rank in (0, 1)), "the second signal")
    run.go()
    assert (run.end(), run.err) == (75, "")
    assert run.signals(0) == run.signals(1) == [number.name, "SIGUSR1"]


def test_a_signal_before_the_workers_start_is_kept_for_them(launch: Launch) -> None:
    run = launch({"all": [["wait for signals", 1], ["end", 75]]})
    # From the moment on when the launch directory is there, the parent catches signals.
    until(lambda: bool(list(launch.temporary.iterdir())), "the launch directory")
    until(lambda: len(launch.left()) >= 2, "the agent")
    run.process.send_signal(signal.SIGTERM)
    assert not (run.folder / "started-0").exists()
    assert (run.end(), run.err) == (75, "")
    assert run.signals(0) == run.signals(1) == ["SIGTERM"]


@pytest.mark.parametrize("told", [True, False])
def test_a_worker_that_stops_while_it_is_set_up_ends_the_others(launch: Launch, told: bool) -> None:
    """Its outcome says 75, its exit code is one that torchrun takes for a failure. The others stop or die."""
    stopped: list[list[Any]] = [["outcome", 75, "stopped early", False], ["return", 75]]
    other = [["wait for signals", 1], *stopped] if told else [["die of", "SIGTERM"], ["touch", "mortal"], ["hang"]]
    run = launch({"0": other, "1": [ALL_STARTED, ["wait for", "go"], *stopped]})
    run.wait_for("started-0", "started-1", *([] if told else ["mortal"]))
    run.go()
    assert (run.end(), run.err) == (75, "stopped early\n")
    assert run.seconds < 25


def test_nothing_outlives_a_killed_parent(launch: Launch) -> None:
    run = launch({"all": [["ignore", "SIGTERM"], ["hang"]]})
    run.wait_for("started-0", "started-1")
    run.process.kill()
    run.end()
    until(lambda: not launch.left(), "the end of agent and workers", 15)


def test_nothing_outlives_a_killed_agent(launch: Launch) -> None:
    run = launch({"all": [["wait for signals", 1], ["outcome", 1, "lost the store", True], ["return", 1]]})
    agent, _ = (run.started(rank)["agent"] for rank in (0, 1))
    os.kill(agent, signal.SIGKILL)
    assert (run.end(), run.err) == (1, f"torchrun (pid {agent}) was killed by SIGKILL\n")
    assert run.signals(0) == run.signals(1) == ["SIGTERM"]
    assert run.seconds < 25


def test_two_runs_at_once(launch: Launch) -> None:
    script = {"all": [["wait for", "go"], ["end", 0]]}
    runs = [launch(script), launch(script)]
    for run in runs:
        run.wait_for("started-0", "started-1")
    for run in runs:
        run.go()
    assert [(run.end(), run.err) for run in runs] == [(0, ""), (0, "")]
    assert len({run.started(0)["environment"]["MASTER_PORT"] for run in runs}) == 2


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _two_nodes(launch: Launch, *scripts: dict[str, list[list[Any]]]) -> list[Run]:
    endpoint = f"localhost:{_free_port()}"
    nodes = {}
    for rank in reversed(range(len(scripts))):  # the node that is joined comes last
        nodes[rank] = launch(
            scripts[rank], nproc=1, nnodes=2, node_rank=rank, rdzv_endpoint=endpoint, constants=SHORT
        )
    return [nodes[rank] for rank in range(len(scripts))]


def test_two_nodes(launch: Launch) -> None:
    script = {"all": [["wait for", "go"], ["end", 0]]}
    nodes = _two_nodes(launch, script, script)
    until(lambda: all(list(node.folder.glob("started-*")) for node in nodes), "a worker on each node")
    started = [next(iter(node.folder.glob("started-*"))).name for node in nodes]
    assert sorted(started) == ["started-0", "started-1"]
    endpoint = json.loads((nodes[0].folder / started[0]).read_text())["environment"]
    assert endpoint["WORLD_SIZE"] == "2"
    for node in nodes:
        node.go()
    assert [(node.end(), node.err) for node in nodes] == [(0, ""), (0, "")]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_on_one_node_ends_the_other(launch: Launch, failing: int) -> None:
    scripts: list[dict[str, list[list[Any]]]] = [{"all": [["touch", "up"], ["hang"]]} for _ in range(2)]
    scripts[failing] = {"all": [["wait for", "go"], ["exit hard", 9]]}
    nodes = _two_nodes(launch, *scripts)
    nodes[1 - failing].wait_for("up")
    nodes[failing].go()
    assert nodes[failing].end() == 1
    assert "exited with code 9" in nodes[failing].err
    other = nodes[1 - failing]
    assert other.end() == 1
    assert other.seconds < 35
    assert other.err == "Another node failed; its own output says why. The processes of this node were ended.\n"


def test_a_stop_while_the_other_node_is_missing(launch: Launch) -> None:
    (run,) = _two_nodes(launch, {"all": [["end", 0]]})
    until(lambda: len(launch.left()) >= 2, "the agent")
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 75
    assert run.err == "Stopped by SIGINT before the processes had started.\n"
    assert run.seconds < 25


def test_a_taken_port(launch: Launch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        run = launch({"all": [["end", 0]]}, nnodes=2, node_rank=0, rdzv_endpoint=f"localhost:{port}")
        assert run.end() == 1
    assert run.err.startswith(f"LaunchError: port {port} of --rdzv-endpoint is taken Fix: choose another port")
    assert not (run.folder / "started-0").exists()


def test_torchrun_itself_fails(launch: Launch) -> None:
    run = launch({"all": [["end", 0]]}, environment={"PYTHON_EXEC": "/no/such/python"})
    assert run.end() == 1
    lines = run.err.splitlines()
    assert lines[0].startswith("torchrun (pid "), run.err
    assert "before the processes were started: FileNotFoundError" in lines[0]
    assert len(lines) <= 16
