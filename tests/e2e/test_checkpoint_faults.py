"""Disks that are full, read-only or gone, and checkpoints that are damaged: one clear error, nothing else lost.

Full and vanished disks are real: small file systems in memory, mounted for the test. Steps are those of
`test_resume.py`: a run of 12 steps that is compared with one that was never stopped.
"""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.test_resume import (
    ACCUMULATION,
    STEPS,
    STOP,
    checkpoints,
    curve,
    done,
    files,
    model_files,
    prepare,
    quick,
    quick_and_clean,
    refused,
    require_same_run,
    steps_of,
    train,
    values_of,
)
from tests.kit.commands import Result, Workspace, run_command

__all__ = ["quick_and_clean"]  # a fixture that holds here too

SAVE = {"training__save_steps": 3}
MIB = 2**20


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs, a run that was never stopped (`straight`), and one with checkpoints 3 and 6, stopped there (`run`)."""
    root = tmp_path_factory.mktemp("runs")
    with quick(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        workspace = Workspace(root)
        prepare(workspace)
        done(train(workspace, output_dir="straight", **SAVE))
        assert train(workspace, stop_after=6, **SAVE).code == 75
    return root


@pytest.fixture
def project(runs: Path, workspace: Workspace) -> Workspace:
    """A copy of `runs` of the test's own."""
    shutil.copytree(runs, workspace.path, dirs_exist_ok=True)
    return workspace


def mount(*arguments: str) -> None:
    """`mount ARGUMENTS`; skips the test where that is not permitted."""
    result = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip(f"mount is not permitted here: {result.stderr.strip()}")


def unmount(path: Path) -> None:
    """Take a file system away, in use or not."""
    subprocess.run(["umount", "-l", str(path)], capture_output=True, check=False)


