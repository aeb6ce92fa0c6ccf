"""Numbers of a run on their way to the console, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from eulerforge.errors import TrainingError
from eulerforge.metrics import console as console_module
from eulerforge.metrics.console import Console
from eulerforge.metrics.meters import SpeedMeter, binary_size, clock_time
from eulerforge.metrics.trackers import (
    CompositeTracker,
    ConsoleTracker,
    JsonlTracker,
    StepMetrics,
    TensorBoardTracker,
    cut_metrics,
)

METRICS = StepMetrics(
    step=10,
    loss=10.45234,
    lr=6e-5,
    grad_norm=0.9342,
    aux_loss=None,
    eval_loss=None,
    tokens=20480,
    epoch=1.23456789,
    elapsed=23.80049,
    steps_per_second=0.41999,
    tokens_per_second=18432.46,
    seconds_left=760.2,
    data_wait=0.00123,
    data_hash="0123456789ab",
)
LINE = "step=10/500 | loss=10.4523 | lr=6.00e-05 | 0.42 steps/s | 18,432 tok/s | grad_norm=0.93 | ETA 0:12:40"


@pytest.mark.parametrize("eval_loss", [None, 9.5])
@pytest.mark.parametrize("aux_loss", [None, 0.125])
def test_a_record_has_the_agreed_keys_in_order(aux_loss: float | None, eval_loss: float | None) -> None:
    record = replace(METRICS, aux_loss=aux_loss, eval_loss=eval_loss).record()
    expected: list[tuple[str, object]] = [
        ("step", 10),
        ("loss", 10.45234),
        ("lr", 6e-5),
        ("elapsed_sec", 23.8),
        ("grad_norm", 0.9342),
        *([("aux_loss", 0.125)] if aux_loss is not None else []),
        *([("eval_loss", 9.5)] if eval_loss is not None else []),
        ("tokens", 20480),
        ("epoch", 1.234568),
        ("tokens_per_sec", 18432.5),
        ("steps_per_sec", 0.42),
        ("data_wait", 0.0012),
        ("data_hash", "0123456789ab"),
    ]
    assert list(record.items()) == expected


def test_the_jsonl_file_is_complete_after_each_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.step(METRICS)
    assert path.read_text() == ""
    for step in (10, 20):
        tracker.log(replace(METRICS, step=step))
        lines = path.read_text().splitlines()
        assert json.loads(lines[-1]) == replace(METRICS, step=step).record()
    assert path.read_text().endswith("\n")
    assert len(path.read_text().splitlines()) == 2
    tracker.close()


def test_a_reopened_jsonl_file_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        tracker = JsonlTracker(path)
        tracker.log(replace(METRICS, step=step))
        tracker.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def _lines(*steps: object) -> bytes:
    return b"".join(b'{"step": %s, "loss": 1.5}\n' % str(step).encode() for step in steps)


HALF = b'{"step": 2, "lo'
CUTS: dict[str, tuple[bytes, int, bytes, int]] = {
    # content, step to cut back to, what is left, lines removed
    "nothing to do": (_lines(1, 2, 3), 3, _lines(1, 2, 3), 0),
    "nothing to do, and later steps to come": (_lines(1, 2), 9, _lines(1, 2), 0),
    "later steps": (_lines(1, 2, 3, 4), 2, _lines(1, 2), 2),
    "between logged steps": (_lines(5, 10, 15), 12, _lines(5, 10), 1),
    "by number": (_lines(9, 10, 100), 10, _lines(9, 10), 1),
    "all": (_lines(1, 2), 0, b"", 2),
    "empty": (b"", 5, b"", 0),
    "half a line": (_lines(1) + HALF, 5, _lines(1), 1),
    "half a line of a later step": (_lines(1, 2, 3) + HALF, 1, _lines(1), 3),
    "only half a line": (HALF, 5, b"", 1),
    "a line without its end": (_lines(1, 2)[:-1], 5, _lines(1), 1),
    "zeros after a power cut": (_lines(1) + bytes(100), 5, _lines(1), 1),
    "garbage between": (_lines(1) + b"\xff\xfe\n" + _lines(2), 5, _lines(1, 2), 1),
    "half a line that was written on": (_lines(1) + HALF + _lines(2), 5, _lines(1), 1),
    "no step": (b'{"loss": 1}\n[1]\n7\nnull\n{"step": null}\n{"step": "x"}\n' + _lines(1), 5, _lines(1), 6),
    "a step that is no number": (_lines("NaN", 1, "[]"), 5, _lines(1), 2),
    "steps out of order": (_lines(3, 1, 4, 2), 2, _lines(1, 2), 2),
}


@pytest.mark.parametrize("case", CUTS)
def test_metrics_are_cut_back_to_a_step(tmp_path: Path, case: str) -> None:
    content, step, left, removed = CUTS[case]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    before = path.stat()
    assert cut_metrics(path, step) == removed
    assert path.read_bytes() == left
    assert (path.stat().st_ino == before.st_ino) is (removed == 0)  # untouched, or replaced in one move
    assert cut_metrics(path, step) == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_metrics_that_are_not_there_yet_are_not_cut(tmp_path: Path) -> None:
    assert cut_metrics(tmp_path / "metrics.jsonl", 3) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_json_is_not_written(tmp_path: Path, value: float) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    with pytest.raises(ValueError, match="JSON"):
        tracker.log(replace(METRICS, loss=value))
    tracker.close()
    assert path.read_text() == ""


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_speed_before_the_first_step_is_zero() -> None:
    clock = _Clock()
    meter = SpeedMeter(clock)
    clock.now = 105.0
    assert (meter.steps_per_second, meter.tokens_per_second, meter.seconds_left(10)) == (0.0, 0.0, 0.0)
    assert meter.elapsed == 5.0


def test_time_before_a_resume_counts_but_not_for_the_speed() -> None:
    clock = _Clock()
    meter = SpeedMeter(clock, before=1000.0)
    assert meter.elapsed == 1000.0
    clock.now += 4.0
    meter.step_done(300)
    clock.now += 1.0
    assert meter.elapsed == 1005.0
    assert meter.steps_per_second == 0.25
    assert meter.tokens_per_second == 75.0
    assert meter.seconds_left(6) == 24.0


def test_speed_is_that_of_the_last_twenty_steps() -> None:
    """A slow first step colours the mean for 20 steps and not longer."""
    clock = _Clock()
    meter = SpeedMeter(clock)
    clock.now += 60.0
    meter.step_done(1000)
    assert meter.steps_per_second == pytest.approx(1 / 60)
    assert meter.tokens_per_second == pytest.approx(1000 / 60)
    assert meter.seconds_left(30) == pytest.approx(1800)
    for _ in range(19):
        clock.now += 0.5
        meter.step_done(1000)
    assert meter.steps_per_second == pytest.approx(20 / 69.5)
    for _ in range(20):
        clock.now += 0.25
        meter.step_done(400)
    assert meter.steps_per_second == pytest.approx(4.0)
    assert meter.tokens_per_second == pytest.approx(1600.0)
    assert meter.seconds_left(30) == pytest.approx(7.5)
    assert meter.elapsed == pytest.approx(60 + 19 * 0.5 + 20 * 0.25)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00:00"),
        (59.4, "0:00:59"),
        (59.6, "0:01:00"),
        (760.2, "0:12:40"),
        (3599.7, "1:00:00"),
        (90061, "25:01:01"),
        (360000, "100:00:00"),
    ],
)
def test_clock_time(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1024**2, "1.0 MiB"),
        (1.5 * 1024**3, "1.5 GiB"),
        (2048 * 1024**3, "2048.0 GiB"),
    ],
)
def test_binary_size(size: float, text: str) -> None:
    assert binary_size(size) == text


def test_console_lines(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console("Pretrain")
    console.say("Packed: 8 tokens → 2 chunks")
    console.warn("no GPU.")
    captured = capsys.readouterr()
    assert captured.out == "[Pretrain] Packed: 8 tokens → 2 chunks\n[Pretrain] Warning: no GPU.\n"
    assert captured.err == ""


def test_a_silent_console_says_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    console = Console("Pretrain", enabled=False)
    console.say("x")
    console.warn("x")
    console.start_bar(10, 0)
    console.move_bar(1, {"loss": "1"})
    assert not console.has_bar
    console.close_bar()
    assert capsys.readouterr().out == ""
    assert terminal.getvalue() == ""


@pytest.mark.parametrize(
    ("aux_loss", "eval_loss", "line"),
    [
        (None, None, LINE),
        (0.0211, None, LINE.replace(" | ETA", " | aux_loss=0.0211 | ETA")),
        (None, 9.99996, LINE.replace(" | ETA", " | eval_loss=10.0000 | ETA")),
        (0.0211, 9.5, LINE.replace(" | ETA", " | aux_loss=0.0211 | eval_loss=9.5000 | ETA")),
    ],
)
def test_the_step_line(
    capsys: pytest.CaptureFixture[str], aux_loss: float | None, eval_loss: float | None, line: str
) -> None:
    """In a pipe there are lines only, and only for logged steps."""
    tracker = ConsoleTracker(Console("Pretrain"), 500)
    metrics = replace(METRICS, aux_loss=aux_loss, eval_loss=eval_loss)
    tracker.step(replace(metrics, step=9))
    tracker.step(metrics)
    tracker.log(metrics)
    tracker.close()
    captured = capsys.readouterr()
    assert captured.out == f"[Pretrain] {line}\n"
    assert captured.err == ""


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_and_bar_do_not_break_each_other(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    console = Console("Pretrain")
    tracker = ConsoleTracker(console, 500)
    for step in range(1, 11):
        tracker.step(replace(METRICS, step=step))
    tracker.log(METRICS)
    console.say("Checkpoint saved: x → y")
    tracker.close()
    tracker.close()  # a second closing, as after an exception, is harmless
    console.say("done")
    assert capsys.readouterr().out == f"[Pretrain] {LINE}\n[Pretrain] Checkpoint saved: x → y\n[Pretrain] done\n"
    drawn = terminal.getvalue()
    assert "10/500" in drawn
    assert "[Pretrain]" not in drawn
    assert drawn.endswith("\r")  # the bar is taken off the screen


def test_the_bar_shows_loss_and_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    # Draw at once instead of ten times a second.
    monkeypatch.setattr(console_module, "tqdm", partial(tqdm, mininterval=0))
    tracker = ConsoleTracker(Console("Pretrain"), 500)
    tracker.step(METRICS)
    tracker.close()
    drawn = terminal.getvalue()
    assert "1/500" in drawn
    assert "loss=10.4523" in drawn
    assert "tok/s=18,432" in drawn


def test_tensorboard_holds_every_logged_value(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path / "tensorboard")
    for step, aux_loss, eval_loss in ((10, 0.5, None), (20, 0.25, 2.75), (30, None, None)):
        metrics = replace(METRICS, step=step, loss=step / 8, aux_loss=aux_loss, eval_loss=eval_loss)
        tracker.step(replace(metrics, step=step - 1))
        tracker.log(metrics)
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    expected = {
        "train/loss": {10: 1.25, 20: 2.5, 30: 3.75},
        "train/lr": dict.fromkeys((10, 20, 30), 6e-5),
        "train/grad_norm": dict.fromkeys((10, 20, 30), 0.9342),
        "train/tokens": dict.fromkeys((10, 20, 30), 20480.0),
        "train/epoch": dict.fromkeys((10, 20, 30), 1.23456789),
        "train/aux_loss": {10: 0.5, 20: 0.25},
        "eval/loss": {20: 2.75},
        "speed/tokens_per_sec": dict.fromkeys((10, 20, 30), 18432.46),
        "speed/steps_per_sec": dict.fromkeys((10, 20, 30), 0.41999),
        "speed/data_wait": dict.fromkeys((10, 20, 30), 0.00123),
    }
    assert set(events.Tags()["scalars"]) == set(expected)
    for name, points in expected.items():
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx(points, rel=1e-6)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


@pytest.mark.parametrize(
    ("done", "again", "expected"),
    [
        (10, (20, 30), {10: 10.0, 20: 120.0, 30: 130.0}),
        (15, (20, 30), {10: 10.0, 20: 120.0, 30: 130.0}),
        (10, (40,), {10: 10.0, 40: 140.0}),
        (30, (40,), {10: 10.0, 20: 20.0, 30: 30.0, 40: 140.0}),
        (0, (10,), {10: 110.0}),
        (10, (), {10: 10.0}),
    ],
)
def test_tensorboard_shows_each_step_once_after_a_restart(
    tmp_path: Path, done: int, again: tuple[int, ...], expected: dict[int, float]
) -> None:
    """The first process has gone beyond the checkpoint that the second one begins with."""
    folder = tmp_path / "tensorboard"
    for begin, steps, offset in ((0, (10, 20, 30), 0), (done, again, 100)):
        tracker = TensorBoardTracker(folder, begin)
        for step in steps:
            tracker.log(replace(METRICS, step=step, loss=float(step + offset)))
        tracker.close()
        for path in folder.iterdir():  # names begin with the second, and this test has only one
            path.rename(path.with_name(path.name.replace("tfevents.", "tfevents.0")))
    events = EventAccumulator(str(folder)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == list(expected.items())


def test_the_bar_begins_where_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(console_module, "tqdm", partial(tqdm, mininterval=0))
    tracker = ConsoleTracker(Console("Pretrain"), 500, done=120)
    tracker.step(METRICS)
    tracker.close()
    drawn = terminal.getvalue()
    assert "120/500" in drawn
    assert "121/500" in drawn
    assert " 1/500" not in drawn


class _Recorder:
    def __init__(self, calls: list[str], name: str) -> None:
        self._calls, self._name = calls, name

    def step(self, metrics: StepMetrics) -> None:
        self._calls.append(f"{self._name} step {metrics.step}")

    def log(self, metrics: StepMetrics) -> None:
        self._calls.append(f"{self._name} log {metrics.step}")

    def close(self) -> None:
        self._calls.append(f"{self._name} close")


def test_a_composite_tells_everyone_in_order() -> None:
    calls: list[str] = []
    tracker = CompositeTracker([_Recorder(calls, "a"), _Recorder(calls, "b")])
    tracker.step(METRICS)
    tracker.log(METRICS)
    tracker.close()
    assert calls == ["a step 10", "b step 10", "a log 10", "b log 10", "a close", "b close"]


class _Full(_Recorder):
    def log(self, metrics: StepMetrics) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_under_the_metrics_is_one_error() -> None:
    with pytest.raises(TrainingError) as caught:
        CompositeTracker([_Full([], "a")]).log(METRICS)
    (problem,) = caught.value.problems
    assert problem.what == "step 10: metrics cannot be written: No space left on device; checkpoints are kept"
    assert problem.fix == "make the run directory writable and give it space, then run again with --resume"
    assert caught.value.see == "docs/checkpoints.md"


class _Gone(_Recorder):
    def log(self, metrics: StepMetrics) -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._name)


@pytest.mark.parametrize("name", ["/run/tensorboard/events", b"/run/tensorboard/events"])
def test_an_error_of_a_file_names_it(name: Any) -> None:
    """TensorBoard gives the name as bytes."""
    with pytest.raises(TrainingError) as caught:
        CompositeTracker([_Gone([], name)]).log(METRICS)
    assert str(caught.value) == (
        "step 10: metrics cannot be written: No such file or directory (/run/tensorboard/events); "
        "checkpoints are kept"
    )


class _Stuck(_Recorder):
    def close(self) -> None:
        super().close()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_closing_on_a_full_disk_closes_all_and_hides_no_other_error() -> None:
    calls: list[str] = []
    CompositeTracker([_Stuck(calls, "a"), _Recorder(calls, "b")]).close()
    assert calls == ["a close", "b close"]


class _AsyncWriterThread(threading.Thread):
    """Has the name of TensorBoard's own."""


@pytest.fixture
def thread_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[BaseException | None]:
    """What threads have shown of their ends, with TensorBoard in use."""
    shown: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: shown.append(arguments.exc_value))
    TensorBoardTracker(tmp_path / "tensorboard").close()
    return shown


@pytest.mark.parametrize(
    ("kind", "error", "is_shown"),
    [
        (_AsyncWriterThread, OSError(errno.ENOSPC, "full"), False),
        (_AsyncWriterThread, ValueError("a defect"), True),
        (threading.Thread, OSError(errno.ENOSPC, "full"), True),
    ],
)
def test_only_a_failing_disk_under_tensorboard_has_no_traceback(
    thread_errors: list[BaseException | None], kind: type[threading.Thread], error: Exception, is_shown: bool
) -> None:
    def fail() -> None:
        raise error

    thread = kind(target=fail)
    thread.start()
    thread.join()
    assert thread_errors == ([error] if is_shown else [])
