"""Checkpoints of a run: written by all processes, complete or not there, few or many kept.

begin     rank 0 looks for space and makes .checkpoint-N.tmp
collect   weights are gathered on rank 0, states stay sharded; with async_checkpoint they are copied here, and
          the rest goes on in a thread
write     each process its shards and its own file, rank 0 the Hugging Face directory; synced and summed
publish   rank 0: marker, rename; then older checkpoints beyond keep_checkpoints are removed
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from eulerforge.distributed.context import ProcessContext
from eulerforge.errors import CheckpointError, EulerForgeError, PeerFailedError
from eulerforge.files import begin_directory, publish, shown_path, sync_file, sync_tree, temporary_name
from eulerforge.metrics.console import Console
from eulerforge.metrics.meters import binary_size
from eulerforge.train.export import gather_state
from eulerforge.train.manifest import STATE_FOLDER, FileNotes, find_damage, note_files, write_manifest
from eulerforge.train.rng import capture_rng
from eulerforge.train.run_directory import RunDirectory
from eulerforge.train.state import Progress
from eulerforge.train.trainer_state import BufferWatch, Tensors, read_shared, shared_tensors, write_own, write_shared

_NO_LIMIT = timedelta(days=7)
"""Of collectives about checkpoints: a slow disk is not a lost process. A lost one closes its connection."""


@dataclass(frozen=True)
class CheckpointSettings:
    """What is saved and how.

    Attributes:
        saved: dtype of the weights in the Hugging Face directory.
        masters: also keep the weights as they are stored, because `saved` is less precise.
        keep: number of checkpoints, None for all.
        asynchronous: write while training goes on.
        resumed_from: the checkpoint that this run began with; never removed.
    """

    saved: torch.dtype
    masters: bool
    keep: int | None
    asynchronous: bool
    resumed_from: Path | None


@dataclass(frozen=True)
class _Content:
    """All that one process writes."""

    progress: Progress
    weights: Tensors
    shared: Tensors
    rng: Tensors
    buffers: Tensors


class Checkpointer:
    """Writes the checkpoints of a run.

    Args:
        write_model: writes the Hugging Face directory of given weights (rank 0).
        progress: where the run is.
        buffers: of the model as built.
    """

    def __init__(
        self,
        settings: CheckpointSettings,
        context: ProcessContext,
        run: RunDirectory,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        buffers: BufferWatch,
        progress: Callable[[], Progress],
        write_model: Callable[[Path, Tensors], None],
        console: Console,
    ) -> None:
        self._settings, self._context, self._run, self._console = settings, context, run, console
        self._model, self._optimizer, self._buffers = model, optimizer, buffers
        self._progress, self._write_model = progress, write_model
        self._group = checkpoint_group(context)
        self._newest: Path | None = settings.resumed_from
        self._inode = 0
        self._thread = ThreadPoolExecutor(1, "checkpoint") if settings.asynchronous else None
        self._pending: Future[None] | None = None

    @property
    def failed(self) -> bool:
        """Whether a write in the background has failed; `wait` then raises its error."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            CheckpointError: the write in the background failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def save(self, step: int) -> None:
        """Write the checkpoint of a finished step; with async_checkpoint, begin to. All processes must call it.

        Raises:
            CheckpointError: it, or the one before it, could not be written. Earlier checkpoints are untouched.
        """
        self.wait()
        target = self._run.checkpoint(step)
        with self._disk_errors(target), self._context.main_first(f"begin {target.name}"):
            if self._context.is_main:
                self._begin(target)
        content = self._collect()
        if self._thread is None:
            self._write(target, content)
        else:
            self._pending = self._thread.submit(self._write, target, content)

    def _begin(self, target: Path) -> None:
        needed = checkpoint_bytes(self._model, self._settings.saved, self._settings.masters)
        require_space(self._run.path, needed, target.name)
        temporary = begin_directory(target)
        self._inode = temporary.stat().st_ino
        (temporary / STATE_FOLDER).mkdir()
        # What the checkpoint's step has logged must not be younger than the checkpoint.
        if self._run.metrics.exists():
            sync_file(self._run.metrics)

    def _collect(self) -> _Content:
        """This process's part of the state, as it is now."""
        shared = shared_tensors(self._model, self._optimizer, self._settings.masters)
        copy = self._settings.asynchronous
        return _Content(
            self._progress(),
            gather_state(self._model, self._settings.saved, keep=self._context.is_main, copy=copy),
            _copied(shared) if copy else shared,
            capture_rng(self._context.device),
            self._buffers.changed(),
        )

    def _write(self, target: Path, content: _Content) -> None:
        temporary = temporary_name(target)
        try:
            with self._disk_errors(target):
                own = self._write_own_part(temporary, content)
                told = {"error": str(own)} if isinstance(own, Exception) else {"files": own}
                reports = self._context.gather(f"written {target.name}", json.dumps(told))
                if isinstance(own, Exception) and not self._context.is_main:
                    raise own
                with self._context.main_first(f"publish {target.name}"):
                    if self._context.is_main:
                        self._require_same_directory(temporary)
                        write_manifest(temporary, _merged(own, reports))
                        sync_tree(temporary)
                        publish(temporary, target)
        except BaseException:
            if self._context.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
                with contextlib.suppress(OSError):
                    self._run.path.rmdir()  # goes only if it is empty: see _require_same_directory
            raise
        self._newest = target
        self._console.say(f"Checkpoint saved: {shown_path(target)}")
        if self._context.is_main and self._settings.keep is not None:
            self._remove_old(self._settings.keep)

    def _require_same_directory(self, temporary: Path) -> None:
        """Writers make the directories that they miss: where a disk was unmounted, on the disk below it.

        Raises:
            FileNotFoundError: this is not the directory that was made when the save began.
        """
        if temporary.stat().st_ino != self._inode:
            raise FileNotFoundError(errno.ENOENT, "the directory went away during the save", str(temporary))

    def _write_own_part(self, temporary: Path, content: _Content) -> FileNotes | Exception:
        """Files of this process with their sums. A disk's error is a value here: all processes must hear of it.

        Any other is raised at once. It may mean that a process is gone, from which nothing will be heard.
        """
        rank = self._context.rank
        try:
            write_shared(temporary, content.shared, self._group)
            files = [write_own(temporary, rank, content.rng, content.buffers)]
            files += (temporary / STATE_FOLDER / "shards").glob(f"shard-{rank + 1:05d}-*")
            if self._context.is_main:
                self._write_model(temporary, content.weights)
                content.progress.write(temporary)
                rest = (path for path in temporary.rglob("*") if path.is_file())
                files += [path for path in rest if path.parent.name != "shards" and "rank-" not in path.name]
            return note_files(temporary, files)
        except Exception as error:
            if _disk_reason(error) is None:
                raise
            return error

    def load(self, checkpoint: Path, progress: Progress) -> None:
        """Fill optimiser and masters from a checkpoint, whatever number of processes wrote it. All must call it.

        Raises:
            ResumeError: the state does not fit the model.
        """
        read_shared(checkpoint, shared_tensors(self._model, self._optimizer, progress.masters), self._group)

    def _disk_errors(self, target: Path) -> AbstractContextManager[None]:
        last = self._newest
        kept = "there is no earlier checkpoint" if last is None else f"{shown_path(last)} is kept and complete"
        return disk_errors(target, kept)

    def _remove_old(self, keep: int) -> None:
        """Remove this run's oldest complete checkpoints. Damaged ones do not count, and are left alone."""
        own = [path for path in self._run.checkpoints() if self._is_own(path)]
        for path in own[:-keep]:
            if path == self._settings.resumed_from:
                continue
            try:
                remove_checkpoint(path)
            except OSError as error:  # the new one is complete: no reason to end the run
                self._console.warn(f"{shown_path(path)} could not be removed: {error.strerror}")
            else:
                self._console.say(f"Checkpoint removed: {shown_path(path)} (keep_checkpoints: {keep})")

    def _is_own(self, path: Path) -> bool:
        if find_damage(path, contents=False) is not None:
            return False
        with contextlib.suppress(EulerForgeError):
            return Progress.read(path).run == self._progress().run
        return False