@pytest.fixture
def disk(project: Workspace) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of a given size as `disk`."""
    path = project.path / "disk"
    path.mkdir()

    def make(size: str) -> Path:
        mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path))
        return path

    yield make
    unmount(path)


def fill(leave: int) -> str:
    """Code that fills the disk up to `leave` bytes."""
    return (
        "import shutil\n"
        f"rest = shutil.disk_usage('disk').free - {leave}\n"
        "pathlib.Path('disk/ballast').write_bytes(b'x' * rest)\n"
    )


def failed(workspace: Workspace, result: Result, run: str, step: int, *parts: str) -> None:
    """The run ended with one error that holds all parts; status.json says so, or a warning that it could not."""
    warning = "Warning: status.json could not be written"
    lines = result.err.splitlines()
    refused(
        Result(result.code, result.out, "\n".join(line for line in lines if not line.startswith(warning))),
        *parts,
        code=1,
    )
    if not any(line.startswith(warning) for line in lines):
        status = workspace.status(run)
        assert (status["status"], status["step"]) == ("failed", step)
        assert parts[0] in status["reason"]
    assert not leftovers(workspace.path / run)


def leftovers(run: Path) -> list[str]:
    """Names of what was not completed."""
    return [path.name for path in run.rglob("*") if path.name.endswith(".tmp")]


# --- Full disks -------------------------------------------------------------------------------------------------


def test_a_disk_without_room_for_a_checkpoint_is_found_before_training(
    project: Workspace, disk: Callable[[str], Path]
) -> None:
    path = disk("2m")
    for output_dir in ("disk", "disk/run", "disk/deep/down/run"):
        result = train(project, output_dir=output_dir)
        needed = "output_dir: a checkpoint of this model needs about 4.1 MiB, and 2.0 MiB is free in"
        refused(result, needed, str(path), "free some space or set output_dir")
        assert "Starting training" not in result.out
        assert not list(path.iterdir())


def test_a_disk_without_room_for_all_checkpoints_is_a_warning(
    project: Workspace, disk: Callable[[str], Path]
) -> None:
    disk("24m")
    warning = "[Pretrain] Warning: 12 checkpoints need 49."
    values = {"output_dir": "disk/run", "training__save_steps": 1}
    out = done(train(project, **values))
    assert [line for line in out.splitlines() if warning in line and "training.keep_checkpoints" in line], out
    shutil.rmtree(project.path / "disk" / "run")
    assert "Warning" not in done(train(project, training__keep_checkpoints=2, **values))


def test_space_that_runs_out_between_saves_ends_the_run_before_the_save(
    project: Workspace, disk: Callable[[str], Path]
) -> None:
    run = disk("32m") / "run"
    result = train(project, at_step={5: fill(MIB)}, output_dir="disk/run", **SAVE)
    said = "checkpoint-6 needs about 4.1 MiB, and 1.0 MiB is free in disk/run; earlier checkpoints are kept"
    failed(project, result, "disk/run", 6, said, "free some space")
    assert checkpoints(run) == [3]
    assert model_files(run / "checkpoint-3") == model_files(project.path / "straight" / "checkpoint-3")
    result = train(project, "--resume", output_dir="disk/run", **SAVE)
    refused(result, "output_dir: a checkpoint of this model needs about 4.1 MiB, and ", "free some space")
    (project.path / "disk" / "ballast").unlink()
    done(train(project, "--resume", output_dir="disk/run", **SAVE))
    require_same_run(project, "disk/run", "straight")


@pytest.mark.parametrize("asynchronous", [False, True], ids=["", "async"])
@pytest.mark.parametrize("part", [0.0, 0.02, 0.1, 0.25, 0.4, 0.6, 0.8, 0.95])
def test_a_disk_that_fills_up_during_a_save(
    project: Workspace, disk: Callable[[str], Path], part: float, asynchronous: bool
) -> None:
    """Wherever in the save that is. The step after it tells of a save in the background."""
    run = disk("32m") / "run"
    values = {"output_dir": "disk/run", "training__async_checkpoint": asynchronous, **SAVE}
    pages = sum(-(-path.stat().st_size // 4096) for path in _files(project.path / "straight" / "checkpoint-6"))
    result = train(project, at_save={6: fill(round(part * pages) * 4096)}, **values)
    steps = steps_of(project, "disk/run")
    assert steps == list(range(1, len(steps) + 1))
    assert 6 <= len(steps) <= (9 if asynchronous else 6)
    said = "disk/run/checkpoint-6 could not be written: No space left on device"
    failed(project, result, "disk/run", len(steps), said, "disk/run/checkpoint-3 is kept and complete")
    assert "Checkpoint saved: disk/run/checkpoint-6" not in result.out
    assert checkpoints(run) == [3]
    assert model_files(run / "checkpoint-3") == model_files(project.path / "straight" / "checkpoint-3")
    # It goes on where there is room.
    shutil.copytree(run, project.path / "moved")
    done(train(project, "--resume", output_dir="moved", **SAVE))
    require_same_run(project, "moved", "straight")


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_first_save_that_fails_says_that_there_is_no_other(
    project: Workspace, disk: Callable[[str], Path]
) -> None:
    disk("32m")
    result = train(project, at_save={3: fill(0)}, output_dir="disk/run", **SAVE)
    said = "disk/run/checkpoint-3 could not be written: No space left on device"
    failed(project, result, "disk/run", 3, said, "there is no earlier checkpoint")


@pytest.mark.parametrize("asynchronous", [False, True], ids=["", "async"])
def test_the_last_save_that_fails_is_not_lost(
    project: Workspace, disk: Callable[[str], Path], asynchronous: bool
) -> None:
    """No step comes after it that could tell; and there is no final/."""
    run = disk("32m") / "run"
    values = {"output_dir": "disk/run", "training__async_checkpoint": asynchronous, **SAVE}
    result = train(project, at_save={12: fill(40_000)}, **values)
    said = "disk/run/checkpoint-12 could not be written: No space left on device"
    failed(project, result, "disk/run", 12, said, "disk/run/checkpoint-9 is kept and complete")
    assert not (run / "final").exists()
    (project.path / "disk" / "ballast").unlink()
    done(train(project, "--resume", **values))
    require_same_run(project, "disk/run", "straight")


@pytest.mark.parametrize("asynchronous", [False, True], ids=["", "async"])
def test_a_stop_whose_save_fails_is_a_failure(
    project: Workspace, disk: Callable[[str], Path], asynchronous: bool
) -> None:
    """Exit code 75 would promise that the step is saved."""
    disk("32m")
    values = {"output_dir": "disk/run", "training__async_checkpoint": asynchronous, **SAVE}
    result = train(project, stop_after=5, at_save={5: fill(40_000)}, **values)
    said = "disk/run/checkpoint-5 could not be written: No space left on device"
    failed(project, result, "disk/run", 5, said, "disk/run/checkpoint-3 is kept and complete")
    assert "Stopped by" not in result.out


def test_a_final_that_cannot_be_written_leaves_the_last_checkpoint(
    project: Workspace, disk: Callable[[str], Path]
) -> None:
    run = disk("32m") / "run"
    later = f"os.environ['AT_SAVE_24'] = {fill(20_000)!r}"  # the second time that the last weights are collected
    result = train(project, at_save={12: later}, output_dir="disk/run", **SAVE)
    said = "disk/run/final could not be written: No space left on device"
    failed(project, result, "disk/run", 12, said, "disk/run/checkpoint-12 is complete")
    assert not (run / "final").exists()
    (project.path / "disk" / "ballast").unlink()
    out = done(train(project, "--resume", output_dir="disk/run", **SAVE))
    assert "[Pretrain] Resuming from disk/run/checkpoint-12 (step 12 of 12)" in out.splitlines()
    require_same_run(project, "disk/run", "straight")


def test_an_older_final_stays_while_the_new_one_cannot_be_written(
    project: Workspace, disk: Callable[[str], Path]
) -> None:
    run = disk("32m") / "run"
    done(train(project, training__max_steps=6, output_dir="disk/run", **SAVE))
    before = files(run / "final")
    later = f"os.environ['AT_SAVE_12'] = {fill(20_000)!r}"
    result = train(project, "--resume", at_save={6: later}, output_dir="disk/run", **SAVE)
    failed(project, result, "disk/run", 12, "disk/run/final could not be written")
    assert files(run / "final") == before


def test_metrics_that_cannot_be_written_end_the_run(project: Workspace, disk: Callable[[str], Path]) -> None:
    """Long before the next save would find out."""
    run = disk("32m") / "run"
    values = {"output_dir": "disk/run", "training__max_steps": 80, **SAVE}
    result = train(project, at_step={4: fill(0)}, **values | {"training__save_steps": 50})
    # The status cannot be written either; it is said.
    lines = result.err.splitlines()
    assert lines[0].startswith("Warning: status.json could not be written: [Errno 28] No space left on device")
    rest = Result(result.code, result.out, "\n".join(lines[1:]))
    refused(rest, "metrics cannot be written: No space left on device; checkpoints are kept", code=1)
    step = int(lines[1].removeprefix("Error: step ").partition(":")[0])
    assert 4 <= step < 50
    (project.path / "disk" / "ballast").unlink()
    done(train(project, "--resume", **values | {"training__max_steps": 6}))
    assert steps_of(project, "disk/run") == [1, 2, 3, 4, 5, 6]
    assert checkpoints(run) == [3, 6]


@pytest.mark.parametrize(
    ("code", "reason"),
    [(fill(0), "No space left on device"), ("import shutil; shutil.rmtree('disk/run')", "No such file or directory")],
    ids=["full", "gone"],
)
def test_what_a_user_sees_of_a_bad_disk_is_one_error(
    project: Workspace, disk: Callable[[str], Path], code: str, reason: str
) -> None:
    """In a process of its own: TensorBoard writes in a thread, whose traceback would come on top."""
    disk("32m")
    preset = project.preset(**values_of(output_dir="disk/run", training__max_steps=80))
    hook = {f"AT_FORWARD_{4 * ACCUMULATION}": code}
    result = run_command("pretrain", "--preset", str(preset), cwd=project.path, OMP_NUM_THREADS="1", **hook)
    assert result.code == 1
    lines = result.err.splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["Warning:", "Error:", "Fix:", "See:"], result.err
    assert f"metrics cannot be written: {reason}" in lines[1]


@pytest.mark.parametrize("lock", [True, False], ids=["", "no-lock-yet"])
def test_a_resume_on_a_full_disk_is_refused(project: Workspace, disk: Callable[[str], Path], lock: bool) -> None:
    path = disk("8m")
    shutil.copytree(project.path / "run", path / "run")
    if not lock:
        (path / "run" / ".lock").unlink()
    exec(fill(0), {"pathlib": sys.modules["pathlib"]})
    before = files(path)
    result = train(project, "--resume", output_dir="disk/run", **SAVE)
    refused(result, "output_dir: ", "free some space")
    assert files(path) == before


def test_what_a_killed_save_has_left_is_no_lack_of_space(project: Workspace, disk: Callable[[str], Path]) -> None:
    path = disk("10m")
    shutil.copytree(project.path / "run", path / "run")
    (path / "run" / ".checkpoint-9.tmp").mkdir()
    (path / "run" / ".checkpoint-9.tmp" / "model.safetensors").write_bytes(b"x" * 7 * MIB)
    out = done(train(project, "--resume", output_dir="disk/run", **SAVE))
    assert "[Pretrain] Removed .checkpoint-9.tmp, left by a save that was not completed" in out.splitlines()
    require_same_run(project, "disk/run", "straight")


# --- Other limits -----------------------------------------------------------------------------------------------


def test_a_limit_on_the_size_of_files_as_a_shell_sets_it(project: Workspace) -> None:
    """The shards are larger than 60 KiB, the weights are not."""
    preset = project.preset(**values_of(output_dir="limited", **SAVE))
    command = f"ulimit -f 60; exec {sys.executable} -m eulerforge pretrain --preset {preset}"
    process = subprocess.run(["bash", "-c", command], cwd=project.path, capture_output=True, text=True, check=False)
    result = Result(process.returncode, process.stdout, process.stderr)
    said = "limited/checkpoint-3 could not be written: File too large"
    failed(project, result, "limited", 3, said, "there is no earlier checkpoint")
    assert checkpoints(project.path / "limited") == []


@pytest.mark.parametrize("limit", [1_000, 5_000, 10_000, 30_000, 60_000])
def test_a_file_that_becomes_too_large(project: Workspace, limit: int) -> None:
    """Config, tokenizer, generators, weights or shards."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {hard[1]}))"
    try:
        result = train(project, "--resume", at_save={3: code}, **SAVE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, hard)
    said = "run/checkpoint-9 could not be written: "
    failed(project, result, "run", 9, said, "arge", "run/checkpoint-6 is kept and complete")
    assert checkpoints(project.path / "run") == [3, 6]
    done(train(project, "--resume", **SAVE))
    require_same_run(project, "run", "straight")


