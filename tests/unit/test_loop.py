"""When the loop saves, evaluates, logs and stops, with a step that does nothing."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from eulerforge.data.loader import BatchLoader
from eulerforge.errors import CheckpointError, TrainingError
from eulerforge.metrics.meters import SpeedMeter
from eulerforge.metrics.trackers import StepMetrics
from eulerforge.train import loop
from eulerforge.train.evaluate import Evaluation
from eulerforge.train.loop import LoopParts, fit
from eulerforge.train.state import TrainState
from eulerforge.train.step import StepParts, StepResult

TOKENS = 10
"""Of each step."""


class _Batches:
    """Training waits a quarter of a second for the batches of each step."""

    waited = 0.0

    def __call__(self, step: int) -> str:
        self.waited += 0.25
        return f"batches of {step}"


@dataclass
class _Run:
    """Parts of a loop that note what they are asked for.

    Attributes:
        stop_at: step at whose end a stop is agreed on.
        stop_in_save: step during whose save a signal comes.
        stop_in_evaluation: step during whose evaluation a signal comes.
        save_failed_at: step at whose end a failure of a write in the background is agreed on.
        diverges_at: step whose loss is not finite.
        wait_fails: what waiting for a write raises.
    """

    max_steps: int = 6
    save_steps: int = 3
    eval_steps: int | None = None
    log_steps: int = 1
    stop_at: int | None = None
    stop_in_save: int | None = None
    stop_in_evaluation: int | None = None
    save_failed_at: int | None = None
    diverges_at: int | None = None
    wait_fails: Exception | None = None
    state: TrainState = field(default_factory=TrainState)
    events: list[str] = field(default_factory=list)
    steps: list[StepMetrics] = field(default_factory=list)
    logged: list[StepMetrics] = field(default_factory=list)
    signalled: bool = False
    overflows: tuple[int, ...] = ()
    seconds: list[int] = field(default_factory=list)

    def train_step(self, step: int, parts: StepParts, batches: Any) -> StepResult:
        assert batches == f"batches of {step - 1 + self.state.skipped}"
        skips = self.state.skipped < self.overflows.count(step)
        (group,) = parts.optimizer.param_groups
        self.events.append(f"train {step} lr {group['lr']:g}")
        if step == self.diverges_at:
            raise TrainingError(f"step {step}: loss is nan", "lower it")
        return StepResult(
            loss=step / 2,
            grad_norm=step / 4,
            aux_loss=None,
            tokens=TOKENS,
            data_hash=f"{step:012x}",
            stop=step == self.stop_at,
            save_failed=step == self.save_failed_at,
            skipped=skips,
        )

    def save(self, step: int) -> None:
        assert self.state.step == step
        self.events.append(f"save {step}")
        self.signalled |= step == self.stop_in_save

    def evaluate(self) -> Evaluation:
        step = self.state.step
        self.events.append(f"evaluate {step}")
        return Evaluation(None, True) if step == self.stop_in_evaluation else Evaluation(step / 8, False)

    def wait(self) -> None:
        self.events.append("wait")
        if self.wait_fails is not None:
            raise self.wait_fails

    def agree_to_stop(self) -> bool:
        self.events.append("agree")
        return self.signalled

    def step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)

    def log(self, metrics: StepMetrics) -> None:
        assert self.steps[-1] is metrics
        self.logged.append(metrics)

    def close(self) -> None:
        raise AssertionError("the loop does not own the tracker")

    def fit(self) -> SpeedMeter:
        optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}])
        step = SimpleNamespace(run=self, optimizer=optimizer, agree_to_stop=self.agree_to_stop, scale=None)
        parts = LoopParts(
            step=cast(StepParts, step),
            batches=cast(BatchLoader, _Batches()),
            learning_rate=lambda step: step / 10,
            tracker=self,
            evaluate=None if self.eval_steps is None else self.evaluate,
            save=self.save,
            wait=self.wait,
            on_second_step=lambda: self.seconds.append(self.state.step),
            on_skip=lambda step: self.events.append(f"skip {step}"),
            on_first_step=lambda loss: self.events.append(f"first loss {loss}"),
            max_steps=self.max_steps,
            log_steps=self.log_steps,
            save_steps=self.save_steps,
            eval_steps=self.eval_steps or 1,
            rows_per_step=4,
            rows_per_epoch=16,
        )
        return fit(parts, self.state)

    def of(self, *kinds: str) -> list[str]:
        return [event.partition(" lr")[0] for event in self.events if event.split()[0] in kinds]

    def numbers(self, kind: str) -> list[int]:
        return [int(event.split()[1]) for event in self.events if event.split()[0] == kind]


@pytest.fixture(autouse=True)
def _fake_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def train_step(step: int, parts: Any, batches: Any) -> StepResult:
        result: StepResult = parts.run.train_step(step, parts, batches)
        return result

    monkeypatch.setattr(loop, "train_step", train_step)


def test_what_happens_in_a_step_and_in_which_order() -> None:
    run = _Run(max_steps=2, save_steps=1, eval_steps=1)
    run.fit()
    assert run.events == [
        "train 1 lr 0.1",
        "first loss 0.5",
        "evaluate 1",
        "save 1",
        "agree",
        "train 2 lr 0.2",
        "evaluate 2",
        "save 2",
        "wait",
    ]
    assert run.state == TrainState(step=2, tokens=20, elapsed=run.state.elapsed, stopped=False)
    assert [(metrics.step, metrics.loss, metrics.lr) for metrics in run.steps] == [(1, 0.5, 0.1), (2, 1.0, 0.2)]
    assert [(metrics.grad_norm, metrics.tokens, metrics.epoch) for metrics in run.steps] == [
        (0.25, 10, 0.25),
        (0.5, 20, 0.5),
    ]
    assert [metrics.eval_loss for metrics in run.steps] == [0.125, 0.25]


@pytest.mark.parametrize(
    ("max_steps", "save_steps", "saved"),
    [(7, 3, [3, 6, 7]), (6, 3, [3, 6]), (2, 5, [2]), (3, 1, [1, 2, 3]), (1, 1, [1])],
)
def test_saves_come_every_so_many_steps_and_at_the_last(max_steps: int, save_steps: int, saved: list[int]) -> None:
    run = _Run(max_steps, save_steps)
    run.fit()
    assert run.numbers("save") == saved
    assert run.numbers("train") == list(range(1, max_steps + 1))
    assert run.events[-1] == "wait"
    assert not run.state.stopped


@pytest.mark.parametrize(
    ("log_steps", "eval_steps", "logged"),
    [(1, None, [1, 2, 3, 4, 5, 6, 7]), (3, None, [3, 6, 7]), (100, None, [7]), (3, 2, [2, 3, 4, 6, 7])],
)
def test_steps_are_logged_at_their_cadence_at_evaluations_and_at_the_last(
    log_steps: int, eval_steps: int | None, logged: list[int]
) -> None:
    run = _Run(max_steps=7, log_steps=log_steps, eval_steps=eval_steps)
    run.fit()
    assert [metrics.step for metrics in run.logged] == logged
    assert [metrics.step for metrics in run.steps] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("eval_steps", "evaluated"),
    [(None, []), (1, [1, 2, 3, 4, 5, 6, 7]), (2, [2, 4, 6, 7]), (7, [7]), (100, [7])],
)
def test_evaluations_come_at_their_cadence_and_at_the_last_step(eval_steps: int | None, evaluated: list[int]) -> None:
    run = _Run(max_steps=7, eval_steps=eval_steps)
    run.fit()
    assert run.numbers("evaluate") == evaluated
    losses = {metrics.step: metrics.eval_loss for metrics in run.steps}
    assert losses == {step: step / 8 if step in evaluated else None for step in range(1, 8)}


# --- Stopping ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_a_stop_saves_its_step_once_and_ends(step: int) -> None:
    """Also where that step is saved anyway (3), and without another evaluation."""
    run = _Run(stop_at=step, eval_steps=1)
    run.fit()
    assert run.numbers("train") == list(range(1, step + 1))
    assert run.numbers("save") == ([3] if step > 3 else []) + [step]
    assert run.numbers("evaluate") == list(range(1, step))
    assert run.events[-1] == "wait"
    assert (run.state.step, run.state.stopped) == (step, True)


@pytest.mark.parametrize("how", ["stop_at", "stop_in_save", "stop_in_evaluation"])
def test_a_stop_at_the_last_step_is_a_finished_run(how: str) -> None:
    run = _Run(eval_steps=3, **{how: 6})
    run.fit()
    assert run.numbers("save") == [3, 6]
    assert (run.state.step, run.state.stopped) == (6, False)


def test_a_stop_that_comes_during_a_save_ends_without_another_step_or_save() -> None:
    run = _Run(stop_in_save=3)
    run.fit()
    assert run.of("train", "save", "wait") == ["train 1", "train 2", "train 3", "save 3", "wait"]
    assert (run.state.step, run.state.stopped) == (3, True)


def test_a_stop_during_an_evaluation_saves_its_step() -> None:
    run = _Run(stop_in_evaluation=2, eval_steps=2)
    run.fit()
    assert run.of("train", "evaluate", "save", "wait") == ["train 1", "train 2", "evaluate 2", "save 2", "wait"]
    assert run.state.stopped
    assert [metrics.eval_loss for metrics in run.steps] == [None, None]


# --- Failures ---------------------------------------------------------------------------------------------------


def test_a_failed_save_in_the_background_ends_the_run_at_the_end_of_the_step() -> None:
    error = CheckpointError("disk is full", "free some")
    run = _Run(save_failed_at=4, wait_fails=error)
    with pytest.raises(CheckpointError) as caught:
        run.fit()
    assert caught.value is error
    assert run.of("train", "save", "wait")[-3:] == ["save 3", "train 4", "wait"]
    assert run.state.step == 4
    assert run.logged[-1].step == 4


def test_a_failed_save_is_raised_before_the_next_one_is_begun() -> None:
    run = _Run(save_failed_at=6, wait_fails=CheckpointError("disk is full", "free some"))
    with pytest.raises(CheckpointError):
        run.fit()
    assert run.numbers("save") == [3]


def test_a_save_that_fails_at_the_very_end_is_raised() -> None:
    run = _Run(wait_fails=CheckpointError("disk is full", "free some"))
    with pytest.raises(CheckpointError, match="disk is full"):
        run.fit()
    assert run.numbers("save") == [3, 6]


def test_a_loss_that_is_not_finite_waits_for_what_is_being_saved() -> None:
    run = _Run(diverges_at=4)
    with pytest.raises(TrainingError, match="step 4: loss is nan"):
        run.fit()
    assert run.of("train", "save", "wait")[-3:] == ["save 3", "train 4", "wait"]
    assert (run.state.step, run.state.tokens) == (3, 30)
    assert run.steps[-1].step == 3


# --- Resuming ---------------------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_with_the_next_step() -> None:
    run = _Run(max_steps=7, state=TrainState(step=4, tokens=1000, elapsed=50.0))
    run.fit()
    assert run.events[0] == "train 5 lr 0.5"
    assert run.of("first") == []  # it is not an untrained model's loss any more
    assert run.numbers("train") == [5, 6, 7]
    assert run.numbers("save") == [6, 7]
    assert [metrics.tokens for metrics in run.steps] == [1010, 1020, 1030]
    assert [metrics.epoch for metrics in run.steps] == [1.25, 1.5, 1.75]
    assert (run.state.step, run.state.tokens) == (7, 1030)


def test_the_seconds_of_a_resumed_run_continue(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock ticks once each time it is looked at."""
    ticks = itertools.count(7000)
    monkeypatch.setattr(loop, "SpeedMeter", partial(SpeedMeter, lambda: float(next(ticks))))
    run = _Run(max_steps=6, state=TrainState(step=4, elapsed=50.0))
    meter = run.fit()
    # 7000 at the start; per step: one look when it is done, one for the state, one for the metrics.
    assert [metrics.elapsed for metrics in run.steps] == [53.0, 56.0]
    assert run.state.elapsed == 55.0
    assert meter.elapsed == 57.0


def test_a_run_that_is_complete_trains_and_saves_nothing() -> None:
    run = _Run(max_steps=4, state=TrainState(step=4, tokens=40, elapsed=9.0))
    run.fit()
    assert run.events == ["wait"]
    assert run.state == TrainState(step=4, tokens=40, elapsed=9.0)
