"""The writer of checkpoints by itself: errors of disks, space, what is kept, and writing in the background."""

from __future__ import annotations

import concurrent.futures
import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from eulerforge.distributed.context import ProcessContext
from eulerforge.errors import CheckpointError, EulerForgeError, PeerFailedError, StoppedError, TrainingError
from eulerforge.files import tree_bytes
from eulerforge.metrics.console import Console
from eulerforge.optim.optimizer import build_optimizer
from eulerforge.train import checkpoint as checkpoint_module
from eulerforge.train.checkpoint import (
    Checkpointer,
    CheckpointSettings,
    checkpoint_bytes,
    disk_errors,
    remove_checkpoint,
    require_space,
)
from eulerforge.train.manifest import MANIFEST, find_damage, note_files, write_manifest
from eulerforge.train.run_directory import RunDirectory
from eulerforge.train.state import Progress
from eulerforge.train.trainer_state import BufferWatch, Tensors, read_own, read_shared, shared_tensors, write_shared

RUN, OTHER = "0123456789abcdef", "fedcba9876543210"
ONE_PROCESS = ProcessContext(0, 1, 0, 0, torch.device("cpu"), None)
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
PATIENCE = 20.0
"""Seconds after which something that should have happened will not happen any more."""


# --- Errors of disks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FULL, "No space left on device"),
        (OSError(errno.EROFS, "Read-only file system", "/disk/x"), "Read-only file system (/disk/x)"),
        (PermissionError(errno.EACCES, "Permission denied", "/disk/y"), "Permission denied (/disk/y)"),
        (OSError("odd"), "odd"),
        (SafetensorError("Error while serializing: I/O error: gone (os error 28)"), "No space left on device"),
        (SafetensorError('I/O error: x (os error 2) at path "/a (os error 5)"'), "No such file or directory"),
        (SafetensorError("first line\nsecond line"), "first line"),
        (RuntimeError("PytorchStreamWriter failed writing file data/7\nat: x"), "PytorchStreamWriter failed writing"),
    ],
)
def test_errors_of_disks_become_one_that_says_what_is_left(tmp_path: Path, error: Exception, reason: str) -> None:
    with pytest.raises(CheckpointError) as caught, disk_errors(tmp_path / "checkpoint-3", "checkpoint-2 is kept"):
        raise error
    (problem,) = caught.value.problems
    start, end = f"{tmp_path}/checkpoint-3 could not be written: {reason}", "; checkpoint-2 is kept"
    assert problem.what.startswith(start)
    assert problem.what.endswith(end)
    if not isinstance(error, RuntimeError):
        assert problem.what == start + end
    assert "\n" not in problem.what
    assert problem.fix == "make the run directory writable and give it space, then run again with --resume"
    assert caught.value.exit_code == 1
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory"),
        ValueError("a defect"),
        KeyboardInterrupt(),
        StoppedError("stopped", agreed=False),
        CheckpointError("too little space", "free some"),
        TrainingError("loss is nan", "lower it"),
        PeerFailedError("rank 1", "see it"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_pass_unchanged(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, disk_errors(tmp_path, "nothing"):
        raise error
    assert caught.value is error


def _space(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda folder: usage._replace(free=free))


def test_what_fits_exactly_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _space(monkeypatch, 1000)
    require_space(tmp_path, 1000, "checkpoint-3")


def test_what_does_not_fit_is_refused_with_both_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _space(monkeypatch, 3 * 2**29)
    with pytest.raises(CheckpointError) as caught:
        require_space(tmp_path, 3 * 2**29 + 1, "checkpoint-3")
    (problem,) = caught.value.problems
    assert problem.what == (
        f"checkpoint-3 needs about 1.5 GiB, and 1.5 GiB is free in {tmp_path}; earlier checkpoints are kept"
    )
    assert problem.fix == "free some space, or set training.keep_checkpoints, then run again with --resume"


# --- A run without a trainer ------------------------------------------------------------------------------------


class _Model(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, width)
        self.inner = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(torch.tanh(self.inner(self.embed(ids)))))


def _progress(run_id: str, step: int) -> Progress:
    return Progress(run_id, step, 100 * step, 1.5, 1, "single", "float32", False, 0, None, {}, {})


def _write_model(folder: Path, weights: Tensors) -> None:
    unique = {tensor.data_ptr(): name for name, tensor in reversed(weights.items())}
    save_file({name: weights[name] for name in unique.values()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")


class _Run(NamedTuple):
    directory: RunDirectory
    model: _Model
    optimizer: torch.optim.Optimizer
    checkpointer: Checkpointer
    state: dict[str, int]
    hooks: dict[str, Callable[[Path], None]]
    """`collect` and `write`: called (with the temporary folder, where there is one) before these are done."""

    def save(self, step: int) -> Path:
        self.state["step"] = step
        self.checkpointer.save(step)
        return self.directory.checkpoint(step)

    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.model(torch.arange(8)).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def _run(path: Path, width: int = 4, **settings: Any) -> _Run:
    path.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = _Model(width)
    optimizer = build_optimizer(model, kind="adamw", lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, seed=0)
    defaults = {"saved": torch.float32, "masters": False, "keep": None, "asynchronous": False, "resumed_from": None}
    state: dict[str, int] = {"step": 0}
    hooks: dict[str, Callable[[Path], None]] = {}

    def progress() -> Progress:
        hooks.get("collect", lambda folder: None)(path)
        return _progress(RUN, state["step"])

    def write_model(folder: Path, weights: Tensors) -> None:
        hooks.get("write", lambda folder: None)(folder)
        _write_model(folder, weights)

    directory = RunDirectory(path)
    checkpointer = Checkpointer(
        CheckpointSettings(**defaults | settings),
        ONE_PROCESS,
        directory,
        model,
        optimizer,
        BufferWatch(model),
        progress,
        write_model,
        Console("Pretrain"),
    )
    return _Run(directory, model, optimizer, checkpointer, state, hooks)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_saved_checkpoint_is_complete_under_its_name(
    tmp_path: Path, asynchronous: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _run(tmp_path / "run", asynchronous=asynchronous)
    run.train(3)
    target = run.save(3)
    run.checkpointer.wait()
    assert _names(tmp_path / "run") == ["checkpoint-3"]
    assert find_damage(target, contents=True) is None
    assert Progress.read(target) == _progress(RUN, 3)
    assert not run.checkpointer.failed
    assert capsys.readouterr().out == f"[Pretrain] Checkpoint saved: {target}\n"


@pytest.mark.parametrize(
    ("saved", "masters"), [(torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False)]
)
def test_the_space_asked_for_is_a_little_more_than_is_used(tmp_path: Path, saved: torch.dtype, masters: bool) -> None:
    """Less would begin a save that cannot end; much more would refuse one that fits."""
    run = _run(tmp_path / "run", width=1000, saved=saved, masters=masters)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    assert 1_000_000 < parameters < 1_020_000
    target = run.save(1)
    used = tree_bytes(target / "model.safetensors") + tree_bytes(target / "trainer_state" / "shards")
    assert used > parameters * (saved.itemsize + 8 + 4 * masters)
    needed = checkpoint_bytes(run.model, saved, masters)
    assert used < tree_bytes(target) < needed
    assert needed - used < 0.05 * used + 2**22


def test_a_save_that_does_not_fit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(tmp_path / "run")
    run.save(1)
    _space(monkeypatch, checkpoint_bytes(run.model, torch.float32, False) - 1)
    with pytest.raises(CheckpointError, match=r"checkpoint-2 needs about 4\.0 MiB, and 4\.0 MiB is free"):
        run.save(2)
    assert _names(tmp_path / "run") == ["checkpoint-1"]


# --- What is kept -----------------------------------------------------------------------------------------------


def _checkpoint(run: Path, step: int, run_id: str = RUN, complete: bool = True) -> Path:
    folder = run / f"checkpoint-{step}"
    (folder / "trainer_state").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    _progress(run_id, step).write(folder)
    write_manifest(folder, note_files(folder, [folder / "config.json", folder / "trainer_state" / "state.json"]))
    if not complete:
        (folder / MANIFEST).unlink()
    return folder


def test_a_removed_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    remove_checkpoint(_checkpoint(tmp_path, 3))
    assert _names(tmp_path) == []


def test_a_half_removed_checkpoint_has_not_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may be killed in the middle; the next one clears away what has a temporary name."""
    path = _checkpoint(tmp_path, 3)
    monkeypatch.setattr(checkpoint_module.shutil, "rmtree", lambda folder, **options: None)
    remove_checkpoint(path)
    assert _names(tmp_path) == [".checkpoint-3.tmp"]
    assert RunDirectory(tmp_path).leftovers() == [tmp_path / ".checkpoint-3.tmp"]


RETENTION: dict[str, tuple[int | None, int | None, list[int], list[int], list[int], list[int]]] = {
    # keep, step resumed from, own, damaged and foreign ones before a save of step 20; what is there afterwards
    "all": (None, None, [1, 9, 10], [], [], [1, 9, 10, 20]),
    "one": (1, None, [1, 9, 10], [], [], [20]),
    "the newest by number": (2, None, [1, 9, 10], [], [], [10, 20]),
    "as many as there are": (4, None, [1, 9, 10], [], [], [1, 9, 10, 20]),
    "more than there are": (9, None, [1], [], [], [1, 20]),
    "the one resumed from": (1, 1, [1, 9, 10], [], [], [1, 20]),
    "the one resumed from is one of the newest": (2, 10, [1, 9, 10], [], [], [10, 20]),
    "damaged ones neither count nor go": (2, None, [1, 3], [2, 10], [], [2, 3, 10, 20]),
    "foreign ones neither count nor go": (2, None, [1, 3], [], [2, 10], [2, 3, 10, 20]),
}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("case", RETENTION)
def test_only_the_newest_of_this_run_are_kept(tmp_path: Path, case: str, asynchronous: bool) -> None:
    keep, resumed, own, damaged, foreign, left = RETENTION[case]
    path = tmp_path / "run"
    for step in own:
        _checkpoint(path, step)
    for step in damaged:
        _checkpoint(path, step, complete=False)
    for step in foreign:
        _checkpoint(path, step, OTHER)
    (path / "checkpoint-0.set-aside").mkdir()
    source = None if resumed is None else path / f"checkpoint-{resumed}"
    run = _run(path, keep=keep, resumed_from=source, asynchronous=asynchronous)
    run.save(20)
    run.checkpointer.wait()
    assert _names(path) == sorted(["checkpoint-0.set-aside", *(f"checkpoint-{step}" for step in left)])


def test_one_that_cannot_be_removed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    for step in (1, 2):
        _checkpoint(path, step)

    def remove(folder: Path) -> None:
        if folder.name == "checkpoint-1":
            raise OSError(errno.EBUSY, "Device or resource busy")
        remove_checkpoint(folder)

    monkeypatch.setattr(checkpoint_module, "remove_checkpoint", remove)
    run = _run(path, keep=1)
    run.save(3)
    assert _names(path) == ["checkpoint-1", "checkpoint-3"]
    assert capsys.readouterr().out.splitlines() == [
        f"[Pretrain] Checkpoint saved: {path}/checkpoint-3",
        f"[Pretrain] Warning: {path}/checkpoint-1 could not be removed: Device or resource busy",
        f"[Pretrain] Checkpoint removed: {path}/checkpoint-2 (keep_checkpoints: 1)",
    ]


# --- Failing writes ---------------------------------------------------------------------------------------------


def _fail(error: BaseException) -> Callable[[Path], None]:
    def fail(folder: Path) -> None:
        raise error

    return fail


@pytest.mark.parametrize("earlier", ["none", "saved", "resumed from"])
def test_a_failing_write_leaves_what_was_before_and_says_so(tmp_path: Path, earlier: str) -> None:
    path = tmp_path / "run"
    source = _checkpoint(tmp_path / "origin", 1) if earlier == "resumed from" else None
    run = _run(path, resumed_from=source)
    if earlier == "saved":
        run.save(1)
    before = _names(path)
    run.hooks["write"] = _fail(FULL)
    with pytest.raises(CheckpointError) as caught:
        run.save(2)
    kept = {
        "none": "there is no earlier checkpoint",
        "saved": f"{path}/checkpoint-1 is kept and complete",
        "resumed from": f"{source} is kept and complete",
    }[earlier]
    assert str(caught.value) == f"{path}/checkpoint-2 could not be written: No space left on device; {kept}"
    assert (_names(path) if path.exists() else []) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a defect")])
def test_other_failures_leave_no_half_checkpoint_either(tmp_path: Path, error: BaseException) -> None:
    run = _run(tmp_path / "run")
    run.save(1)
    run.hooks["write"] = _fail(error)
    with pytest.raises(type(error)) as caught:
        run.save(2)
    assert caught.value is error
    assert _names(tmp_path / "run") == ["checkpoint-1"]


def test_a_folder_that_is_another_one_at_the_end_is_not_published(tmp_path: Path) -> None:
    """An unmounted disk: libraries make the missing folders anew, on the disk below."""
    run = _run(tmp_path / "run")
    run.save(1)

    def replace(folder: Path) -> None:
        folder.rename(tmp_path / "unmounted")
        shutil.copytree(tmp_path / "unmounted", folder)

    run.hooks["write"] = replace
    with pytest.raises(CheckpointError, match=r"checkpoint-2 could not be written: the directory went away during"):
        run.save(2)
    assert _names(tmp_path / "run") == ["checkpoint-1"]


# --- In the background ------------------------------------------------------------------------------------------


class _Gate:
    """Holds a write until it is opened."""

    def __init__(self, run: _Run, error: BaseException | None = None) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        self._error = error
        run.hooks["write"] = self._pass

    def _pass(self, folder: Path) -> None:
        self.reached.set()
        assert self.open.wait(PATIENCE)
        if self._error is not None:
            raise self._error


def _until_written(run: _Run) -> None:
    pending = run.checkpointer._pending
    assert pending is not None
    assert concurrent.futures.wait([pending], PATIENCE).done


def test_saving_in_the_background_returns_before_it_is_written(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", asynchronous=True)
    gate = _Gate(run)
    target = run.save(1)
    assert gate.reached.wait(PATIENCE)
    assert _names(tmp_path / "run") == [".checkpoint-1.tmp"]
    assert not run.checkpointer.failed
    gate.open.set()
    run.checkpointer.wait()
    assert _names(tmp_path / "run") == [target.name]


def test_a_failing_write_in_the_background_is_told_and_raised_once(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", asynchronous=True)
    run.save(1)
    run.checkpointer.wait()
    gate = _Gate(run, FULL)
    run.save(2)
    assert not run.checkpointer.failed  # it is not known yet
    gate.open.set()
    _until_written(run)
    assert run.checkpointer.failed
    with pytest.raises(CheckpointError) as caught:
        run.checkpointer.wait()
    assert str(caught.value) == (
        f"{tmp_path}/run/checkpoint-2 could not be written: No space left on device; "
        f"{tmp_path}/run/checkpoint-1 is kept and complete"
    )
    assert not run.checkpointer.failed
    run.checkpointer.wait()
    assert _names(tmp_path / "run") == ["checkpoint-1"]


def test_a_save_after_a_failed_one_raises_its_error_and_writes_nothing(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", asynchronous=True)
    gate = _Gate(run, FULL)
    run.save(1)
    gate.open.set()
    with pytest.raises(EulerForgeError, match="checkpoint-1 could not be written"):
        run.save(2)
    assert not (tmp_path / "run" / "checkpoint-2").exists()
    assert not list((tmp_path / "run").glob(".*") if (tmp_path / "run").exists() else ())


def test_a_second_save_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(tmp_path / "run", asynchronous=True)
    order: list[str] = []
    gate = _Gate(run)
    hold = run.hooks["write"]

    def write(folder: Path) -> None:
        hold(folder)
        order.append(f"write {folder.name}")

    run.hooks.update({"write": write, "collect": lambda folder: order.append(f"collect {run.state['step']}")})
    run.save(1)
    first = run.checkpointer._pending
    assert first is not None
    result = first.result

    def opens() -> None:
        gate.open.set()
        result()

    # The gate opens when somebody waits for the first write, and only then.
    monkeypatch.setattr(first, "result", opens)
    run.save(2)
    run.checkpointer.wait()
    assert order == ["collect 1", "write .checkpoint-1.tmp", "collect 2", "write .checkpoint-2.tmp"]
    assert _names(tmp_path / "run") == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize(("saved", "masters"), [(torch.float32, False), (torch.bfloat16, True)])
def test_the_tensors_are_those_of_the_time_of_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: torch.dtype, masters: bool
) -> None:
    run = _run(tmp_path / "run", asynchronous=True, saved=saved, masters=masters)
    run.train(3)
    reached, opened = threading.Event(), threading.Event()

    def write_first(*values: Any) -> None:
        reached.set()
        assert opened.wait(PATIENCE)
        write_shared(*values)

    monkeypatch.setattr(checkpoint_module, "write_shared", write_first)  # the first of all that is written
    weights = {name: value.clone() for name, value in run.model.state_dict().items()}
    shared = {name: value.clone() for name, value in shared_tensors(run.model, run.optimizer, masters).items()}
    generator = torch.get_rng_state()
    target = run.save(3)
    assert reached.wait(PATIENCE)
    assert [path.name for path in (tmp_path / "run").rglob("*") if path.is_file()] == []
    # Training goes on at once: weights, moments, buffers and random numbers all change.
    run.state["step"] = 5
    run.train(2)
    torch.rand(1)
    opened.set()
    run.checkpointer.wait()

    written = load_file(target / "model.safetensors")
    assert set(weights) - set(written) == {"head.weight"}
    parameters = dict(run.model.named_parameters())
    for name, value in written.items():
        expected = weights[name].to(saved) if name in parameters else weights[name]
        assert torch.equal(value, expected), name
        assert not torch.equal(run.model.state_dict()[name].to(value.dtype), value), name
    read = {name: torch.zeros_like(value) for name, value in shared.items()}
    read_shared(target, read, None)
    for name, value in shared.items():
        assert torch.equal(read[name], value), name
    rng, buffers = read_own(target, 0)
    assert torch.equal(rng["torch"], generator)
    assert {name: value.tolist() for name, value in buffers.items()} == {
        name: weights[name].tolist() for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")
    }
    assert Progress.read(target).step == 3