def test_a_name_that_is_taken(project: Workspace) -> None:
    (project.path / "run" / "checkpoint-9").write_text("mine")
    result = train(project, "--resume", **SAVE)
    failed(project, result, "run", 9, "run/checkpoint-9 could not be written: ", "run/checkpoint-6 is kept")
    assert (project.path / "run" / "checkpoint-9").read_text() == "mine"


def test_an_old_checkpoint_that_cannot_be_removed_does_not_end_the_run(project: Workspace) -> None:
    """A mount point cannot be renamed."""
    held = project.path / "run" / "checkpoint-3"
    mount("--bind", str(held), str(held))
    before = files(held)
    try:
        result = train(project, "--resume", training__keep_checkpoints=1, **SAVE)
    finally:
        unmount(held)
    assert "Traceback" not in result.err
    assert result.code == 0, result.err
    assert "checkpoint-3" in "".join(line for line in result.out.splitlines() if "Warning" in line)
    assert files(held) == before
    require_same_run(project, "run", "straight")


# --- Read-only and vanished directories -------------------------------------------------------------------------


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[None]:
    """A directory as a read-only mount shows it; root too cannot write there."""
    mount("--bind", str(path), str(path))
    try:
        mount("-o", "remount,bind,ro", str(path))
        yield
    finally:
        unmount(path)


