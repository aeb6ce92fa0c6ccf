"""Micro-batches made ahead of time: in order, not too far ahead, and with errors where they belong."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from eulerforge.data import loader
from eulerforge.data.loader import BatchLoader
from eulerforge.data.rows import MicroBatch

CPU = torch.device("cpu")


def _batch(step: int, part: int = 0) -> MicroBatch:
    ids = torch.tensor([[step, part]])
    return MicroBatch(ids, ids.clone(), None, 1, 2)


def _seen(batches: object) -> list[list[int]]:
    assert isinstance(batches, list)
    return [batch.input_ids.tolist()[0] for batch in batches]


class _Maker:
    """Makes batches and tells how far it is; from `stop_at` on it waits until it is let on."""

    def __init__(self, stop_at: int = 10**9, parts: int = 2) -> None:
        self.made: list[int] = []
        self.threads: set[str] = set()
        self.reached = threading.Condition()
        self.waiting = threading.Event()
        self.may_go_on = threading.Event()
        self._stop_at = stop_at
        self._parts = parts

    def __call__(self, step: int) -> Iterator[MicroBatch]:
        if step >= self._stop_at:
            self.waiting.set()
            assert self.may_go_on.wait(30)
        for part in range(self._parts):
            yield _batch(step, part)
        with self.reached:
            self.threads.add(threading.current_thread().name)
            self.made.append(step)
            self.reached.notify_all()

    def wait_for(self, steps: int) -> None:
        with self.reached:
            assert self.reached.wait_for(lambda: len(self.made) >= steps, 30)


def test_steps_come_in_order_with_all_their_batches() -> None:
    maker = _Maker()
    load = BatchLoader(maker, CPU, steps=6)
    for step in range(6):
        assert _seen(load(step)) == [[step, 0], [step, 1]]
    load.close()
    assert maker.made == [0, 1, 2, 3, 4, 5]


def test_a_run_may_begin_at_any_step() -> None:
    maker = _Maker()
    load = BatchLoader(maker, CPU, steps=10)
    assert [_seen(load(step))[0][0] for step in (7, 8, 9)] == [7, 8, 9]
    load.close()
    assert maker.made == [7, 8, 9]


def test_two_steps_are_made_ahead_by_another_thread() -> None:
    """With the first step in hand, the next two are made without being asked for, and no more."""
    assert loader._AHEAD == 2
    maker = _Maker()
    load = BatchLoader(maker, CPU, steps=100)
    load(0)
    maker.wait_for(3)
    load.close()
    assert maker.made == [0, 1, 2]
    assert len(maker.threads) == 1
    assert maker.threads != {threading.current_thread().name}


def test_nothing_is_made_beyond_the_last_step() -> None:
    maker = _Maker()
    load = BatchLoader(maker, CPU, steps=2)
    load(0)
    load(1)
    load.close()
    assert maker.made == [0, 1]


def test_a_step_is_not_held_up_by_those_after_it() -> None:
    """Step 1 never ends before step 0 has been handed out."""
    maker = _Maker(stop_at=1)
    load = BatchLoader(maker, CPU, steps=5)
    assert _seen(load(0)) == [[0, 0], [0, 1]]
    maker.may_go_on.set()
    assert _seen(load(1)) == [[1, 0], [1, 1]]
    load.close()


def test_what_making_a_step_raises_is_raised_when_that_step_is_asked_for() -> None:
    def make(step: int) -> Iterator[MicroBatch]:
        yield _batch(step)
        if step == 1:
            raise EOFError("tokens.bin was cut off")

    load = BatchLoader(make, CPU, steps=5)
    assert _seen(load(0)) == [[0, 0]]
    with pytest.raises(EOFError, match=r"^tokens\.bin was cut off$"):
        load(1)
    assert _seen(load(2)) == [[2, 0]]
    load.close()


def test_closing_ends_the_thread_and_drops_what_has_not_begun() -> None:
    """Step 1, which is being made, is let on by the end of step 2, which has not begun."""
    maker = _Maker(stop_at=1)
    load = BatchLoader(maker, CPU, steps=100)
    load(0)
    (thread,) = (thread for thread in threading.enumerate() if thread.name.startswith("batches"))
    assert maker.waiting.wait(30)
    load._pending[2].add_done_callback(lambda future: maker.may_go_on.set())
    load.close()
    assert maker.made == [0, 1]
    assert not thread.is_alive()
    load.close()  # twice does no harm


def test_a_loader_that_was_never_used_can_be_closed() -> None:
    maker = _Maker()
    BatchLoader(maker, CPU, steps=5).close()
    assert maker.made == []


def test_the_time_that_training_waits_is_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of the calling thread is all that counts: 3 s, then 0.25 s."""
    times = iter([10.0, 13.0, 20.0, 20.25])
    load = BatchLoader(_Maker(), CPU, steps=2)
    assert load.waited == 0.0
    monkeypatch.setattr(loader, "time", SimpleNamespace(monotonic=lambda: next(times)))
    load(0)
    first = load.waited
    load(1)
    load.close()
    assert (first, load.waited) == (3.0, 3.25)


def test_batches_are_put_on_the_device() -> None:
    load = BatchLoader(_Maker(), torch.device("meta"), steps=1)
    (first, _) = load(0)
    load.close()
    assert first.input_ids.device.type == first.labels.device.type == "meta"
    assert (first.targets, first.tokens) == (1, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_are_those_that_were_made() -> None:
    load = BatchLoader(_Maker(), torch.device("cuda", 0), steps=50)
    for step in range(50):
        batches = load(step)
        assert all(batch.input_ids.is_cuda for batch in batches)
        assert _seen(batches) == [[step, 0], [step, 1]]
    load.close()


def test_signals_are_left_to_the_main_thread() -> None:
    """One that another thread is given does not wake the main thread up, and comes out of order."""
    masks: list[set[int]] = []

    def make(step: int) -> list[MicroBatch]:
        masks.append({int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])})
        return []

    load = BatchLoader(make, torch.device("cpu"), 1)
    load(0)
    load.close()
    assert masks[0] >= {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGALRM}
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGTERM, signal.SIGINT}
