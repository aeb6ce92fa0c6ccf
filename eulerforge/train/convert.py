"""`eulerforge export`: checkpoint -> Hugging Face directory in a chosen dtype, verified before it gets its name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from eulerforge.config.paths import require_writable
from eulerforge.errors import CheckpointError, ModelError, OutputError, Problem, ResumeError
from eulerforge.files import publish_directory, shown_path
from eulerforge.models.build import build_model
from eulerforge.models.directory import ModelDirectory
from eulerforge.models.tokenizer import load_tokenizer
from eulerforge.train.checkpoint import disk_errors
from eulerforge.train.export import gather_state, write_model_directory
from eulerforge.train.manifest import STATE_FOLDER, find_damage
from eulerforge.train.resume import RunPlan, choose_checkpoint
from eulerforge.train.run_directory import is_run_directory
from eulerforge.train.state import Progress
from eulerforge.train.trainer_state import MASTERS, master_tensors, read_shared


@dataclass(frozen=True)
class ExportRequest:
    """What to export.

    Attributes:
        source: a checkpoint, `final/` or a run directory.
        target: new or empty.
        dtype: of floating-point weights, None for the checkpoint's own.
        trust_remote_code: whether the source's own code may run; needed to load it.
    """

    source: Path
    target: Path
    dtype: str | None
    trust_remote_code: bool


def export_checkpoint(request: ExportRequest, say: Callable[[str], None]) -> None:
    """Write and verify the directory; complete or not there.

    Float32 weights that a checkpoint keeps beside its bfloat16 model are used, so that nothing is rounded twice.

    Raises:
        InputError: source or target cannot be used.
        CheckpointError: the directory could not be written, or did not load as written.
    """
    transformers.utils.logging.disable_progress_bar()
    source = _find_source(request.source, say)
    _check_target(request.target)
    directory = ModelDirectory.read(source)
    if directory.has_custom_code and not request.trust_remote_code:
        raise ModelError(
            f"{shown_path(source)} has its own Python code, and --trust-remote-code is not given",
            "read that code, then add --trust-remote-code",
        )
    if directory.weights is None:
        raise ModelError(f"{shown_path(source)} holds no weights", "give a checkpoint-N, a final/ or a run directory")
    dtype = getattr(torch, request.dtype or directory.config.get("dtype", "float32"))
    model = build_model(directory, request.trust_remote_code, seed=0).model
    if (source / STATE_FOLDER).is_dir() and Progress.read(source).masters:
        read_shared(source, master_tensors(model), None, kind=MASTERS)
        say(f"Using the float32 weights in {STATE_FOLDER}")
    tokenizer = load_tokenizer(str(source), request.trust_remote_code, add_bos=False, add_eos=False)
    weights = gather_state(model, dtype, keep=True)
    _require_in_range(model, weights, dtype)
    request.target.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(request.target, f"{shown_path(source)} is untouched"):
        if request.target.is_dir():
            request.target.rmdir()
        with publish_directory(request.target) as temporary:
            write_model_directory(temporary, model, weights, tokenizer, directory, dtype)
            _verify(temporary, request.trust_remote_code)
    say(f"Exported {shown_path(source)} to {shown_path(request.target)} ({dtype}); it loads as written.")


def _find_source(given: Path, say: Callable[[str], None]) -> Path:
    if not given.is_dir():
        raise ResumeError(f"{given} is not a directory", "give a checkpoint-N, a final/ or a run directory")
    if (given / STATE_FOLDER).is_dir():
        if damage := find_damage(given, contents=True):
            raise ResumeError(f"{shown_path(given)} is not complete: {damage}", "export another checkpoint")
        return given
    if (given / "config.json").is_file():
        return given
    try:
        newest = choose_checkpoint(RunPlan(None, given), say) if is_run_directory(given) else None
    except ResumeError as error:
        problems = [Problem(problem.what.removeprefix("--resume: "), _ADVICE) for problem in error.problems]
        raise ResumeError.of(problems) from None
    if newest is None:
        raise ResumeError(
            f"{shown_path(given)} holds no checkpoint", "give a checkpoint-N, a final/ or a run directory"
        )
    return newest


_ADVICE = "copy the checkpoint back from a backup, or export another one"


def _require_in_range(model: torch.nn.Module, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Refuse a dtype in which a finite weight becomes infinite.

    Raises:
        OutputError: naming the weight.
    """
    state = model.state_dict()
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all() and torch.isfinite(state[name]).all():
            largest = float(state[name].abs().max())
            raise OutputError(
                f"--dtype: {name} holds {largest:g}, and {str(dtype).removeprefix('torch.')} ends at "
                f"{torch.finfo(dtype).max:g}",
                "use --dtype bfloat16 or float32",
            )


def _check_target(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"--output: {target} exists already", "give a directory that does not exist yet")
    require_writable(target, "--output", OutputError)


def _verify(folder: Path, trust_remote_code: bool) -> None:
    command = [sys.executable, "-m", "eulerforge.train.reload", json.dumps([str(folder), trust_remote_code])]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(
            f"what was written does not load as it should: {reason}",
            "nothing was exported; please report it with the model's config.json",
        )