def test_a_read_only_run_is_not_resumed_but_branched(project: Workspace) -> None:
    with read_only(project.path / "run"):
        before = files(project.path / "run")
        for arguments in (("--resume",), ("--resume", "run/checkpoint-3")):
            result = train(project, *arguments, **SAVE)
            refused(result, "output_dir: ", "run is not writable (Read-only file system)")
        done(train(project, "--resume", "run/checkpoint-6", "--output-dir", "new", **SAVE))
        assert files(project.path / "run") == before
    assert curve(project, "new") == curve(project, "straight")[6:]


def test_a_run_in_a_read_only_directory_is_refused(project: Workspace) -> None:
    (project.path / "folder").mkdir()
    with read_only(project.path / "folder"):
        for output_dir in ("folder", "folder/run"):
            for arguments in ((), ("--resume",)):
                result = train(project, *arguments, output_dir=output_dir)
                refused(result, f"output_dir: {project.path}/{output_dir}", "is not writable (Read-only file system)")


@pytest.mark.parametrize("asynchronous", [False, True], ids=["", "async"])
def test_a_directory_that_becomes_read_only_while_the_run_goes(project: Workspace, asynchronous: bool) -> None:
    run = project.path / "run"
    mount("--bind", str(run), str(run))  # skips where that is not permitted
    unmount(run)
    before = files(run / "checkpoint-6")
    over = (
        "import subprocess; subprocess.run(['mount', '-t', 'tmpfs', '-o', 'ro,size=16m', 'tmpfs', 'run'], check=True)"
    )
    try:
        result = train(project, "--resume", at_step={2: over}, training__async_checkpoint=asynchronous, **SAVE)
    finally:
        unmount(run)
    lines = result.err.splitlines()
    assert lines[0].startswith("Warning: status.json could not be written: [Errno 30] Read-only file system")
    rest = Result(result.code, result.out, "\n".join(lines[1:]))
    # The open metrics.jsonl lies under the mount; the first to notice is TensorBoard, whose file is not to be found.
    refused(rest, "step 8: metrics cannot be written: No such file or directory (", code=1)
    assert files(run / "checkpoint-6") == before


