"""Sinks for the numbers of a run: console, metrics.jsonl, TensorBoard. One class per sink, one that fans out."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from eulerforge.errors import TrainingError
from eulerforge.files import write_bytes
from eulerforge.metrics.console import Console
from eulerforge.metrics.meters import clock_time

_NOTABLE_WAIT = 0.01
"""Share of time from which on waiting for data is worth a word on the console."""


@dataclass(frozen=True)
class StepMetrics:
    """What is known after an optimiser step. All values are global over ranks and micro-batches.

    Attributes:
        step: 1 to max_steps.
        loss: cross entropy of the step's target tokens, in nats per token, without auxiliary loss.
        lr: the learning rate that the step used.
        grad_norm: L2 norm of all gradients before clipping.
        aux_loss: mean auxiliary loss of the step's micro-batches, None for a model without one.
        eval_loss: cross entropy on held-out rows after this step, None where it was not evaluated.
        tokens: tokens trained on since the start (padding not counted).
        epoch: passes over the corpus so far, for example 1.25.
        elapsed: seconds since training began.
        steps_per_second, tokens_per_second: over recent steps.
        seconds_left: estimate for the remaining steps.
        data_wait: share of the time, over recent steps, that training waited for data.
        data_hash: hash of the step's token ids, the same on any number of processes.
        loss_scale: of the next step; None without float16.
        skipped: steps left out so far because gradients overflowed; None without float16.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    aux_loss: float | None
    eval_loss: float | None
    tokens: int
    epoch: float
    elapsed: float
    steps_per_second: float
    tokens_per_second: float
    seconds_left: float
    data_wait: float
    data_hash: str
    loss_scale: float | None = None
    skipped: int | None = None

    def record(self) -> dict[str, Any]:
        """The line of metrics.jsonl. The first four keys and their order are part of the contract."""
        values: dict[str, Any] = {
            "step": self.step,
            "loss": self.loss,
            "lr": self.lr,
            "elapsed_sec": round(self.elapsed, 3),
            "grad_norm": self.grad_norm,
        }
        if self.aux_loss is not None:
            values["aux_loss"] = self.aux_loss
        if self.eval_loss is not None:
            values["eval_loss"] = self.eval_loss
        if self.loss_scale is not None:
            values |= {"loss_scale": self.loss_scale, "skipped": self.skipped}
        return values | {
            "tokens": self.tokens,
            "epoch": round(self.epoch, 6),
            "tokens_per_sec": round(self.tokens_per_second, 1),
            "steps_per_sec": round(self.steps_per_second, 4),
            "data_wait": round(self.data_wait, 4),
            "data_hash": self.data_hash,
        }


class Tracker(Protocol):
    """A sink."""

    def step(self, metrics: StepMetrics) -> None:
        """Called after every step."""

    def log(self, metrics: StepMetrics) -> None:
        """Called every `log_steps`, at evaluations and at the last step, after `step`."""

    def close(self) -> None:
        """Flush and release."""


class ConsoleTracker:
    """The step lines and the progress bar."""

    def __init__(self, console: Console, max_steps: int, done: int = 0) -> None:
        self._console = console
        self._max_steps = max_steps
        console.start_bar(max_steps, done)

    def step(self, metrics: StepMetrics) -> None:
        self._console.move_bar(1, {"loss": f"{metrics.loss:.4f}", "tok/s": f"{metrics.tokens_per_second:,.0f}"})

    def log(self, metrics: StepMetrics) -> None:
        parts = [
            f"step={metrics.step}/{self._max_steps}",
            f"loss={metrics.loss:.4f}",
            f"lr={metrics.lr:.2e}",
            f"{metrics.steps_per_second:.2f} steps/s",
            f"{metrics.tokens_per_second:,.0f} tok/s",
            f"grad_norm={metrics.grad_norm:.2f}",
        ]
        if metrics.aux_loss is not None:
            parts.append(f"aux_loss={metrics.aux_loss:.4f}")
        if metrics.eval_loss is not None:
            parts.append(f"eval_loss={metrics.eval_loss:.4f}")
        if metrics.data_wait >= _NOTABLE_WAIT:
            parts.append(f"waiting for data {metrics.data_wait:.0%}")
        parts.append(f"ETA {clock_time(metrics.seconds_left)}")
        self._console.say(" | ".join(parts))

    def close(self) -> None:
        self._console.close_bar()


