"""Where a run works: device and world size, from what is asked for and what is there."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from launch.devices import LaunchError, choose_device, visible_gpus
from launch.plan import resolve_plan

REPOSITORY = Path(__file__).resolve().parents[2]
NO_GPU: tuple[str, ...] = ()
ONE, TWO = ("A100",), ("A100", "H100")


@pytest.mark.parametrize(
    ("request_", "gpus", "device", "shown", "reason", "warnings"),
    [
        ("cpu", NO_GPU, "cpu", "cpu", "device: cpu", []),
        ("cpu", TWO, "cpu", "cpu", "device: cpu", []),
        ("cuda", ONE, "cuda:0", "cuda", "cuda:0 (A100)", []),
        (
            "cuda",
            TWO,
            "cuda:0",
            "cuda",
            "cuda:0 (A100)",
            ["2 GPUs are visible; this version trains on one: using cuda:0."],
        ),
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


@pytest.mark.parametrize("request_", ["cuda:7", "cuda:2"])
def test_a_gpu_that_is_not_there_is_refused_with_the_list_of_those_that_are(request_: str) -> None:
    with pytest.raises(LaunchError) as caught:
        choose_device(request_, TWO)
    assert str(caught.value) == f"device: {request_} is not visible; visible are cuda:0 (A100), cuda:1 (H100)"
    assert caught.value.fix == "choose one of those, or cpu"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
        {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1", "SLURM_NTASKS_PER_NODE": "4"},
    ],
    ids=["plain", "torchrun with one worker", "inside a SLURM job"],
)
def test_one_process_wherever_it_is_started(environment: dict[str, str]) -> None:
    plan = resolve_plan("cuda", ONE, environment)
    assert plan.world_size == 1
    assert plan.device == choose_device("cuda", ONE)
    assert plan.reasons == ("device cuda:0: cuda:0 (A100)", "world size 1: one process")


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "SLURM_NTASKS": "1"}])
def test_several_workers_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(LaunchError) as caught:
        resolve_plan("cpu", NO_GPU, environment)
    assert str(caught.value) == (
        "this process is one of 2 started by torchrun, but this version trains in one process"
    )
    assert "--nproc_per_node 1" in caught.value.fix


def test_visible_gpus_asks_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: TWO[index])
    assert visible_gpus() == TWO
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert visible_gpus() == ()


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
    code = "import sys, launch.plan; print(sorted({'eulerforge', 'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