@pytest.mark.parametrize("asynchronous", [False, True], ids=["", "async"])
@pytest.mark.parametrize("how", ["removed", "renamed", "unmounted"])
def test_a_directory_that_goes_away_while_the_run_goes_is_not_made_anew(
    project: Workspace, disk: Callable[[str], Path], how: str, asynchronous: bool
) -> None:
    """Writing on the disk below a lost mount would hide the data and fill that disk."""
    run = disk("32m") / "run"
    shutil.copytree(project.path / "run", run)
    code = {
        "removed": "import shutil; shutil.rmtree('disk/run')",
        "renamed": "os.rename('disk/run', 'disk/other')",
        "unmounted": "import subprocess; subprocess.run(['umount', '-l', 'disk'], check=True)",
    }[how]
    values = {"output_dir": "disk/run", "training__async_checkpoint": asynchronous, **SAVE}
    result = train(project, "--resume", at_step={2: code}, **values)
    lines = result.err.splitlines()
    assert lines[0].startswith("Warning: status.json could not be written: [Errno 2] No such file or directory")
    rest = Result(result.code, result.out, "\n".join(lines[1:]))
    refused(rest, "step 8: metrics cannot be written: No such file or directory (", code=1)
    assert not run.exists()
    if how == "renamed":
        assert checkpoints(project.path / "disk" / "other") == [3, 6]
        done(train(project, "--resume", **values | {"output_dir": "disk/other"}))
        require_same_run(project, "disk/other", "straight")


def test_a_directory_that_goes_away_during_a_save(project: Workspace) -> None:
    code = "import shutil; shutil.rmtree('run')"
    result = train(project, "--resume", at_save={3: code}, **SAVE)
    lines = [line for line in result.err.splitlines() if not line.startswith("Warning: status.json")]
    rest = Result(result.code, result.out, "\n".join(lines))
    refused(rest, "run/checkpoint-9 could not be written: ", code=1)
    assert not (project.path / "run").exists()


# --- Damaged checkpoints ----------------------------------------------------------------------------------------

SHARD = "trainer_state/shards/shard-00001-model-00001-of-00001.safetensors"
RANK = "trainer_state/rank-00000.safetensors"
STATE = "trainer_state/state.json"
MARKER = "trainer_state/manifest.json"

