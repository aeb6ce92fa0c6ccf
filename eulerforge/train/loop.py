"""The training loop: what happens per step, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from eulerforge.data.loader import BatchLoader
from eulerforge.errors import TrainingError
from eulerforge.metrics.meters import SpeedMeter
from eulerforge.metrics.trackers import StepMetrics, Tracker
from eulerforge.optim.optimizer import set_learning_rate
from eulerforge.train.evaluate import Evaluation
from eulerforge.train.state import TrainState
from eulerforge.train.step import StepParts, train_step


@dataclass(frozen=True)
class LoopParts:
    """Everything that a loop needs, built by the worker.

    Attributes:
        batches: this rank's micro-batches of a step (0-based), on the device.
        learning_rate: of a step (1-based).
        rows_per_step, rows_per_epoch: over all ranks, for the epoch count.
        on_first_step: told the first loss, for a word on whether it looks like an untrained model's.
        on_second_step: called after the second step of this process, when memory has seen its peak.
        on_skip: told the number of a step whose update was left out.
        evaluate: the loss on held-out rows, None where there are none.
        save: writes a checkpoint of the current weights, or begins to (`async_checkpoint`).
        wait: until a checkpoint that was begun is complete; raises if it could not be written.
    """

    step: StepParts
    batches: BatchLoader
    learning_rate: Callable[[int], float]
    tracker: Tracker
    evaluate: Callable[[], Evaluation] | None
    save: Callable[[int], None]
    wait: Callable[[], None]
    on_first_step: Callable[[float], None]
    on_second_step: Callable[[], None]
    on_skip: Callable[[int], None]
    max_steps: int
    log_steps: int
    save_steps: int
    eval_steps: int
    rows_per_step: int
    rows_per_epoch: int


def fit(parts: LoopParts, state: TrainState) -> SpeedMeter:
    """Train from `state.step` to `max_steps`, or until a process was asked to stop (`state.stopped`).

    `state` is kept up to date, also when an exception leaves.

    Raises:
        TrainingError: loss or gradients are not finite.
    """
    meter, begun_at = SpeedMeter(before=state.elapsed), state.step
    while state.step < parts.max_steps:
        # A skipped step is none: the next rows are trained on under its number, and its learning rate.
        step, position = state.step + 1, state.step + state.skipped
        lr, waited = parts.learning_rate(step), parts.batches.waited
        set_learning_rate(parts.step.optimizer, lr)
        try:
            result = train_step(step, parts.step, parts.batches(position))
        except TrainingError:  # on all ranks alike: what they have begun to save, they can finish
            parts.wait()
            raise
        meter.step_done(result.tokens, parts.batches.waited - waited)
        if result.skipped:
            state.skip(result.tokens, meter.elapsed)
            parts.on_skip(step)
            continue
        state.advance(result.tokens, meter.elapsed)
        if step == 1:
            parts.on_first_step(result.loss)
        if step == begun_at + 2:
            parts.on_second_step()
        last = step == parts.max_steps
        evaluation = Evaluation(None, result.stop)
        if parts.evaluate is not None and not result.stop and (last or step % parts.eval_steps == 0):
            evaluation = parts.evaluate()
        metrics = StepMetrics(
            step=step,
            loss=result.loss,
            lr=lr,
            grad_norm=result.grad_norm,
            aux_loss=result.aux_loss,
            eval_loss=evaluation.loss,
            tokens=state.tokens,
            epoch=(position + 1) * parts.rows_per_step / parts.rows_per_epoch,
            elapsed=meter.elapsed,
            steps_per_second=meter.steps_per_second,
            tokens_per_second=meter.tokens_per_second,
            seconds_left=meter.seconds_left(parts.max_steps - step),
            data_wait=meter.data_wait,
            data_hash=result.data_hash,
            loss_scale=None if parts.step.scale is None else parts.step.scale.value,
            skipped=None if parts.step.scale is None else state.skipped,
        )
        parts.tracker.step(metrics)
        if last or evaluation.loss is not None or step % parts.log_steps == 0:
            parts.tracker.log(metrics)
        if result.save_failed:
            parts.wait()
        saves = last or evaluation.stop or step % parts.save_steps == 0
        if saves:
            parts.save(step)
        # A signal that came during a long save should not wait for another step and another save.
        if not last and (evaluation.stop or (saves and parts.step.agree_to_stop())):
            state.stopped = True
            break
    parts.wait()
    return meter
