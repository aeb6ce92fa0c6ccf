"""One rank fails, or is asked to stop: the whole run ends soon, says why once, and leaves no process behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests.kit.commands import Result, Workspace, run_command
from tests.kit.models import write_custom, write_faulty, write_llama
from tests.kit.processes import Command, pretrain
from tests.kit.tokenizers import write_byte_tokenizer

DEADLINE = 120.0
TEXTS = [f"document {index} " + chr(97 + index % 26) * 40 for index in range(40)]


def _started_from(folder: Path) -> list[psutil.Process]:
    """Processes whose command line names the folder: launcher, agent and workers of a test's run."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if process.pid != os.getpid() and any(str(folder) in part for part in process.info["cmdline"] or ()):
            found.append(process)
    return found


@pytest.fixture
def ready(workspace: Workspace) -> Iterator[Workspace]:
    workspace.jsonl("data.jsonl", TEXTS)
    yield workspace
    assert _started_from(workspace.path) == []


def _run(workspace: Workspace, preset: Path, *arguments: str, **environment: str) -> tuple[Result, float]:
    """The command's result and when it ended."""
    result = run_command(
        "pretrain", "--preset", str(preset), *arguments, cwd=workspace.path, timeout=DEADLINE, **environment
    )
    return result, time.time()


@pytest.mark.parametrize("kind", ["raise", "exit", "kill"])
@pytest.mark.parametrize("phase", ["load", "data", "step", "save"])
def test_one_rank_fails(ready: Workspace, phase: str, kind: str) -> None:
    write_faulty(ready.path / "model")
    rank = "0" if (phase, kind) == ("data", "raise") else "1"  # only rank 0 tokenises
    preset = ready.preset(trust_remote_code=True, training__max_steps=6, training__save_steps=4)
    fault = {"FAULT": f"{phase}:{kind}:{rank}", "FAULT_DIR": str(ready.path)}
    result, ended = _run(ready, preset, "--nproc", "2", **fault)
    assert ended - float((ready.path / "struck").read_text()) < 30
    # What the model's own constructor raises is the input's fault; everything else is a crash.
    assert result.code == (2 if (phase, kind) == ("load", "raise") else 1), result.err
    if kind == "raise":
        assert result.err.count("RuntimeError: the model broke on purpose") == 1
        assert result.err.count("Traceback (most recent call last)") == (0 if phase == "load" else 1)
        assert "fault_kit.py" in result.err
    else:
        assert "Traceback" not in result.err
        fate = "exited with code 9" if kind == "exit" else "was killed by SIGKILL"
        assert f"rank {rank}" in result.err
        assert fate in result.err
    assert not (ready.path / "run" / "final").exists()
    assert (ready.path / "run").exists() is (phase in ("step", "save"))
    if phase in ("step", "save"):
        assert ready.status()["status"] == "failed"
        for checkpoint in (ready.path / "run").glob("checkpoint-*"):
            # Rank 0 may have been done with the disk when rank 1 went; what has its name is complete.
            assert (phase, checkpoint.name) == ("save", "checkpoint-4")
            assert load_file(checkpoint / "model.safetensors")
        assert [path.name for path in (ready.path / "run").glob(".*")] == [".lock"]


def test_waiting_for_data_is_not_bound_to_the_timeout_of_collectives(ready: Workspace) -> None:
    write_faulty(ready.path / "model")
    preset = ready.preset(trust_remote_code=True, distributed__timeout_seconds=8)
    slow = {"FAULT": "data:nothing:9", "FAULT_DIR": str(ready.path), "FAULT_SECONDS": "12"}
    result, _ = _run(ready, preset, "--nproc", "2", **slow)
    assert result.code == 0, result.err
    assert ready.status()["status"] == "finished"


def test_bad_data_on_rank_0_is_one_error(ready: Workspace) -> None:
    """Only rank 0 reads the corpus; the others end without a word of their own."""
    write_llama(ready.path / "model")
    write_byte_tokenizer(ready.path / "model")
    ready.raw("data.jsonl", b'{"text": "good"}\nnot json\n')
    result, _ = _run(ready, ready.preset(), "--nproc", "2")
    assert result.code == 2
    lines = result.err.splitlines()
    assert lines[0].startswith(f"Error: {ready.path}/data.jsonl:2: malformed JSON")
    assert [line.split(":")[0] for line in lines] == ["Error", "Fix", "See"]
    assert not (ready.path / "run").exists()


def test_nan_on_one_rank_stops_all_and_keeps_the_checkpoint(ready: Workspace) -> None:
    write_custom(ready.path / "model", "failing", kind="nan", at=5, only_rank=1)
    write_byte_tokenizer(ready.path / "model")
    preset = ready.preset(trust_remote_code=True, training__max_steps=10, training__save_steps=2)
    result, _ = _run(ready, preset, "--nproc", "2")
    assert result.code == 1
    assert result.err.count("Error: step 5: loss is nan") == 1
    assert "Traceback" not in result.err
    assert sorted(path.name for path in (ready.path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert not (ready.path / "run" / "final").exists()
    assert ready.status()["status"] == "failed"


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, None), (signal.SIGUSR1, 1)])
def test_a_signal_stops_all_ranks_at_the_same_step(
    ready: Workspace, number: signal.Signals, rank: int | None
) -> None:
    """While steps go by; test_preemption.py has the moments that must be met exactly."""
    write_custom(ready.path / "model", "probe")
    write_byte_tokenizer(ready.path / "model")
    preset = ready.preset(trust_remote_code=True, training__max_steps=1_000_000, training__save_steps=1_000_000)
    with pretrain(preset, "--nproc", "2", cwd=ready.path, PROBE_DIR=str(ready.path)) as run:
        _wait_for_steps(run, ready.path / "run" / "metrics.jsonl", 3)
        run.signal(number, rank)
        assert run.end() == 75, run.out + run.err
        assert run.left() == []
        assert "Error" not in run.err
    status = ready.status()
    assert status["status"] == "preempted"
    assert status["reason"].startswith("stopped by ")
    calls = [len((ready.path / f"rank{each}.jsonl").read_text().splitlines()) for each in range(2)]
    assert calls == [status["step"]] * 2
    assert [path.name for path in (ready.path / "run").glob("checkpoint-*")] == [f"checkpoint-{status['step']}"]