Damage = Callable[[Path], object]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def halve(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def flip(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def put(content: bytes) -> Damage:
    return lambda path: path.write_bytes(content)


MISSING_MARKER = f"its completeness marker {MARKER} is missing"
BAD_MARKER = f"its completeness marker {MARKER} cannot be read"

DAMAGES: list[tuple[str, str, Damage, str]] = [
    ("weights cut off", "model.safetensors", truncate, "model.safetensors has "),
    ("weights flipped", "model.safetensors", flip, "the content of model.safetensors differs from what was written"),
    ("weights missing", "model.safetensors", Path.unlink, "model.safetensors is missing"),
    ("weights empty", "model.safetensors", empty, "model.safetensors has 0 bytes, "),
    ("weights a directory", "model.safetensors", make_directory, "model.safetensors is missing"),
    ("weights a dead link", "model.safetensors", dangle, "model.safetensors is missing"),
    ("config longer", "config.json", lengthen, "config.json has "),
    ("code flipped", "modeling_kit.py", flip, "the content of modeling_kit.py differs from what was written"),
    ("tokenizer flipped", "tokenizer.json", flip, "the content of tokenizer.json differs from what was written"),
    ("shard cut off", SHARD, truncate, f"{SHARD} has "),
    ("shard flipped", SHARD, flip, f"the content of {SHARD} differs from what was written"),
    ("shard missing", SHARD, Path.unlink, f"{SHARD} is missing"),
    ("generators missing", RANK, Path.unlink, f"{RANK} is missing"),
    ("generators flipped", RANK, flip, f"the content of {RANK} differs from what was written"),
    ("state flipped", STATE, flip, f"the content of {STATE} differs from what was written"),
    ("state missing", STATE, Path.unlink, f"{STATE} is missing"),
    ("marker missing", MARKER, Path.unlink, MISSING_MARKER),
    ("marker a directory", MARKER, make_directory, MISSING_MARKER),
    ("marker empty", MARKER, empty, BAD_MARKER),
    ("marker cut off", MARKER, halve, BAD_MARKER),
    ("marker zeros", MARKER, put(b"\0" * 1000), BAD_MARKER),
    ("marker no text", MARKER, put(b"\xff\xfe"), BAD_MARKER),
    ("marker a list", MARKER, put(b"[]"), BAD_MARKER),
    ("marker without files", MARKER, put(b'{"format": 1}'), BAD_MARKER),
    (
        "marker of wrong notes",
        MARKER,
        put(b'{"format": 1, "files": {"config.json": 5, "trainer_state/state.json": 5}}'),
        BAD_MARKER,
    ),
    ("marker naming nothing", MARKER, put(b'{"format": 1, "files": {}}'), ""),
    ("marker of tomorrow", MARKER, put(b'{"format": 2, "files": {}}'), "its format 2 is not 1: another version"),
    ("directory empty", "", lambda path: (shutil.rmtree(path), path.mkdir()), MISSING_MARKER),
    ("trainer_state missing", "trainer_state", shutil.rmtree, MISSING_MARKER),
]


def _require_skipped(out: str, name: str, reason: str) -> None:
    lines = out.splitlines()
    assert any(line.startswith(f"[Pretrain] Skipped run/{name}: {reason}") for line in lines), out
    assert f"[Pretrain] Set aside {name} as {name}.set-aside: it is beyond step 3" in lines
    assert "[Pretrain] Resuming from run/checkpoint-3 (step 3 of 12)" in lines


def everything(folder: Path) -> dict[str, str]:
    """Files below a folder by their path in it."""
    return {str(Path(name).relative_to(folder)): value for name, value in files(folder).items()}


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [row[1:] for row in DAMAGES],
    ids=[row[0].replace(" ", "-") for row in DAMAGES],
)
def test_a_damaged_checkpoint_is_skipped_and_set_aside(
    project: Workspace, name: str, damage: Damage, reason: str
) -> None:
    run = project.path / "run"
    damage(run / "checkpoint-6" / name)
    broken = everything(run / "checkpoint-6")
    out = done(train(project, "--resume", **SAVE))
    _require_skipped(out, "checkpoint-6", reason)
    assert everything(run / "checkpoint-6.set-aside") == broken
    require_same_run(project, "run", "straight")
    assert checkpoints(run) == [3, 6, 9, 12]


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [row[1:] for row in DAMAGES if row[0] in ("weights flipped", "shard missing", "marker missing", "marker empty")],
)
def test_a_named_checkpoint_that_is_damaged_is_refused(
    project: Workspace, name: str, damage: Damage, reason: str
) -> None:
    damage(project.path / "run" / "checkpoint-6" / name)
    before = files(project.path / "run")
    result = train(project, "--resume", "run/checkpoint-6", **SAVE)
    refused(result, f"--resume: run/checkpoint-6 is not complete: {reason}", "--resume run takes the newest complete")
    assert files(project.path / "run") == before
    done(train(project, "--resume", "run", training__max_steps=4))
    assert steps_of(project) == [1, 2, 3, 4]


