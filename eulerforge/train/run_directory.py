"""The run directory: chosen and checked before anything heavy, made when the input is known to be good.

A resumed run goes on in its old directory. What a killed process left behind there is put in order first: unfinished
saves are removed, metrics are cut back to the checkpoint, checkpoints beyond it are set aside.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from traceback import format_exception_only
from typing import IO, Any, Literal

from eulerforge.config.paths import expand_path, require_writable
from eulerforge.errors import EulerForgeError, OutputError, StoppedError
from eulerforge.files import TEMPORARY, write_json
from eulerforge.metrics.trackers import cut_metrics
from eulerforge.train.state import TrainState

Status = Literal["running", "finished", "preempted", "failed"]


DEFAULT_PARENT = "outputs"
"""Where a run goes whose preset names no `output_dir`."""

CONFIG, STATUS, LOCK = "pretrain_config.json", "status.json", ".lock"
_OWN_NAMES = {CONFIG, STATUS, "metrics.jsonl", "tensorboard", "final"}
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_SET_ASIDE = ".set-aside"


def check_output_dir(output_dir: str | None, *, may_be_used: bool = False) -> None:
    """Refuse a run directory that is in use or cannot be made. Leaves nothing behind.

    Args:
        may_be_used: it may hold an earlier run (`--resume`), but nothing else.

    Raises:
        OutputError: with the reason.
    """
    path = expand_path(output_dir or DEFAULT_PARENT, "output_dir", OutputError)
    if path.is_symlink() and not path.exists():
        raise OutputError(
            f"output_dir: {path} is a link to nothing", "remove the link or set output_dir to another directory"
        )
    if path.exists() and not path.is_dir():
        raise OutputError(f"output_dir: {path} is a file", "choose a directory that does not exist yet")
    if output_dir is not None and path.is_dir() and any(path.iterdir()):
        if not may_be_used:
            raise OutputError(
                f"output_dir: {path} is not empty; a run never mixes with an earlier one",
                "add --resume to go on with the run in it, or choose a new output_dir",
            )
        if not is_run_directory(path):
            raise OutputError(
                f"--resume: {path} is not empty and not a run directory ({CONFIG} is missing)",
                "give the output_dir of the run to go on with",
            )
    require_writable(path, "output_dir", OutputError)


def is_run_directory(path: Path) -> bool:
    """Whether an earlier run made it, perhaps one that was killed before it had written its first files."""
    if (path / CONFIG).is_file():
        return True
    return path.is_dir() and all(
        child.name in _OWN_NAMES or child.name.startswith(".") or _CHECKPOINT.fullmatch(child.name)
        for child in path.iterdir()
    )


class RunDirectory:
    """An existing run directory and the files with fixed names in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.final = path / "final"

    @classmethod
    def create(cls, output_dir: str | None, now: datetime) -> RunDirectory:
        """Make it: `output_dir` (new or empty), or `outputs/pretrain_YYYYmmdd_HHMMSS` with a suffix if taken."""
        check_output_dir(output_dir)
        if output_dir is not None:
            path = expand_path(output_dir, "output_dir", OutputError)
            path.mkdir(parents=True, exist_ok=True)
            return cls(path)
        base = Path(DEFAULT_PARENT).absolute() / f"pretrain_{now:%Y%m%d_%H%M%S}"
        base.parent.mkdir(parents=True, exist_ok=True)
        candidate, number = base, 1
        while True:
            with contextlib.suppress(FileExistsError):
                candidate.mkdir()
                return cls(candidate)
            number += 1
            candidate = base.with_name(f"{base.name}_{number}")

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.path / f"checkpoint-{step}"

    def checkpoints(self) -> list[Path]:
        """All directories with the name of a checkpoint, complete or not, by step."""
        found = [(step, path) for path in self.path.iterdir() if (step := step_of(path)) is not None]
        return [path for _, path in sorted(found) if path.is_dir()]

    @property
    def run_id(self) -> str | None:
        """Identity of the run in this directory, None if it has not come so far as to write it."""
        value = _read_object(self.path / CONFIG).get("run_id")
        return value if isinstance(value, str) else None

    @property
    def branched_from(self) -> Path | None:
        """The checkpoint of another run with which this one began, None if it began at step 1."""
        value = _read_object(self.path / CONFIG).get("branched_from")
        return Path(value) if isinstance(value, str) else None

    def finished_step(self) -> int | None:
        """The last step of a finished run, None for any other."""
        status = _read_object(self.path / STATUS)
        step = status.get("step")
        done = status.get("status") == "finished" and self.final.is_dir()
        return step if done and isinstance(step, int) else None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing here (rank 0, as long as the run lives).

        Raises:
            OutputError: another run is at work in this directory.
        """
        with contextlib.ExitStack() as held:
            try:
                file = held.enter_context((self.path / LOCK).open("a+"))
                _lock(file, self.path)
                file.truncate(0)
                file.write(secrets.token_hex(8))
                file.flush()
            except OSError as error:
                held.pop_all()  # closing would try to write once more
                raise OutputError(
                    f"output_dir: {self.path} cannot be written: {error.strerror}",
                    "free some space or make it writable, or set output_dir to another disk",
                ) from None
            yield

    def mark(self) -> str:
        """What the process that holds the lock has written into it: tells whether two nodes see one directory."""
        try:
            return (self.path / LOCK).read_text()
        except OSError:
            return ""

    def leftovers(self) -> list[Path]:
        """What a killed process has not completed."""
        return sorted(self.path.glob(f".*{TEMPORARY}"))

    def tidy(self, step: int) -> list[str]:
        """Put the directory into the state of the end of `step`; what was done, in words."""
        done = []
        for path in self.leftovers():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            done.append(f"Removed {path.name}, left by a save that was not completed")
        for path in self.checkpoints():
            if (number := step_of(path)) is not None and number > step:
                aside = _free_name(path.with_name(path.name + _SET_ASIDE))
                path.rename(aside)
                done.append(f"Set aside {path.name} as {aside.name}: it is beyond step {step}")
        if removed := cut_metrics(self.metrics, step):
            done.append(f"Cut metrics.jsonl back to step {step} ({removed} lines removed)")
        return done

    def write_config(self, values: dict[str, Any]) -> None:
        """pretrain_config.json: everything that was decided, for people and for later resumes."""
        write_json(self.path / CONFIG, values)

    def write_status(self, status: Status, step: int, reason: str = "") -> None:
        """status.json: what a batch script needs to know."""
        write_json(self.path / STATUS, {"status": status, "step": step, "reason": reason})

    @contextlib.contextmanager
    def recorded(self, state: TrainState) -> Iterator[None]:
        """Keep status.json true, whatever happens inside."""
        self.write_status("running", state.step)
        try:
            yield
        except BaseException as error:
            if isinstance(error, EulerForgeError | StoppedError):
                reason = str(error)
            else:
                reason = "".join(format_exception_only(error)).strip()
            try:
                self.write_status("preempted" if isinstance(error, StoppedError) else "failed", state.step, reason)
            except OSError as second:
                # On a full or vanished disk the first error is the one to show.
                sys.stderr.write(f"Warning: status.json could not be written: {second}\n")
            raise
        self.write_status("finished", state.step)


class NullRunDirectory(RunDirectory):
    """The run directory as ranks other than 0 see it: same paths, nothing written."""

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Rank 0 does."""
        yield

    def tidy(self, step: int) -> list[str]:
        """Rank 0 does."""
        return []

    def write_config(self, values: dict[str, Any]) -> None:
        """Rank 0 does."""

    def write_status(self, status: Status, step: int, reason: str = "") -> None:
        """Rank 0 does."""


def step_of(path: Path) -> int | None:
    """7 for `checkpoint-7`, None for anything else."""
    match = _CHECKPOINT.fullmatch(path.name)
    return int(match[1]) if match else None


def new_run_id() -> str:
    """Identity of a new run."""
    return secrets.token_hex(8)


def _lock(file: IO[str], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(
            f"output_dir: another process is writing to {path}",
            "wait for that run to end, or stop it, then run again",
        ) from None
    except OSError as error:
        # Some network file systems have no locks; the run is not worse off than without.
        sys.stderr.write(f"Warning: {path} cannot be locked ({error.strerror}): never start two runs in it.\n")


def _free_name(path: Path) -> Path:
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def _read_object(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(path.read_bytes())
        if isinstance(value, dict):
            return value
    return {}