def test_a_signal_ends_a_single_process_after_its_step(ready: Workspace) -> None:
    write_llama(ready.path / "model")
    write_byte_tokenizer(ready.path / "model")
    preset = ready.preset(training__max_steps=1_000_000, training__save_steps=1_000_000)
    with pretrain(preset, cwd=ready.path) as run:
        _wait_for_steps(run, ready.path / "run" / "metrics.jsonl", 3)
        run.signal(signal.SIGTERM)
        assert run.end() == 75
        assert run.err == ""
        step = len(ready.metrics())
        last = f"Stopped by SIGTERM after step {step}; run/checkpoint-{step} is complete. Go on with --resume."
        assert run.out.splitlines()[-1] == f"[Pretrain] {last}"
    assert ready.status() == {"status": "preempted", "step": step, "reason": "stopped by SIGTERM"}


def _wait_for_steps(run: Command, metrics: Path, steps: int) -> None:
    run.until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= steps, f"step {steps}")


def test_two_nodes_on_one_machine_give_the_numbers_of_one(ready: Workspace) -> None:
    write_llama(ready.path / "model")
    write_byte_tokenizer(ready.path / "model")
    preset = str(ready.preset(output_dir=..., training__max_steps=5, distributed__strategy="ddp"))
    assert _run(ready, Path(preset), "--nproc", "2", "--output-dir", "one")[0].code == 0
    port = _free_port()
    nodes = ("--nnodes", "2", "--nproc", "1", "--rdzv-endpoint", f"localhost:{port}", "--output-dir", "two")
    command = [sys.executable, "-m", "eulerforge", "pretrain", "--preset", preset, *nodes]
    running = [
        subprocess.Popen([*command, "--node-rank", str(rank)], cwd=ready.path, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=DEADLINE)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert sum("Starting training" in output for output in outputs) == 1
    drop = ("elapsed_sec", "tokens_per_sec", "steps_per_sec", "data_wait")
    runs = [[{k: v for k, v in r.items() if k not in drop} for r in ready.metrics(name)] for name in ("one", "two")]
    assert runs[0] == runs[1]


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port


def test_two_runs_at_once_do_not_collide(ready: Workspace) -> None:
    write_llama(ready.path / "model")
    write_byte_tokenizer(ready.path / "model")
    preset = str(ready.preset(output_dir=...))
    command = [sys.executable, "-m", "eulerforge", "pretrain", "--preset", preset, "--nproc", "2", "--output-dir"]
    running = [
        subprocess.Popen([*command, name], cwd=ready.path, stdout=subprocess.DEVNULL) for name in ("first", "second")
    ]
    assert [process.wait(timeout=DEADLINE) for process in running] == [0, 0]
    losses = [[record["loss"] for record in ready.metrics(name)] for name in ("first", "second")]
    assert losses[0] == losses[1]


def test_many_ranks_import_remote_code_at_once(ready: Workspace) -> None:
    """Four ranks, an empty cache of remote code, relative imports of a helper: nobody reads a half-written file."""
    write_custom(ready.path / "model", "buffers", tie_word_embeddings=True)
    write_byte_tokenizer(ready.path / "model")
    preset = ready.preset(output_dir=..., trust_remote_code=True, training__max_steps=1)
    for attempt in range(2):
        result, _ = _run(
            ready, preset, "--nproc", "4", "--output-dir", f"run{attempt}",
            HF_MODULES_CACHE=str(ready.path / f"modules{attempt}"),
        )  # fmt: skip
        assert result.code == 0, result.err


def test_dry_run_prints_plan_preset_and_command(ready: Workspace) -> None:
    write_llama(ready.path / "model")
    write_byte_tokenizer(ready.path / "model")
    result, _ = _run(ready, ready.preset(), "--nproc", "2", "--dry-run", "--set", "training.lr=3e-4")
    assert result.code == 0, result.err
    assert "world size 2: --nproc 2 on cpu, backend gloo" in result.out
    assert "lr: 0.0003" in result.out
    (line,) = [line for line in result.out.splitlines() if line.startswith("torchrun ")]
    assert "-m eulerforge pretrain --preset" in line
    assert "training.lr=3e-4" in line
    assert not (ready.path / "run").exists()


def test_snapshot_names_the_launch_decisions(ready: Workspace) -> None:
    write_llama(ready.path / "model")
    write_byte_tokenizer(ready.path / "model")
    result, _ = _run(ready, ready.preset(training__max_steps=1), "--nproc", "2")
    assert result.code == 0, result.err
    config = json.loads((ready.path / "run" / "pretrain_config.json").read_text())
    assert config["world_size"] == 2
    assert any(decision.startswith("strategy ddp: auto: ") for decision in config["decisions"])
    assert "[Pretrain] world size 2: --nproc 2 on cpu, backend gloo" in result.out
    assert result.out.count("Starting training") == 1