def test_without_any_complete_checkpoint_the_run_is_refused_not_started_over(project: Workspace) -> None:
    """Each is named with its reason. Starting over would overwrite what someone may mend."""
    run = project.path / "run"
    flip(run / "checkpoint-3" / "model.safetensors")
    (run / "checkpoint-6" / SHARD).unlink()
    before = files(run)
    for arguments in (("--resume",), ("--resume", "run"), ("--resume", "run", "--output-dir", "new")):
        result = train(project, *arguments, **SAVE)
        assert result.code == 2
        lines = result.err.splitlines()
        assert lines[0] == "Error: 2 problems"
        assert lines[1] == f"  1. --resume: run/checkpoint-6 cannot be used: {SHARD} is missing"
        assert lines[3] == (
            "  2. --resume: run/checkpoint-3 cannot be used: the content of model.safetensors differs from what was "
            "written"
        )
        assert lines[2] == lines[4]
        assert lines[2].startswith("     Fix: copy it back from a backup")
        assert files(run) == before
        assert not (project.path / "new").exists()
    shutil.rmtree(run / "checkpoint-3")
    refused(train(project, "--resume", **SAVE), f"run/checkpoint-6 cannot be used: {SHARD} is missing")
    shutil.rmtree(run / "checkpoint-6")
    out = done(train(project, "--resume", training__max_steps=3))
    assert "No checkpoint in run yet: starting from the beginning." in out
    assert steps_of(project) == [1, 2, 3]


def test_several_damaged_checkpoints_are_skipped_one_after_the_other(project: Workspace) -> None:
    run = project.path / "run"
    shutil.copytree(run / "checkpoint-6", run / "checkpoint-9")  # says step 6 inside
    flip(run / "checkpoint-9" / STATE)
    (run / "checkpoint-6" / MARKER).unlink()
    out = done(train(project, "--resume", **SAVE))
    _require_skipped(out, "checkpoint-9", f"the content of {STATE} differs from what was written")
    _require_skipped(out, "checkpoint-6", MISSING_MARKER)
    require_same_run(project, "run", "straight")


def test_a_damaged_checkpoint_below_the_newest_does_not_matter(project: Workspace) -> None:
    flip(project.path / "run" / "checkpoint-3" / "model.safetensors")
    before = files(project.path / "run" / "checkpoint-3")
    out = done(train(project, "--resume", **SAVE))
    assert "Skipped" not in out
    assert files(project.path / "run" / "checkpoint-3") == before
    require_same_run(project, "run", "straight")


def test_a_checkpoint_whose_name_lies_is_not_taken(project: Workspace) -> None:
    """A copy under another number would make the run jump over steps, or do them twice."""
    run = project.path / "run"
    shutil.copytree(run / "checkpoint-3", run / "checkpoint-9")
    out = done(train(project, "--resume", **SAVE))
    assert "[Pretrain] Resuming from run/checkpoint-6 (step 6 of 12)" in out.splitlines()
    assert [line for line in out.splitlines() if line.startswith("[Pretrain] Skipped run/checkpoint-9: ")]
    require_same_run(project, "run", "straight")


def test_a_checkpoint_of_another_run_is_not_taken(project: Workspace) -> None:
    """For example one that was left in a directory which was copied over."""
    run = project.path / "run"
    shutil.copytree(project.path / "straight" / "checkpoint-9", run / "checkpoint-9")
    foreign = everything(run / "checkpoint-9")
    names = [json.loads((project.path / name / "pretrain_config.json").read_text()) for name in ("straight", "run")]
    other, own = (config["run_id"] for config in names)
    out = done(train(project, "--resume", **SAVE))
    lines = out.splitlines()
    assert f"[Pretrain] Skipped run/checkpoint-9: it belongs to another run ({other}, this one is {own})" in lines
    assert "[Pretrain] Set aside checkpoint-9 as checkpoint-9.set-aside: it is beyond step 6" in lines
    assert everything(run / "checkpoint-9.set-aside") == foreign
    require_same_run(project, "run", "straight")


