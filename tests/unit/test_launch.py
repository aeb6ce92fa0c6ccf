"""Where a run works: device, processes and machines, from what is asked for and what is there. Nothing is started."""

from __future__ import annotations

import ast
import json
import os
import shlex
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch import torchrun
from launch.devices import LaunchError, choose_device, visible_gpus
from launch.job import Job
from launch.outcome import LAUNCH_DIR, Outcome, read_outcomes, started_by_launcher, worker_status, write_outcome
from launch.plan import LaunchPlan, LaunchRequest, resolve_plan, split_endpoint
from launch.processes import ready_for_signals

REPOSITORY = Path(__file__).resolve().parents[2]
NO_GPU: tuple[str, ...] = ()
ONE, TWO = ("A100",), ("A100", "H100")
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1", "SLURM_NTASKS_PER_NODE": "4"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
NODES = {"nnodes": 2, "node_rank": 0, "rdzv_endpoint": "node0:29500"}


@pytest.mark.parametrize(
    ("request_", "gpus", "device", "shown", "reason", "warnings"),
    [
        ("cpu", NO_GPU, "cpu", "cpu", "device: cpu", []),
        ("cpu", TWO, "cpu", "cpu", "device: cpu", []),
        ("cuda", ONE, "cuda:0", "cuda", "cuda:0 (A100)", []),
        ("cuda", TWO, "cuda:0", "cuda", "cuda:0 (A100)", []),
        ("cuda:0", ONE, "cuda:0", "cuda:0", "device: cuda:0 (A100)", []),
        ("cuda:1", TWO, "cuda:1", "cuda:1", "device: cuda:1 (H100)", []),
        (
            "cuda",
            NO_GPU,
            "cpu",
            "cpu",
            "no GPU visible",
            ["device: cuda asked for, but no GPU is visible. Training on CPU."],
        ),
        (
            "cuda:3",
            NO_GPU,
            "cpu",
            "cpu",
            "no GPU visible",
            ["device: cuda:3 asked for, but no GPU is visible. Training on CPU."],
        ),
    ],
)
def test_device_table(
    request_: str, gpus: tuple[str, ...], device: str, shown: str, reason: str, warnings: list[str]
) -> None:
    choice = choose_device(request_, gpus)
    assert (choice.device, choice.shown, choice.reason) == (device, shown, reason)
    assert list(choice.warnings) == warnings
    plan = resolve_plan(LaunchRequest(request_, nproc=1), gpus, {})
    assert (plan.mode, plan.device, plan.shown, plan.backend) == ("here", device, shown, None)
    assert plan.reasons == (f"device {device}: {reason}", "world size 1: one process")
    assert list(plan.warnings) == warnings


@pytest.mark.parametrize("request_", ["cuda:7", "cuda:2"])
def test_a_gpu_that_is_not_there_is_refused_with_the_list_of_those_that_are(request_: str) -> None:
    with pytest.raises(LaunchError) as caught:
        resolve_plan(LaunchRequest(request_), TWO, {})
    assert str(caught.value) == f"device: {request_} is not visible; visible are cuda:0 (A100), cuda:1 (H100)"
    assert caught.value.fix == "choose one of those, or cpu"


