"""`--resume`: which run to go on with, and from which of its checkpoints.

    --resume                        the newest complete checkpoint in output_dir
    --resume RUN                    the same for that run directory
    --resume RUN/checkpoint-N       that checkpoint
    with another output_dir         a new run begins there at that checkpoint; the old one is only read

No torch here: the command line looks before it starts any process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from eulerforge.config.paths import expand_path
from eulerforge.errors import OutputError, Problem, ResumeError
from eulerforge.files import shown_path
from eulerforge.train.manifest import STATE_FOLDER, find_damage
from eulerforge.train.run_directory import CONFIG, RunDirectory, check_output_dir, step_of
from eulerforge.train.state import Progress


@dataclass(frozen=True)
class RunPlan:
    """Where a run writes and what it begins with.

    Attributes:
        output_dir: as `RunDirectory.create` takes it, or the directory to go on in.
        source: run directory whose newest checkpoint is wanted, None for a fresh start.
        checkpoint: the checkpoint that was asked for by name.
        branch: `source` is another run, which is only read.
    """

    output_dir: str | None
    source: Path | None = None
    checkpoint: Path | None = None
    branch: bool = False

    @property
    def resumes(self) -> bool:
        """Whether `--resume` was given."""
        return self.source is not None

    def directory_in_use(self) -> Path | None:
        """The existing run directory to go on in, None where one is to be made."""
        if self.source is None or self.branch or not self.source.is_dir() or not any(self.source.iterdir()):
            return None
        return self.source

    def finished_step(self) -> int | None:
        """The last step of the run to go on with, if it has finished. A named checkpoint is always gone on from."""
        if self.source is None or self.branch or self.checkpoint is not None or not self.source.is_dir():
            return None
        return RunDirectory(self.source).finished_step()


def plan_run(output_dir: str | None, resume: str | None) -> RunPlan:
    """Read `--resume` and `output_dir` together and check both against the file system. Writes nothing.

    Args:
        resume: None if not given, "" without a directory.

    Raises:
        OutputError: the run directory cannot be used.
        ResumeError: there is nothing of the kind to resume from.
    """
    if resume is None:
        check_output_dir(output_dir)
        return RunPlan(output_dir)
    if resume == "":
        if output_dir is None:
            raise ResumeError(
                "--resume: which run? output_dir is not set",
                "give --output-dir (or output_dir in the preset), or --resume RUN_DIRECTORY",
            )
        check_output_dir(output_dir, may_be_used=True)
        return RunPlan(output_dir, expand_path(output_dir, "output_dir", ResumeError))
    given = expand_path(resume, "--resume", ResumeError)
    if not given.is_dir():
        raise ResumeError(f"--resume: {given} is not a directory", "give a run directory or a checkpoint-N in one")
    checkpoint, home = (given, given.parent) if _looks_like_checkpoint(given) else (None, given)
    if checkpoint is None and not (home / CONFIG).is_file() and not RunDirectory(home).checkpoints():
        raise ResumeError(
            f"--resume: {home} holds neither {CONFIG} nor a checkpoint",
            "give a run directory or a checkpoint-N in one",
        )
    if output_dir is not None and not _is_same(expand_path(output_dir, "output_dir", ResumeError), home):
        return _branch(output_dir, home, checkpoint)
    if not (home / CONFIG).is_file():
        raise ResumeError(
            f"--resume: {home} is not a run directory ({CONFIG} is missing)",
            "add --output-dir NEW to begin a new run at this checkpoint",
        )
    check_output_dir(str(home), may_be_used=True)
    return RunPlan(str(home), home, checkpoint)


def _is_same(one: Path, other: Path) -> bool:
    """Whether both are names of one directory (scratch directories are often links)."""
    return one == other or (one.exists() and one.samefile(other))


def _branch(output_dir: str, home: Path, checkpoint: Path | None) -> RunPlan:
    target = expand_path(output_dir, "output_dir", OutputError)
    if target.is_dir() and any(target.iterdir()):
        raise OutputError(
            f"output_dir: {target} is not empty, and --resume names another run",
            f"give --resume {output_dir} to go on with the run in it, or choose a new output_dir",
        )
    check_output_dir(output_dir)
    return RunPlan(output_dir, home, checkpoint, branch=True)


def _looks_like_checkpoint(path: Path) -> bool:
    if (path / STATE_FOLDER).is_dir() or step_of(path) is not None:
        return True
    if path.name == "final" or ((path / "config.json").is_file() and not (path / CONFIG).is_file()):
        raise ResumeError(
            f"--resume: {path} is a model, not a checkpoint: it holds no {STATE_FOLDER}",
            f"give a checkpoint-N, or begin a new run from its weights with model_dir: {path}",
        )
    return False


def choose_checkpoint(plan: RunPlan, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from, every byte of it verified; None if the run has not saved any yet.

    A run that has branched off another, and has not saved yet, begins again where it did.

    Args:
        say: prints a line for each one that is skipped.

    Raises:
        ResumeError: the one asked for is damaged, or all are.
    """
    if plan.checkpoint is not None:
        if damage := find_damage(plan.checkpoint, contents=True) or _misnamed(plan.checkpoint):
            raise ResumeError(
                f"--resume: {shown_path(plan.checkpoint)} is not complete: {damage}",
                f"--resume {shown_path(plan.checkpoint.parent)} takes the newest complete one",
            )
        return plan.checkpoint
    if plan.source is None or not plan.source.is_dir():
        return None
    run = RunDirectory(plan.source)
    identity, problems = run.run_id, []
    for path in reversed(run.checkpoints()):
        reason = find_damage(path, contents=True) or _misnamed(path) or _foreign(path, identity)
        if reason is None:
            return path
        problems.append(Problem(f"--resume: {shown_path(path)} cannot be used: {reason}", _ADVICE))
        say(f"Skipped {shown_path(path)}: {reason}")
    if problems:
        raise ResumeError.of(problems)
    origin = run.branched_from
    if origin is not None and (damage := find_damage(origin, contents=True)):
        raise ResumeError(
            f"--resume: the run in {shown_path(run.path)} has no checkpoint yet, and the one it began with, "
            f"{shown_path(origin)}, cannot be used: {damage}",
            _ADVICE,
        )
    return origin


_ADVICE = "copy it back from a backup, or move it away: a run without any checkpoint starts from the beginning"


def _misnamed(path: Path) -> str | None:
    """Why a complete checkpoint is not the one that its name says (a copy, for example)."""
    step = Progress.read(path).step
    return None if step_of(path) in (None, step) else f"it holds step {step}"


def _foreign(path: Path, identity: str | None) -> str | None:
    """Why a complete checkpoint is not this run's."""
    own = Progress.read(path).run
    return (
        None if identity is None or own == identity else f"it belongs to another run ({own}, this one is {identity})"
    )