def test_only_checkpoints_of_another_run_are_refused_unless_named(project: Workspace) -> None:
    run = project.path / "run"
    for step in (3, 6):
        shutil.rmtree(run / f"checkpoint-{step}")
    shutil.copytree(project.path / "straight" / "checkpoint-3", run / "checkpoint-3")
    before = files(run)
    refused(train(project, "--resume", **SAVE), "run/checkpoint-3 cannot be used: it belongs to another run")
    assert files(run) == before
    done(train(project, "--resume", "run/checkpoint-3", **SAVE))
    require_same_run(project, "run", "straight")
    # What it writes is its own: the next resume finds it.
    shutil.rmtree(run / "checkpoint-12")
    (run / "status.json").unlink()
    out = done(train(project, "--resume", **SAVE))
    assert "[Pretrain] Resuming from run/checkpoint-9 (step 9 of 12)" in out.splitlines()


LEFTOVERS = (".checkpoint-8.tmp", ".final.tmp", ".final.old.tmp", ".status.json.tmp", ".metrics.jsonl.tmp")


def _leave(run: Path) -> None:
    for name in LEFTOVERS:
        if ".json" in name:
            (run / name).write_text("half")
        else:
            (run / name / "trainer_state").mkdir(parents=True)
            (run / name / "model.safetensors").write_bytes(b"half")
    shutil.copytree(run / "checkpoint-6", run / ".checkpoint-9.tmp")  # complete, but for its name


def test_leftovers_of_killed_saves_are_removed_and_told(project: Workspace) -> None:
    run = project.path / "run"
    _leave(run)
    out = done(train(project, "--resume", **SAVE)).splitlines()
    for name in (*LEFTOVERS, ".checkpoint-9.tmp"):
        assert f"[Pretrain] Removed {name}, left by a save that was not completed" in out
    assert "[Pretrain] Resuming from run/checkpoint-6 (step 6 of 12)" in out
    assert not leftovers(run)
    require_same_run(project, "run", "straight")


def test_a_resume_that_is_refused_removes_no_leftovers(project: Workspace) -> None:
    _leave(project.path / "run")
    before = files(project.path / "run")
    refused(train(project, "--resume", training__seed=1, **SAVE), "training.seed is 1, but 42")
    assert files(project.path / "run") == before
    done(train(project, "--resume", "run/checkpoint-3", "--output-dir", "new", **SAVE))
    assert files(project.path / "run") == before


def test_a_final_that_was_being_replaced_is_made_anew(project: Workspace) -> None:
    """Killed between the two renames: the old one is there under its temporary name, the new one is complete."""
    run = project.path / "run"
    done(train(project, "--resume", **SAVE))
    whole = model_files(run / "final")
    (run / "final").rename(run / ".final.old.tmp")
    shutil.copytree(run / ".final.old.tmp", run / ".final.tmp")
    (run / "status.json").write_text(json.dumps({"status": "running", "step": STEPS, "reason": ""}))
    out = done(train(project, "--resume", **SAVE))
    assert "Removed .final.old.tmp" in out
    assert model_files(run / "final") == whole
    assert not leftovers(run)


def test_a_run_that_was_finished_but_lost_its_final_makes_it_again(project: Workspace) -> None:
    run = project.path / "run"
    done(train(project, "--resume", **SAVE))
    whole = model_files(run / "final")
    shutil.rmtree(run / "final")
    done(train(project, "--resume", **SAVE))
    assert model_files(run / "final") == whole
    assert steps_of(project) == list(range(1, STEPS + 1))


def test_a_stop_right_after_a_resume_is_saved(project: Workspace) -> None:
    """The signal comes in the first step; the checkpoint that it resumed from stays."""
    result = train(project, "--resume", at_step={1: STOP}, training__keep_checkpoints=1, **SAVE)
    assert result.code == 75
    assert checkpoints(project.path / "run") == [6, 7]
