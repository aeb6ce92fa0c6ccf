"""A run goes on with another number of processes or another strategy, as long as its global batch stays.

The same rows at every step as one process that was never stopped, and the same numbers as far as the order of sums
allows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eulerforge.train.trainer_state import MASTERS, read_shared
from tests.kit.commands import Workspace, run_command, run_here
from tests.kit.models import write_gated, write_llama, write_mixtral
from tests.kit.stages import Stage, run_stages
from tests.kit.tokenizers import write_byte_tokenizer

STEPS = 12
MICRO_BATCHES = 4
"""Of a step, over all processes."""

TEXTS = [f"document {index} " + chr(97 + index % 26) * (20 + index) for index in range(40)]
MODELS: dict[str, Callable[[Path], Path]] = {"gated": write_gated, "llama": write_llama, "mixtral": write_mixtral}

Row = tuple[int, ...]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """What runs in this process computes with one thread, as each rank does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _prepare(workspace: Workspace, model: str, **values: Any) -> Path:
    """A preset of 4 micro-batches of 2 rows a step, on any number of processes that divides them."""
    write_byte_tokenizer(workspace.path / "tokenizer")
    MODELS[model](workspace.path / "model")
    workspace.jsonl("data.jsonl", TEXTS)
    defaults: dict[str, Any] = {
        "trust_remote_code": True,
        "tokenizer": str(workspace.path / "tokenizer"),
        "output_dir": ...,
        "data__max_length": 32,
        "training__batch_size": 2,
        "training__global_batch_size": 2 * MICRO_BATCHES,
        "training__max_steps": STEPS,
        "training__save_steps": 100,
        "training__warmup_steps": 3,
        # As in test_strategies.py: sums in another order must not be blown up to steps of full size.
        "training__lr": 2e-4,
        "training__eps": 1e-5,
    }
    return workspace.preset(**(defaults | values))