@pytest.mark.parametrize(
    ("asked", "gpus", "mode", "device", "nproc", "world_size", "backend", "size_reason"),
    [
        ({"device": "cuda"}, NO_GPU, "here", "cpu", 1, 1, None, "world size 1: one process"),
        ({"device": "cuda"}, ONE, "here", "cuda:0", 1, 1, None, "world size 1: one process"),
        ({"device": "cuda:1"}, TWO, "here", "cuda:1", 1, 1, None, "world size 1: one process"),
        ({"device": "cpu"}, TWO, "here", "cpu", 1, 1, None, "world size 1: one process"),
        ({"device": "cuda"}, TWO, "torchrun", "cuda", 2, 2, "nccl", "world size 2: all 2 visible GPUs, backend nccl"),
        (
            {"device": "cuda", "nproc": 2},
            TWO,
            "torchrun",
            "cuda",
            2,
            2,
            "nccl",
            "world size 2: --nproc 2 on cuda, backend nccl",
        ),
        (
            {"device": "cpu", "nproc": 4},
            TWO,
            "torchrun",
            "cpu",
            4,
            4,
            "gloo",
            "world size 4: --nproc 4 on cpu, backend gloo",
        ),
        (
            {"device": "cuda:1", "nproc": 2},
            NO_GPU,
            "torchrun",
            "cpu",
            2,
            2,
            "gloo",
            "world size 2: --nproc 2 on cpu, backend gloo",
        ),
        (
            {"device": "cpu", **NODES},
            NO_GPU,
            "torchrun",
            "cpu",
            1,
            2,
            "gloo",
            "world size 2: 2 nodes, each one process, backend gloo",
        ),
        (
            {"device": "cuda", **NODES},
            TWO,
            "torchrun",
            "cuda",
            2,
            4,
            "nccl",
            "world size 4: 2 nodes, each all 2 visible GPUs, backend nccl",
        ),
        (
            {"device": "cpu", "nproc": 3, **NODES},
            TWO,
            "torchrun",
            "cpu",
            3,
            6,
            "gloo",
            "world size 6: 2 nodes, each --nproc 3 on cpu, backend gloo",
        ),
    ],
)
@pytest.mark.parametrize("environment", [{}, SLURM, {"RANK": "1", "WORLD_SIZE": "2"}], ids=["plain", "slurm", "part"])
def test_plan_table(
    asked: dict[str, Any],
    gpus: tuple[str, ...],
    mode: str,
    device: str,
    nproc: int,
    world_size: int,
    backend: str | None,
    size_reason: str,
    environment: dict[str, str],
) -> None:
    plan = resolve_plan(LaunchRequest(**asked), gpus, environment)
    assert (plan.mode, plan.device, plan.nproc, plan.world_size) == (mode, device, nproc, world_size)
    assert plan.backend == backend
    assert plan.reasons[1] == size_reason
    assert bool(plan.warnings) == (asked["device"] != "cpu" and not gpus)
    assert (plan.nnodes, plan.node_rank, plan.rdzv_endpoint) == (
        asked.get("nnodes", 1),
        asked.get("node_rank"),
        asked.get("rdzv_endpoint"),
    )


@pytest.mark.parametrize(
    ("asked", "message", "fix"),
    [
        (
            {"device": "cuda", "nproc": 3},
            "--nproc 3 with device: cuda, but 2 visible: cuda:0 (A100), cuda:1 (H100)",
            "--nproc 2 or fewer",
        ),
        ({"device": "cuda:1", "nproc": 2}, "--nproc 2 with device: cuda:1, which is one GPU", "device: cuda for 2"),
        ({"device": "cuda:1", **NODES}, "--nnodes 2 with device: cuda:1, which is one GPU", "CUDA_VISIBLE_DEVICES=1"),
        ({"device": "cpu", "nproc": 0}, "--nproc 0 is not", "1 or more"),
        ({"device": "cpu", "nnodes": 0}, "--nnodes 0 is not", "1 or more"),
        ({"device": "cpu", "node_rank": 0}, "--node-rank 0 without --nnodes", "add --nnodes N"),
        ({"device": "cpu", "rdzv_endpoint": "a:1"}, "--rdzv-endpoint a:1 without --nnodes", "add --nnodes N"),
        ({"device": "cpu", **NODES, "node_rank": None}, "--nnodes 2 with no --node-rank", "from 0 to 1"),
        ({"device": "cpu", **NODES, "node_rank": 2}, "--nnodes 2 with --node-rank 2", "from 0 to 1"),
        ({"device": "cpu", **NODES, "node_rank": -1}, "--nnodes 2 with --node-rank -1", "from 0 to 1"),
        ({"device": "cpu", **NODES, "rdzv_endpoint": None}, "--nnodes 2 without --rdzv-endpoint", "HOST:PORT"),
        (
            {"device": "cpu", **NODES, "rdzv_endpoint": "node0"},
            "--rdzv-endpoint node0 is not HOST:PORT",
            "node0:29500",
        ),
    ],
)
def test_what_contradicts_is_refused(asked: dict[str, Any], message: str, fix: str) -> None:
    with pytest.raises(LaunchError) as caught:
        resolve_plan(LaunchRequest(**asked), TWO, {})
    assert message in str(caught.value)
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    "endpoint", ["", ":", ":1", "a:", "a:0", "a:65536", "a:-1", "a:b", "a", "tcp://a:1", "a:1.0"]
)
def test_bad_endpoints(endpoint: str) -> None:
    with pytest.raises(LaunchError):
        split_endpoint(endpoint)


