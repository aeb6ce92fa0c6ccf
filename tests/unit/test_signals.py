"""What asks a run to stop: at once before training, as a note during it, and harmless after it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest

from eulerforge.errors import StoppedError
from eulerforge.train.signals import STOP_SIGNALS, StopWatch

ALL = (*STOP_SIGNALS, signal.SIGALRM)
NAMES = {
    signal.SIGTERM: "SIGTERM",
    signal.SIGINT: "SIGINT",
    signal.SIGUSR1: "SIGUSR1",
    signal.SIGALRM: "training.max_minutes",
}
TINY = 1e-6
"""Minutes."""


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """A watch leaves its handlers in place; pytest needs its own again."""
    before = {number: signal.getsignal(number) for number in ALL}
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def watch() -> Iterator[StopWatch]:
    """One that listens."""
    with StopWatch().listening() as listening:
        yield listening


def test_the_stop_signals_are_those_of_batch_systems_and_keyboards() -> None:
    assert set(STOP_SIGNALS) == {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}


@pytest.mark.parametrize("number", ALL)
def test_before_training_a_signal_ends_the_run_at_once(watch: StopWatch, number: signal.Signals) -> None:
    assert watch.received is None
    with pytest.raises(StoppedError) as caught:
        signal.raise_signal(number)
    assert str(caught.value) == f"stopped by {NAMES[number]} while the run was being set up"
    assert caught.value.exit_code == 75
    assert caught.value.agreed is False
    assert watch.received == NAMES[number]


@pytest.mark.parametrize("number", ALL)
def test_during_training_a_signal_is_only_noted(watch: StopWatch, number: signal.Signals) -> None:
    watch.defer()
    assert watch.received is None
    signal.raise_signal(number)
    assert watch.received == NAMES[number]


@pytest.mark.parametrize("second", ALL)
def test_a_second_signal_changes_nothing(watch: StopWatch, second: signal.Signals) -> None:
    watch.defer()
    signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(second)
    assert watch.received == "SIGUSR1"


@pytest.mark.parametrize("second", ALL)
def test_a_second_signal_does_not_break_into_the_end_that_the_first_has_begun(
    watch: StopWatch, second: signal.Signals
) -> None:
    with pytest.raises(StoppedError, match="stopped by SIGTERM"):
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(second)
    assert watch.received == "SIGTERM"


def test_the_end_passes_through_handlers_of_other_code(watch: StopWatch) -> None:
    """Libraries catch `Exception` around whatever they are doing when the signal comes."""
    swallowed: list[Exception] = []

    def library() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception as error:
            swallowed.append(error)

    with pytest.raises(StoppedError):
        library()
    assert swallowed == []


def test_training_does_not_begin_when_a_signal_was_swallowed(watch: StopWatch) -> None:
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException as error:  # as code with a bare `except` does
        assert isinstance(error, StoppedError)
    with pytest.raises(StoppedError, match=r"^stopped by SIGINT while the run was being set up$"):
        watch.defer()


def test_the_end_that_another_process_has_begun_names_none() -> None:
    error = StopWatch().stopped_early()
    assert str(error) == "stopped by a signal to another process while the run was being set up"
    assert error.agreed is False


def test_the_clock_stops_a_run_that_is_being_set_up(watch: StopWatch) -> None:
    with pytest.raises(StoppedError, match=r"^stopped by training\.max_minutes while"):
        watch.set_timer(TINY)
        threading.Event().wait(10)  # the handler's exception ends it
    assert watch.received == "training.max_minutes"


def test_the_clock_is_only_noted_during_training(watch: StopWatch) -> None:
    watch.defer()
    watch.set_timer(TINY)
    deadline = time.monotonic() + 10
    while watch.received is None and time.monotonic() < deadline:
        pass
    assert watch.received == "training.max_minutes"
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)  # once


@pytest.mark.parametrize(
    ("minutes", "seconds"), [(5.0, 300.0), (0.5, 30.0), (1e8, 2.0**31 - 1), (1e300, 2.0**31 - 1)]
)
def test_the_clock_runs_for_its_minutes_or_for_ever(watch: StopWatch, minutes: float, seconds: float) -> None:
    watch.set_timer(minutes)
    left, interval = signal.getitimer(signal.ITIMER_REAL)
    # The kernel may round up to a tick.
    assert seconds - 5 < left <= seconds + 0.1
    assert interval == 0.0


def test_the_clock_ends_with_the_context() -> None:
    with StopWatch().listening() as watch:
        watch.set_timer(5)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize("number", ALL)
def test_a_signal_after_the_end_is_only_noted(number: signal.Signals, deferred: bool) -> None:
    """A run that has saved must not die of a signal on its way out."""
    with StopWatch().listening() as watch:
        if deferred:
            watch.defer()
    assert signal.getsignal(number) == watch._receive
    signal.raise_signal(number)
    assert watch.received == NAMES[number]


def test_after_an_error_signals_are_only_noted_too() -> None:
    with pytest.raises(ValueError, match="broke"), StopWatch().listening() as watch:
        raise ValueError("broke")
    signal.raise_signal(signal.SIGTERM)
    assert watch.received == "SIGTERM"
