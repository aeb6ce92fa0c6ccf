"""Errors that a user can act on: what is wrong, how to fix it, where to read more.

Every error that is expected to reach a terminal derives from `EulerForgeError`. It carries its exit code
(2 for wrong input, 1 for a run that failed) and renders as three lines without a traceback. Anything else that
escapes is a defect of the program and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, with its remedy.

    Attributes:
        what: the fault in one line, starting with the place (`preset.yml:7: training.lr: ...`) where there is one.
        fix: what the user should do.
    """

    what: str
    fix: str


class EulerForgeError(Exception):
    """Base of all errors shown to users.

    Args:
        what: the fault in one line.
        fix: what to do about it.
        see: the documentation page; each subclass has a default.
    """

    exit_code: ClassVar[int] = 1
    default_see: ClassVar[str] = "docs/errors.md"

    def __init__(self, what: str, fix: str, see: str | None = None) -> None:
        super().__init__(what)
        self.problems: tuple[Problem, ...] = (Problem(what, fix),)
        self.see = see or self.default_see

    @classmethod
    def of(cls, problems: Sequence[Problem], see: str | None = None) -> Self:
        """One error for several problems, so that a user mends them all in one go."""
        error = cls(problems[0].what, problems[0].fix, see)
        error.problems = tuple(problems)
        return error

    def render(self) -> str:
        """The text for stderr: three lines for one problem, two lines a problem and one `See:` for several."""
        if len(self.problems) == 1:
            problem = self.problems[0]
            lines = [f"Error: {_one_line(problem.what)}", f"Fix: {_one_line(problem.fix)}"]
        else:
            lines = [f"Error: {len(self.problems)} problems"]
            for number, problem in enumerate(self.problems, 1):
                lines.append(f"  {number}. {_one_line(problem.what)}")
                lines.append(f"     Fix: {_one_line(problem.fix)}")
        return "\n".join([*lines, f"See: {self.see}"])


def _one_line(text: str) -> str:
    return " ".join(text.split())


def reason_of(error: BaseException, limit: int = 300) -> str:
    """The message of another library's exception as one line, cut to `limit` characters."""
    text = _one_line(str(error)) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]}..."


class InputError(EulerForgeError):
    """The user's input is wrong. Nothing has been written."""

    exit_code = 2


class UsageError(InputError):
    """The command line is wrong."""

    default_see = "eulerforge --help"


class PresetError(InputError):
    """The preset (or a `--set` override) is wrong."""

    default_see = "docs/preset.md"


class ModelError(InputError):
    """The model directory is wrong."""

    default_see = "docs/models.md"


class TokenizerError(InputError):
    """The tokenizer is missing or does not fit."""

    default_see = "docs/models.md"


class DataError(InputError):
    """The corpus is missing, malformed or too small."""

    default_see = "docs/data.md"


class OutputError(InputError):
    """The run directory cannot be used."""

    default_see = "docs/output.md"


class ResumeError(InputError):
    """The run cannot be resumed as it was asked to be."""

    default_see = "docs/checkpoints.md"


class StoppedError(BaseException):
    """The run was asked to stop; not a failure. Not an `Exception`, so that no `except Exception` of other code,
    in which a signal may find the program, takes it for its own.

    Args:
        message: for the user.
        agreed: all processes stop together. Otherwise the others have yet to be ended.
    """

    exit_code = 75

    def __init__(self, message: str, *, agreed: bool) -> None:
        super().__init__(message)
        self.agreed = agreed


class PeerFailedError(EulerForgeError):
    """Another process of the run failed; its own message says why."""

    default_see = "docs/distributed.md"


class PreparationError(EulerForgeError):
    """Tokens could not be made or read any more, for no fault of the input. Finished parts are kept."""

    default_see = "docs/data.md"


class CheckpointError(EulerForgeError):
    """A checkpoint could not be written. Those written before are kept."""

    default_see = "docs/checkpoints.md"


class TrainingError(EulerForgeError):
    """The run cannot go on, for example because the loss is not finite. Checkpoints written so far are kept."""

    default_see = "docs/training.md"
