"""The run directory: order after a killed process, the lock, and a status that is true whatever happens."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path

import pytest

from eulerforge.errors import CheckpointError, OutputError, StoppedError
from eulerforge.train import run_directory
from eulerforge.train.run_directory import (
    NullRunDirectory,
    RunDirectory,
    is_run_directory,
    new_run_id,
    step_of,
)
from eulerforge.train.state import TrainState


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _make(folder: Path, *names: str) -> Path:
    """Files, and directories where the name ends with a slash."""
    folder.mkdir(exist_ok=True)
    for name in names:
        path = folder / name
        if name.endswith("/"):
            path.mkdir()
            (path / "content").write_text("x")
        else:
            path.write_text("x")
    return folder


def _status(run: RunDirectory) -> dict[str, object]:
    values: dict[str, object] = json.loads((run.path / "status.json").read_text())
    return values


# --- tidy -------------------------------------------------------------------------------------------------------


def test_what_a_killed_process_left_is_put_in_order(tmp_path: Path) -> None:
    run = RunDirectory(
        _make(
            tmp_path / "run",
            *(".checkpoint-9.tmp/", ".final.tmp/", ".status.json.tmp", ".final.old.tmp/"),
            *("checkpoint-2/", "checkpoint-6/", "checkpoint-8/", "checkpoint-10/"),
            *("pretrain_config.json", "status.json", ".lock", "notes.txt", "checkpoint-11"),
        )
    )
    run.metrics.write_text("".join(f'{{"step": {step}}}\n' for step in (2, 4, 6, 8)) + '{"st')
    assert run.tidy(6) == [
        *(
            f"Removed {name}, left by a save that was not completed"
            for name in (".checkpoint-9.tmp", ".final.old.tmp", ".final.tmp", ".status.json.tmp")
        ),
        "Set aside checkpoint-8 as checkpoint-8.set-aside: it is beyond step 6",
        "Set aside checkpoint-10 as checkpoint-10.set-aside: it is beyond step 6",
        "Cut metrics.jsonl back to step 6 (2 lines removed)",
    ]
    assert _names(run.path) == sorted(
        [
            *("checkpoint-2", "checkpoint-6", "checkpoint-8.set-aside", "checkpoint-10.set-aside", "checkpoint-11"),
            *("pretrain_config.json", "status.json", ".lock", "notes.txt", "metrics.jsonl"),
        ]
    )
    assert run.metrics.read_text() == '{"step": 2}\n{"step": 4}\n{"step": 6}\n'
    assert (run.path / "checkpoint-8.set-aside" / "content").read_text() == "x"
    before = _names(run.path)
    assert run.tidy(6) == []
    assert _names(run.path) == before


def test_what_is_set_aside_again_gets_a_free_name(tmp_path: Path) -> None:
    run = RunDirectory(_make(tmp_path / "run"))
    for number in range(3):
        (_make(run.path, "checkpoint-8/") / "checkpoint-8" / "content").write_text(str(number))
        run.tidy(6)
    names = ["checkpoint-8.set-aside", "checkpoint-8.set-aside-2", "checkpoint-8.set-aside-3"]
    assert _names(run.path) == names
    assert [(run.path / name / "content").read_text() for name in names] == ["0", "1", "2"]
    assert run.checkpoints() == []


def test_a_run_that_begins_anew_keeps_no_checkpoint_under_its_name(tmp_path: Path) -> None:
    run = RunDirectory(_make(tmp_path / "run", "checkpoint-1/"))
    run.metrics.write_text('{"step": 1}\n')
    assert len(run.tidy(0)) == 2
    assert _names(run.path) == ["checkpoint-1.set-aside", "metrics.jsonl"]
    assert run.metrics.read_text() == ""


def test_other_ranks_leave_the_directory_alone(tmp_path: Path) -> None:
    run = NullRunDirectory(_make(tmp_path / "run", ".final.tmp/", "checkpoint-8/"))
    before = _names(run.path)
    with run.locked(), run.recorded(TrainState()):
        assert run.tidy(0) == []
        run.write_config({"a": 1})
    assert _names(run.path) == before


# --- the lock ---------------------------------------------------------------------------------------------------


def test_a_second_run_in_the_directory_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    first, second = RunDirectory(tmp_path), RunDirectory(tmp_path)
    with first.locked():
        mark = first.mark()
        with pytest.raises(OutputError) as caught, second.locked():
            raise AssertionError("entered")
        assert str(caught.value) == f"output_dir: another process is writing to {tmp_path}"
        assert caught.value.exit_code == 2
        assert second.mark() == mark  # the refused one has not written into it
    with second.locked():
        assert second.mark() != mark


def test_the_lock_is_free_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broke"), RunDirectory(tmp_path).locked():
        raise ValueError("broke")
    with RunDirectory(tmp_path).locked():
        pass


def test_the_mark_tells_one_directory_from_another(tmp_path: Path) -> None:
    here, there = RunDirectory(_make(tmp_path / "a")), RunDirectory(_make(tmp_path / "b"))
    assert here.mark() == ""
    with here.locked(), there.locked():
        assert re.fullmatch(r"[0-9a-f]{16}", here.mark())
        assert here.mark() == NullRunDirectory(here.path).mark()
        assert here.mark() != there.mark()


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    path = _make(tmp_path / "run")
    (path / ".lock").mkdir()
    with pytest.raises(OutputError) as caught, RunDirectory(path).locked():
        raise AssertionError("entered")
    assert str(caught.value) == f"output_dir: {path} cannot be written: Is a directory"
    assert caught.value.exit_code == 2


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*values: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_directory.fcntl, "flock", flock)
    with RunDirectory(tmp_path).locked():
        assert RunDirectory(tmp_path).mark()
    assert capsys.readouterr().err == (
        f"Warning: {tmp_path} cannot be locked (No locks available): never start two runs in it.\n"
    )


# --- status.json ------------------------------------------------------------------------------------------------


def test_the_status_of_a_finished_run(tmp_path: Path) -> None:
    run, state = RunDirectory(tmp_path), TrainState(step=3)
    with run.recorded(state):
        assert _status(run) == {"status": "running", "step": 3, "reason": ""}
        state.step = 7
    assert _status(run) == {"status": "finished", "step": 7, "reason": ""}


ENDS: list[tuple[BaseException, str, str]] = [
    (CheckpointError("disk is full", "free some"), "failed", "disk is full"),
    (ValueError("a defect"), "failed", "ValueError: a defect"),
    (MemoryError(), "failed", "MemoryError"),
    (KeyboardInterrupt(), "failed", "KeyboardInterrupt"),
    (StoppedError("stopped by SIGTERM at step 5", agreed=True), "preempted", "stopped by SIGTERM at step 5"),
    (StoppedError("stopped by SIGINT in set-up", agreed=False), "preempted", "stopped by SIGINT in set-up"),
]


@pytest.mark.parametrize(("error", "status", "reason"), ENDS, ids=lambda value: type(value).__name__)
def test_the_status_of_any_other_end(tmp_path: Path, error: BaseException, status: str, reason: str) -> None:
    run, state = RunDirectory(tmp_path), TrainState()
    with pytest.raises(type(error)) as caught, run.recorded(state):
        state.step = 5
        raise error
    assert caught.value is error
    assert _status(run) == {"status": status, "step": 5, "reason": reason}


def test_a_status_that_cannot_be_written_does_not_hide_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(tmp_path)
    error = CheckpointError("disk is full", "free some")

    def full(*values: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError) as caught, run.recorded(TrainState()):
        monkeypatch.setattr(run_directory, "write_json", full)
        raise error
    assert caught.value is error
    assert _status(run)["status"] == "running"
    expected = "Warning: status.json could not be written: [Errno 28] No space left on device\n"
    assert capsys.readouterr().err == expected


# --- what it tells ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-7", 7),
        ("checkpoint-0", 0),
        ("checkpoint-1000000", 1000000),
        ("checkpoint-", None),
        ("checkpoint-7.set-aside", None),
        ("checkpoint--7", None),
        ("checkpoint-7b", None),
        (".checkpoint-7.tmp", None),
        ("xcheckpoint-7", None),
        ("final", None),
    ],
)
def test_the_step_of_a_name(tmp_path: Path, name: str, step: int | None) -> None:
    assert step_of(tmp_path / name) == step
    assert step is None or RunDirectory(tmp_path).checkpoint(step) == tmp_path / name


def test_checkpoints_are_directories_in_the_order_of_their_steps(tmp_path: Path) -> None:
    _make(tmp_path, "checkpoint-10/", "checkpoint-9/", "checkpoint-100/", "checkpoint-2/")
    _make(tmp_path, "checkpoint-5", "checkpoint-6.set-aside/", ".checkpoint-7.tmp/", "final/")
    assert [path.name for path in RunDirectory(tmp_path).checkpoints()] == [
        *("checkpoint-2", "checkpoint-9", "checkpoint-10", "checkpoint-100")
    ]


@pytest.mark.parametrize(
    ("status", "final", "step"),
    [
        ({"status": "finished", "step": 9}, True, 9),
        ({"status": "finished", "step": 9}, False, None),
        ({"status": "running", "step": 9}, True, None),
        ({"status": "preempted", "step": 9}, True, None),
        ({"status": "failed", "step": 9}, True, None),
        ({"status": "finished", "step": "9"}, True, None),
        ({"status": "finished"}, True, None),
        ([], True, None),
        (None, True, None),
    ],
)
def test_a_run_is_finished_when_status_and_final_say_so(
    tmp_path: Path, status: object, final: bool, step: int | None
) -> None:
    if status is not None:
        (tmp_path / "status.json").write_text(json.dumps(status))
    if final:
        (tmp_path / "final").mkdir()
    assert RunDirectory(tmp_path).finished_step() == step


@pytest.mark.parametrize(
    ("config", "run_id", "branched_from"),
    [
        ('{"run_id": "abc", "branched_from": "/runs/a/checkpoint-3"}', "abc", Path("/runs/a/checkpoint-3")),
        ('{"run_id": "abc", "branched_from": null}', "abc", None),
        ('{"run_id": "abc"}', "abc", None),
        ('{"run_id": 7, "branched_from": 7}', None, None),
        ("[]", None, None),
        ('{"run', None, None),
        ("\udcff", None, None),
        (None, None, None),
    ],
)
def test_identity_and_origin_are_read_from_the_config(
    tmp_path: Path, config: str | None, run_id: str | None, branched_from: Path | None
) -> None:
    if config is not None:
        (tmp_path / "pretrain_config.json").write_bytes(config.encode(errors="surrogateescape"))
    run = RunDirectory(tmp_path)
    assert (run.run_id, run.branched_from) == (run_id, branched_from)


def test_run_ids_differ() -> None:
    ids = {new_run_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch(r"[0-9a-f]{16}", value) for value in ids)


@pytest.mark.parametrize(
    ("names", "answer"),
    [
        (["pretrain_config.json", "anything", "else/"], True),
        (["metrics.jsonl", "status.json", "tensorboard/", "final/", ".lock", "checkpoint-3/"], True),
        ([".lock"], True),
        ([], True),
        (["checkpoint-3/", "notes.txt"], False),
        (["config.json", "model.safetensors"], False),
        (["checkpoint-3.set-aside/"], False),
    ],
)
def test_a_run_directory_is_known_by_what_is_in_it(tmp_path: Path, names: list[str], answer: bool) -> None:
    assert is_run_directory(_make(tmp_path / "run", *names)) is answer


def test_what_is_not_there_or_a_file_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert not is_run_directory(tmp_path / "file")
    assert not is_run_directory(tmp_path / "gone")