def _rows(folder: Path, processes: int) -> list[list[Row]]:
    """Rows of each step, sorted, that the processes of a stage have seen together."""
    share = MICRO_BATCHES // processes
    calls = [
        list(map(json.loads, (folder / f"rank{rank}.jsonl").read_text().splitlines())) for rank in range(processes)
    ]
    assert len({len(each) for each in calls}) == 1
    steps = range(len(calls[0]) // share)
    return [
        sorted(tuple(row) for each in calls for batch in each[step * share : (step + 1) * share] for row in batch)
        for step in steps
    ]


def _assert_same_course(workspace: Workspace, run: str, reference: str = "straight") -> None:
    """Every step once, with the numbers of the reference."""
    seen, expected = workspace.metrics(run), workspace.metrics(reference)
    assert [record["step"] for record in seen] == [record["step"] for record in expected] == list(range(1, STEPS + 1))
    for left, right in zip(expected, seen, strict=True):
        for exact in ("lr", "tokens", "epoch"):
            assert right[exact] == left[exact]
        for near in ("loss", "grad_norm", "aux_loss"):
            if near in left:
                assert right[near] == pytest.approx(left[near], rel=1e-5), (near, right["step"])
    _assert_near(workspace.path / reference / "final", workspace.path / run / "final", 2e-5)


def _assert_near(reference: Path, other: Path, tolerance: float) -> None:
    expected, seen = load_file(reference / "model.safetensors"), load_file(other / "model.safetensors")
    assert expected.keys() == seen.keys()
    for name, tensor in expected.items():
        assert torch.allclose(seen[name], tensor, rtol=0, atol=tolerance), name


def _files(folder: Path) -> dict[str, str]:
    """Every file with the hash of its content."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_two_processes_then_one_then_two(workspace: Workspace) -> None:
    preset = _prepare(workspace, "gated")
    strategies = ("ddp", "fsdp")
    chosen = {name: (f"distributed.strategy={name}",) for name in strategies}
    # After step 4: of the second rank's own accord, in the first micro-batch of its step.
    run_stages(
        workspace, preset, 2,
        *(Stage(name, stop_at=7, stop_rank=1, probe=f"{name}-a", overrides=chosen[name]) for name in strategies),
    )  # fmt: skip
    run_stages(
        workspace, preset, 1,
        Stage("straight", probe="straight-rows"),
        *(Stage(name, resume=True, stop_at=13, probe=f"{name}-b", overrides=chosen[name]) for name in strategies),
    )  # fmt: skip
    run_stages(
        workspace, preset, 2,
        *(Stage(name, resume=True, probe=f"{name}-c", overrides=chosen[name]) for name in strategies),
    )  # fmt: skip
    expected = _rows(workspace.path / "straight-rows", 1)
    assert len(expected) == STEPS
    for name in strategies:
        seen = [
            _rows(workspace.path / f"{name}-{part}", processes) for part, processes in (("a", 2), ("b", 1), ("c", 2))
        ]
        assert [len(part) for part in seen] == [4, 4, 4]
        assert [rows for part in seen for rows in part] == expected
        _assert_same_course(workspace, name)


def test_ddp_then_fsdp_then_ddp(workspace: Workspace) -> None:
    preset = _prepare(workspace, "gated")
    ddp, fsdp = ("distributed.strategy=ddp",), ("distributed.strategy=fsdp",)
    done = run_stages(
        workspace, preset, 2,
        Stage("changing", stop_at=8, probe="a", overrides=ddp),
        Stage("changing", resume=True, stop_at=8, probe="b", overrides=fsdp),
        Stage("changing", resume=True, probe="c", overrides=ddp),
    )  # fmt: skip
    assert "distributed.strategy ddp -> fsdp" in done.out
    run_stages(workspace, preset, 1, Stage("straight", probe="straight-rows"))
    seen = [rows for part in "abc" for rows in _rows(workspace.path / part, 2)]
    assert seen == _rows(workspace.path / "straight-rows", 1)
    _assert_same_course(workspace, "changing")


def test_experts_move_between_strategies_and_numbers_of_processes(workspace: Workspace) -> None:
    """Fused experts and a router loss, by the command line; the run is lengthened in stages."""
    preset = str(_prepare(workspace, "mixtral", training__scheduler="constant"))
    assert run_here("pretrain", "--preset", preset, "--output-dir", "straight").code == 0
    for steps, nproc, strategy, resume in ((4, 2, "fsdp", False), (8, 1, "auto", True), (STEPS, 2, "ddp", True)):
        command = (
            "pretrain", "--preset", preset, "--output-dir", "moved", "--nproc", str(nproc),
            "--set", f"training.max_steps={steps}", "--set", f"distributed.strategy={strategy}",
            *(["--resume"] if resume else []),
        )  # fmt: skip
        done = run_here(*command) if nproc == 1 else run_command(*command, cwd=workspace.path)
        assert done.code == 0, done.err
        assert resume is (f"Resuming from moved/checkpoint-{steps - 4} (step {steps - 4} of {steps})" in done.out)
        if resume:
            was, now = ("2 processes", "1") if nproc == 1 else ("1 process", "2")
            assert f"checkpoint-{steps - 4} was written by {was}, this run has {now}" in done.out
    assert "aux_loss" in workspace.metrics("moved")[0]
    _assert_same_course(workspace, "moved")


def test_another_global_batch_is_refused(workspace: Workspace) -> None:
    by_rank = {"training__global_batch_size": None, "training__grad_accum_steps": 2}
    preset = str(_prepare(workspace, "gated", **by_rank))
    two_steps = ("training.max_steps=2", "training.warmup_steps=0")
    run_stages(workspace, Path(preset), 2, Stage("run", overrides=two_steps))
    before = _files(workspace.path / "run")
    command = ("pretrain", "--preset", preset, "--output-dir", "run", "--resume")

    # Half the processes, and nobody has thought of the batch.
    halved = run_here(*command)
    assert "Error: --resume: rows per step is 4, but 8 in checkpoint-2" in halved.err
    assert "training.global_batch_size: 8 keeps it on any number of processes" in halved.err
    doubled = run_here(*command, "--set", "training.global_batch_size=16")
    assert "Error: --resume: rows per step is 16, but 8 in checkpoint-2" in doubled.err
    smaller = run_command(*command, "--nproc", "2", "--set", "training.batch_size=1", cwd=workspace.path)
    assert "Error: --resume: rows per step is 4, but 8 in checkpoint-2" in smaller.err
    for refused in (halved, doubled, smaller):
        assert refused.code == 2
        assert refused.err.count("Error: ") == 1
        assert "Traceback" not in refused.err
    after = _files(workspace.path / "run")
    assert after | {".lock": before[".lock"]} == before

    # And with the advice it goes on.
    kept = run_here(*command, "--set", "training.global_batch_size=8")
    assert kept.code == 0, kept.err
    assert [record["step"] for record in workspace.metrics()] == list(range(1, STEPS + 1))


def test_export_of_a_sharded_checkpoint_is_that_run_s_final(workspace: Workspace) -> None:
    preset = _prepare(workspace, "llama")
    run_stages(workspace, preset, 2, Stage("sharded", overrides=("distributed.strategy=fsdp",)))
    run_stages(workspace, preset, 1, Stage("straight"))
    exported = run_here("export", f"sharded/checkpoint-{STEPS}", "--output", "exported")
    assert exported.code == 0, exported.err
    files = _files(workspace.path / "exported")
    assert files == _files(workspace.path / "sharded" / "final")
    assert files.keys() == _files(workspace.path / "straight" / "final").keys()
    _assert_near(workspace.path / "straight" / "final", workspace.path / "exported", 1e-5)


def _masters(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The float32 weights of a checkpoint, by the names of the saved ones."""
    saved = load_file(checkpoint / "model.safetensors")
    tensors = {f"{MASTERS}{name}": torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in saved.items()}
    read_shared(checkpoint, tensors, None, kind=MASTERS)
    return {name.removeprefix(MASTERS): tensor for name, tensor in tensors.items()}


def test_one_process_goes_on_from_the_float32_weights_of_a_sharded_bfloat16_run(workspace: Workspace) -> None:
    """Not from the saved bfloat16 ones: with a learning rate of 0 the next checkpoint has the same, bit for bit."""
    mixed = {"training__dtype": "bfloat16", "training__amp": True, "training__scheduler": "constant"}
    preset = _prepare(workspace, "llama", **mixed)
    sharded = ("distributed.strategy=fsdp",)
    run_stages(workspace, preset, 2, Stage("run", overrides=("training.max_steps=6", *sharded)))
    run_stages(
        workspace, preset, 1,
        Stage("straight"),
        Stage("run", resume=True, overrides=("training.max_steps=7", "training.lr=0")),
        Stage("run", resume=True),
    )  # fmt: skip
    run = workspace.path / "run"
    before, after = _masters(run / "checkpoint-6"), _masters(run / "checkpoint-7")
    saved = load_file(run / "checkpoint-6" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    for name in saved:
        assert torch.equal(before[name], after[name])
        assert torch.equal(before[name].bfloat16(), saved[name])
    assert any(not torch.equal(before[name].bfloat16().float(), before[name]) for name in saved)
    # The run is the one that was not moved, as far as bfloat16 tells (and but for the step that did nothing).
    seen, expected = workspace.metrics("run"), workspace.metrics("straight")
    assert [record["step"] for record in seen] == list(range(1, STEPS + 1))
    for left, right in zip(expected, seen, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-3)