@contextlib.contextmanager
def disk_errors(target: Path, kept: str) -> Iterator[None]:
    """Failures of disks, by whatever library they are told, become one error that says what is left.

    Args:
        target: what is being written.
        kept: what there is besides.
    """
    try:
        yield
    except EulerForgeError:
        raise
    except Exception as error:
        reason = _disk_reason(error)
        if reason is None:
            raise
        raise CheckpointError(
            f"{shown_path(target)} could not be written: {reason}; {kept}",
            "make the run directory writable and give it space, then run again with --resume",
        ) from error


def checkpoint_group(context: ProcessContext) -> dist.ProcessGroup | None:
    """Processes that write or read a checkpoint together, apart from training; None for one process."""
    return dist.new_group(backend="gloo", timeout=_NO_LIMIT) if context.world_size > 1 else None


def checkpoint_bytes(model: torch.nn.Module, saved: torch.dtype, masters: bool) -> int:
    """Disk space of a checkpoint: saved weights, AdamW's two moments, masters, and some for what is small."""
    weights = sum(parameter.numel() * saved.itemsize for parameter in model.parameters())
    stored = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    return round(1.01 * (weights + (2 + masters) * stored + buffers)) + 2**22


def require_space(folder: Path, needed: int, what: str) -> None:
    """Refuse what will not fit.

    Raises:
        CheckpointError: with both sizes.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{what} needs about {binary_size(needed)}, and {binary_size(free)} is free in {shown_path(folder)}; "
            "earlier checkpoints are kept",
            "free some space, or set training.keep_checkpoints, then run again with --resume",
        )


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint so that no half of it can be taken for a whole."""
    doomed = temporary_name(path)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _merged(own: FileNotes | Exception, reports: Sequence[str]) -> FileNotes:
    """The files of all processes, on rank 0. Raises where any of them failed."""
    if isinstance(own, Exception):
        raise own
    notes: FileNotes = {}
    for rank, report in enumerate(map(json.loads, reports)):
        if "error" in report:
            raise PeerFailedError(f"rank {rank} could not write its part of the checkpoint", "see its message")
        notes |= report["files"]
    return notes


def _copied(tensors: Tensors) -> Tensors:
    stager = DefaultStager(StagingOptions(False, False, False, False))
    copy = stager.stage(tensors)
    stager.close()
    assert isinstance(copy, dict)
    return copy


def _disk_reason(error: Exception) -> str | None:
    """Why a file could not be written, None if it was not about files."""
    if isinstance(error, OSError):
        return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    text = str(error)
    if isinstance(error, SafetensorError) or "PytorchStreamWriter" in text:
        number = re.search(r"\(os error (\d+)\)", text)  # as Rust tells it
        return os.strerror(int(number[1])) if number else text.splitlines()[0]
    return None