def test_good_endpoints() -> None:
    assert split_endpoint("node0:1") == ("node0", 1)
    assert split_endpoint("10.0.0.1:65535") == ("10.0.0.1", 65535)
    assert split_endpoint("[::1]:29500") == ("::1", 29500)


@pytest.mark.parametrize(
    "request_",
    [LaunchRequest("cpu"), LaunchRequest("cpu", nproc=7), LaunchRequest("cpu", nproc=2, nnodes=2, node_rank=9)],
)
def test_a_worker_of_torchrun_lets_torchrun_decide(request_: LaunchRequest) -> None:
    plan = resolve_plan(request_, NO_GPU, TORCHRUN | SLURM | {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"})
    assert (plan.mode, plan.device, plan.backend) == ("worker", "cpu", "gloo")
    assert (plan.world_size, plan.nproc, plan.nnodes, plan.node_rank) == (4, 2, 2, 1)
    assert plan.reasons[1] == "world size 4: started by torchrun (RANK=3, WORLD_SIZE=4), which decides, backend gloo"


def test_a_single_worker_of_torchrun_is_still_a_worker() -> None:
    plan = resolve_plan(LaunchRequest("cuda"), TWO, TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    assert (plan.mode, plan.world_size, plan.nproc, plan.nnodes, plan.backend) == ("worker", 1, 1, 1, None)


def test_a_worker_gets_the_gpu_of_its_local_rank() -> None:
    plan = resolve_plan(LaunchRequest("cuda"), TWO, TORCHRUN)
    assert (plan.device, plan.shown, plan.backend, plan.warnings) == ("cuda:1", "cuda", "nccl", ())
    assert resolve_plan(LaunchRequest("cuda:1"), TWO, TORCHRUN).warnings == ()
    other = resolve_plan(LaunchRequest("cuda:0"), TWO, TORCHRUN)
    assert other.device == "cuda:1"
    assert other.warnings == ("device: cuda:0 is not used: torchrun's local rank 1 gets cuda:1.",)
    with pytest.raises(LaunchError, match=r"local rank 1 has no GPU; visible are cuda:0 \(A100\)"):
        resolve_plan(LaunchRequest("cuda"), ONE, TORCHRUN)
    assert len(resolve_plan(LaunchRequest("cuda"), NO_GPU, TORCHRUN).warnings) == 1
    with pytest.raises(LaunchError, match="WORLD_SIZE is 'x'"):
        resolve_plan(LaunchRequest("cpu"), NO_GPU, TORCHRUN | {"WORLD_SIZE": "x"})


def test_command_line_of_one_node() -> None:
    plan = resolve_plan(LaunchRequest("cpu", nproc=2), NO_GPU, {})
    arguments = ["pretrain", "--preset", "my preset.yml"]
    argv = torchrun.torchrun_argv(plan, arguments)
    assert argv[:3] == [sys.executable, "-m", "launch.agent"]
    assert argv[-5:] == ["-m", "eulerforge", *arguments]
    options = "--standalone --local-addr localhost --nproc-per-node 2 --max-restarts 0"
    assert argv[3:-5] == options.split()
    shown = torchrun.shown_command(plan, arguments)
    assert shown == f"torchrun {options} -m eulerforge pretrain --preset 'my preset.yml'"
    assert shlex.split(shown)[1:] == argv[3:]


@pytest.mark.parametrize("node_rank", [0, 1])
def test_command_line_of_several_nodes(node_rank: int) -> None:
    plan = resolve_plan(LaunchRequest("cuda", **{**NODES, "node_rank": node_rank}), TWO, {})
    assert torchrun.shown_command(plan, ["pretrain"]) == (
        "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint node0:29500 --rdzv-id eulerforge "
        f"--rdzv-conf is_host={1 - node_rank} --nproc-per-node 2 --max-restarts 0 -m eulerforge pretrain"
    )


def test_this_torchrun_knows_the_options() -> None:
    from torch.distributed.run import parse_args

    for request in (LaunchRequest("cpu", nproc=2), LaunchRequest("cpu", **NODES)):
        options = parse_args(torchrun.torchrun_argv(resolve_plan(request, NO_GPU, {}), ["a", "--b", "-m"])[3:])
        assert (options.module, options.training_script) == (True, "eulerforge")
        assert options.training_script_args == ["a", "--b", "-m"]


def test_environment_of_the_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = resolve_plan(LaunchRequest("cpu", nproc=2), NO_GPU, {})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(9)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("PET_NNODES", "7")
    environment = torchrun._environment(plan, tmp_path)
    assert environment[LAUNCH_DIR] == str(tmp_path)
    assert environment["OMP_NUM_THREADS"] == "4"
    assert "PET_NNODES" not in environment
    assert torchrun._environment(replace(plan, nproc=32), tmp_path)["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in torchrun._environment(replace(plan, device="cuda"), tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert torchrun._environment(plan, tmp_path)["OMP_NUM_THREADS"] == "3"


def test_a_taken_port_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*values: object, **options: object) -> None:
        raise AssertionError("started")

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        plan = resolve_plan(LaunchRequest("cpu", **{**NODES, "rdzv_endpoint": f"localhost:{port}"}), NO_GPU, {})
        monkeypatch.setattr(torchrun.subprocess, "Popen", start)
        with pytest.raises(LaunchError, match=f"port {port} of --rdzv-endpoint is taken") as caught:
            torchrun.run(plan, [])
    assert "another port" in caught.value.fix
    torchrun._check_port(port)


def _write(monkeypatch: pytest.MonkeyPatch, folder: Path, rank: int, code: int, message: str, **how: bool) -> bool:
    monkeypatch.setenv(LAUNCH_DIR, str(folder))
    monkeypatch.setenv("RANK", str(rank))
    return write_outcome(code, message, secondary=how.get("secondary", False))


def test_outcomes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(LAUNCH_DIR, raising=False)
    monkeypatch.setenv("RANK", "0")
    assert not started_by_launcher()
    assert not write_outcome(1, "shown by the caller", secondary=False)
    assert _write(monkeypatch, tmp_path, 10, 0, "")
    assert started_by_launcher()
    assert _write(monkeypatch, tmp_path, 2, 1, "first")
    assert _write(monkeypatch, tmp_path, 2, 0, "a failure stays")
    (tmp_path / "outcome-5.json").write_text("{")
    assert [(outcome.rank, outcome.exit_code, outcome.message) for outcome in read_outcomes(tmp_path)] == [
        (2, 1, "first"),
        (10, 0, ""),
    ]
    assert not _write(monkeypatch, tmp_path / "gone", 0, 1, "")
    assert [worker_status(code) for code in (0, 75, 1, 2)] == [0, 0, 1, 2]


def _outcome(rank: int, code: int, message: str = "", secondary: bool = False, time: float = 0.0) -> Outcome:
    return Outcome(rank, code, message, secondary, time)


def _died(rank: int, code: int, pid: int | None = None) -> dict[str, int]:
    return {"rank": rank, "pid": 100 + rank if pid is None else pid, "exit_code": code}


@pytest.mark.parametrize(
    ("outcomes", "report", "remote", "code", "message"),
    [
        ([_outcome(0, 0), _outcome(1, 0)], {"succeeded": True}, False, 0, ""),
        ([], {"succeeded": True}, False, 0, ""),
        ([_outcome(1, 75)], {"succeeded": True}, False, 75, ""),
        ([_outcome(0, 75), _outcome(1, 75)], {"error": "the other node is gone"}, True, 75, ""),
        ([_outcome(0, 0), _outcome(1, 0)], {"failures": [_died(1, -11)]}, False, 0, ""),
        ([_outcome(0, 1, "A", time=2), _outcome(1, 2, "B", time=1)], {}, False, 2, "B"),
        ([_outcome(0, 1, "A", True, time=1), _outcome(1, 1, "B", time=2)], {}, False, 1, "B"),
        (
            [_outcome(0, 1, "peer closed", True)],
            {"failures": [_died(0, 1), _died(1, -9)]},
            False,
            1,
            "rank 1 (pid 101) was killed by SIGKILL",
        ),
        (
            [_outcome(0, 75)],
            {"failures": [_died(0, -15), _died(1, 9)]},
            False,
            1,
            "rank 1 (pid 101) exited with code 9",
        ),
        ([_outcome(0, 1, "peer closed", True)], {"failures": [_died(0, 1), _died(1, -15)]}, False, 1, "peer closed"),
        (
            [_outcome(0, 1, "peer closed", True)],
            {"failures": [_died(0, 1), _died(1, -9, 99)]},
            True,
            1,
            "peer closed",
        ),
        ([], {"failures": [_died(0, -9, 99)]}, True, 1, "Another node failed"),
        ([], {"failures": [_died(1, -15)]}, False, 1, "rank 1 (pid 101) was killed by SIGTERM"),
        ([], {"error": "RendezvousTimeoutError: x"}, False, 1, "torchrun (pid 7) ended with code 1 before the"),
        # Stopped in order: 75 of some and 0 of others is 75, and the first that has words is shown.
        ([_outcome(0, 0), _outcome(1, 75, "stopped at 5")], {"succeeded": True}, False, 75, "stopped at 5"),
        ([_outcome(0, 75), _outcome(1, 75, "stopped at 5")], {}, False, 75, "stopped at 5"),
        ([_outcome(0, 75, "A", time=2), _outcome(1, 75, "B", time=1)], {}, False, 75, "A"),
        # One was stopped while the run was being set up; the others were ended because of that.
        ([_outcome(1, 75, "set-up")], {"failures": [_died(0, -15)]}, False, 75, "set-up"),
        ([_outcome(1, 75, "set-up")], {"failures": [_died(0, -15), _died(1, 75)]}, False, 75, "set-up"),
        ([_outcome(1, 75, "set-up")], {"failures": [_died(0, -9, 99)]}, False, 75, "set-up"),
        (
            [_outcome(0, 1, "peer closed", True), _outcome(1, 75, "set-up")],
            {"failures": [_died(0, 1)]},
            False,
            75,
            "set-up",
        ),
        # A failure of its own beats a stop, whichever came first.
        ([_outcome(0, 75, "set-up", time=1), _outcome(1, 1, "disk", time=2)], {}, False, 1, "disk"),
        ([_outcome(0, 2, "preset", time=1), _outcome(1, 75, "set-up", time=2)], {}, False, 2, "preset"),
        (
            [_outcome(0, 75, "set-up")],
            {"failures": [_died(1, -11)]},
            False,
            1,
            "rank 1 (pid 101) was killed by SIGSEGV",
        ),
    ],
)
def test_the_root_cause_is_shown(
    tmp_path: Path, outcomes: list[Outcome], report: dict[str, Any], remote: bool, code: int, message: str
) -> None:
    for outcome in outcomes:
        (tmp_path / f"outcome-{outcome.rank}.json").write_text(json.dumps(vars(outcome)))
    (tmp_path / "agent.json").write_text(json.dumps(report))
    (tmp_path / "failing.json").write_text(json.dumps({"remote": remote}))
    job = Job.__new__(Job)
    job._plan = resolve_plan(LaunchRequest("cpu", nproc=2), NO_GPU, {})
    job._folder, job._killed, job._workers = tmp_path, {99}, {}
    job._given_up = job._agent_died = False
    job._agent = subprocess.Popen.__new__(subprocess.Popen)
    job._agent.returncode, job._agent.pid, job._agent._child_created = 1, 7, False
    shown = job.verdict()
    assert shown[0] == code
    assert shown[1].startswith(message) if message else shown[1] == ""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_process_is_ready_for_signals_once_it_handles_all_of_them() -> None:
    code = (
        "import signal, sys\n"
        "for number in (signal.SIGTERM, signal.SIGUSR1):\n"
        "    print(flush=True); sys.stdin.readline()\n"
        "    signal.signal(number, lambda *_: None)\n"
        "print(flush=True); sys.stdin.readline()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        seen = []
        for _ in range(3):
            child.stdout.readline()
            seen.append(ready_for_signals(child.pid))
            child.stdin.write(b"\n")
            child.stdin.flush()
    assert seen == [False, False, True]
    assert ready_for_signals(2**22 + 1)


def test_visible_gpus_asks_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: TWO[index])
    assert visible_gpus() == TWO
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert visible_gpus() == ()


def test_a_plan_is_frozen() -> None:
    plan: Any = resolve_plan(LaunchRequest("cpu"), NO_GPU, {})
    assert isinstance(plan, LaunchPlan)
    with pytest.raises(AttributeError):
        plan.nproc = 2


def test_launch_stands_alone() -> None:
    """It runs in the parent process: nothing of eulerforge, and torch only when GPUs are looked for."""
    files = sorted((REPOSITORY / "launch").rglob("*.py"))
    assert len(files) >= 3
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            assert not [name for name in names if name.partition(".")[0] == "eulerforge"], path
    code = (
        "import sys, launch.torchrun, launch.agent, launch.plan, launch.outcome; "
        "print(sorted({'eulerforge', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