class JsonlTracker:
    """metrics.jsonl: one strict JSON object per line, complete after each write."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def step(self, metrics: StepMetrics) -> None:
        """Only logged steps are written."""

    def log(self, metrics: StepMetrics) -> None:
        self._file.write(json.dumps(metrics.record(), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def cut_metrics(path: Path, step: int) -> int:
    """Remove the lines of steps after `step` (and a line that a killed process has not finished); their number."""
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _step_of_line(line) <= step]
    if len(kept) < len(lines):
        write_bytes(path, b"".join(kept))
    return len(lines) - len(kept)


def _step_of_line(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError):
        return math.inf


class TensorBoardTracker:
    """TensorBoard scalars under the run directory.

    Args:
        done: steps done before a resume. Later points of an earlier process are dropped by TensorBoard.
    """

    def __init__(self, folder: Path, done: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if not isinstance(threading.excepthook, _QuietWriters):
            threading.excepthook = _QuietWriters(threading.excepthook)
        # A first run has nothing to drop, and its file should not look like a restart.
        self._writer = SummaryWriter(log_dir=str(folder), purge_step=done + 1 if folder.exists() else None)

    def step(self, metrics: StepMetrics) -> None:
        """Only logged steps are written."""

    def log(self, metrics: StepMetrics) -> None:
        scalars = {
            "train/loss": metrics.loss,
            "train/lr": metrics.lr,
            "train/grad_norm": metrics.grad_norm,
            "train/tokens": metrics.tokens,
            "train/epoch": metrics.epoch,
            "speed/tokens_per_sec": metrics.tokens_per_second,
            "speed/steps_per_sec": metrics.steps_per_second,
            "speed/data_wait": metrics.data_wait,
        }
        if metrics.aux_loss is not None:
            scalars["train/aux_loss"] = metrics.aux_loss
        if metrics.eval_loss is not None:
            scalars["eval/loss"] = metrics.eval_loss
        if metrics.loss_scale is not None and metrics.skipped is not None:
            scalars |= {"train/loss_scale": metrics.loss_scale, "train/skipped": metrics.skipped}
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, metrics.step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _QuietWriters:
    """Excepthook that leaves out TensorBoard's thread when a disk fails: the next `flush` raises the same error."""

    def __init__(self, hook: Callable[[Any], object]) -> None:
        self._hook = hook

    def __call__(self, arguments: threading.ExceptHookArgs) -> None:
        is_writer = type(arguments.thread).__name__ == "_AsyncWriterThread"
        if not (is_writer and isinstance(arguments.exc_value, OSError)):
            self._hook(arguments)


class CompositeTracker:
    """Fans out to several sinks; with none it is the null tracker of other ranks."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def step(self, metrics: StepMetrics) -> None:
        for tracker in self._trackers:
            tracker.step(metrics)

    def log(self, metrics: StepMetrics) -> None:
        try:
            for tracker in self._trackers:
                tracker.log(metrics)
        except OSError as error:
            place = f" ({os.fsdecode(error.filename)})" if error.filename else ""
            raise TrainingError(
                f"step {metrics.step}: metrics cannot be written: {error.strerror or error}{place}; "
                "checkpoints are kept",
                "make the run directory writable and give it space, then run again with --resume",
                see="docs/checkpoints.md",
            ) from error

    def close(self) -> None:
        for tracker in self._trackers:
            # `log` has flushed each line, and has told of a disk that fails.
            with contextlib.suppress(OSError):
                tracker.close()
