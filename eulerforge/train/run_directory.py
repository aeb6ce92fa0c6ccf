"""The run directory: chosen and checked before anything heavy, made when the input is known to be good."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from traceback import format_exception_only
from typing import Any, Literal

from eulerforge.config.paths import expand_path, require_writable
from eulerforge.errors import EulerForgeError, OutputError
from eulerforge.files import write_json
from eulerforge.train.state import TrainState

Status = Literal["running", "finished", "failed"]


DEFAULT_PARENT = "outputs"
"""Where a run goes whose preset names no `output_dir`."""


def check_output_dir(output_dir: str | None) -> None:
    """Refuse a run directory that is in use or cannot be made. Leaves nothing behind.

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
        raise OutputError(
            f"output_dir: {path} is not empty; a run never mixes with an earlier one",
            "choose a new output_dir, or remove the old run",
        )
    require_writable(path, "output_dir", OutputError)


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

    def write_config(self, values: dict[str, Any]) -> None:
        """pretrain_config.json: everything that was decided, for people and for later resumes."""
        write_json(self.path / "pretrain_config.json", values)

    def write_status(self, status: Status, step: int, reason: str = "") -> None:
        """status.json: what a batch script needs to know."""
        write_json(self.path / "status.json", {"status": status, "step": step, "reason": reason})

    @contextlib.contextmanager
    def recorded(self, state: TrainState) -> Iterator[None]:
        """Keep status.json true, whatever happens inside."""
        self.write_status("running", state.step)
        try:
            yield
        except BaseException as error:
            reason = str(error) if isinstance(error, EulerForgeError) else "".join(format_exception_only(error))
            self.write_status("failed", state.step, reason.strip())
            raise
        self.write_status("finished", state.step)


class NullRunDirectory(RunDirectory):
    """The run directory as ranks other than 0 see it: same paths, nothing written."""

    def write_config(self, values: dict[str, Any]) -> None:
        """Rank 0 does."""

    def write_status(self, status: Status, step: int, reason: str = "") -> None:
        """Rank 0 does."""
