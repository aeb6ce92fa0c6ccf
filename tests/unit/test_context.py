"""What processes do together through the store of the rendezvous, with a thread for each process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from eulerforge.distributed.context import ProcessContext
from eulerforge.errors import PeerFailedError, StoppedError

PATIENCE = 20.0
"""Seconds after which something that should have happened will not happen any more."""

World = Callable[..., list[ProcessContext]]


@pytest.fixture(params=["hash", "tcp"])
def world(request: pytest.FixtureRequest) -> World:
    """Makes the contexts of a number of processes on a number of nodes."""

    def make(size: int, nodes: int = 1) -> list[ProcessContext]:
        limit = timedelta(seconds=PATIENCE)
        if request.param == "hash":
            stores: list[Any] = [dist.HashStore()] * size
        else:
            server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=limit)
            clients = [
                dist.TCPStore("localhost", server.port, is_master=False, timeout=limit) for _ in range(size - 1)
            ]
            stores = [server, *clients]
        each = size // nodes
        cpu = torch.device("cpu")
        return [
            ProcessContext(rank, size, rank % each, rank // each, cpu, dist.PrefixStore("eulerforge", store))  # type: ignore[attr-defined]
            for rank, store in enumerate(stores)
        ]

    return make


def _together(contexts: list[ProcessContext], work: Callable[[ProcessContext], Any]) -> list[Any]:
    """What each process returns or raises, by rank."""
    with ThreadPoolExecutor(len(contexts)) as pool:
        futures = [pool.submit(work, context) for context in contexts]
        return [future.exception(PATIENCE) or future.result() for future in futures]


def _never() -> bool:
    return False


def _always() -> bool:
    return True


# --- meet_unless ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_meeting_that_nobody_calls_off_takes_place(world: World, size: int) -> None:
    assert _together(world(size), lambda context: context.meet_unless("here", _never)) == [True] * size


@pytest.mark.parametrize("who", [0, 1, 2])
def test_one_that_calls_it_off_decides_for_all(world: World, who: int) -> None:
    def work(context: ProcessContext) -> bool:
        return context.meet_unless("here", _always if context.rank == who else _never)

    assert _together(world(3), work) == [False] * 3


def test_it_can_be_called_off_while_waiting(world: World) -> None:
    """Rank 2 never comes; a signal must not wait for it."""
    asked, signalled = threading.Event(), threading.Event()

    def stop() -> bool:
        asked.set()
        return signalled.is_set()

    def work(context: ProcessContext) -> bool:
        if context.rank == 0:
            return context.meet_unless("here", stop)
        assert asked.wait(PATIENCE)
        signalled.set()
        return context.meet_unless("here", _never)

    assert _together(world(3)[:2], work) == [False, False]


def test_who_comes_late_sees_the_verdict(world: World) -> None:
    first, second, last = world(3)
    assert first.meet_unless("here", _always) is False
    assert second.meet_unless("here", _never) is False
    assert last.meet_unless("here", _never) is False
    assert last.meet_unless("here", _always) is False


def test_a_meeting_that_was_held_is_not_called_off_afterwards(world: World) -> None:
    """Rank 0 is asked to stop just when the last one has come and has decided."""
    waiting, decided = threading.Event(), threading.Event()
    answers = iter([False])

    def stop() -> bool:
        if not next(answers, True):
            return False
        waiting.set()
        return decided.wait(PATIENCE)

    def work(context: ProcessContext) -> bool:
        if context.rank == 0:
            return context.meet_unless("here", stop)
        assert waiting.wait(PATIENCE)
        try:
            return context.meet_unless("here", _never)
        finally:
            decided.set()

    assert _together(world(2), work) == [True, True]


def test_who_comes_last_cannot_call_off_what_was_held(world: World) -> None:
    first, second = world(2)
    assert first.store is not None
    first.store.set("meet/here/verdict", "held")
    first.store.add("meet/here", 1)
    assert second.meet_unless("here", _always) is True


def test_meetings_do_not_know_of_each_other(world: World) -> None:
    contexts = world(2)
    assert _together(contexts, lambda context: context.meet_unless("a", _always)) == [False, False]
    assert _together(contexts, lambda context: context.meet_unless("b", _never)) == [True, True]
    assert _together(contexts, lambda context: context.meet("c")) == [None, None]


# --- gather, from_main ------------------------------------------------------------------------------------------


def test_texts_are_gathered_by_rank_on_the_main_process(world: World) -> None:
    texts = _together(world(3), lambda context: context.gather("x", f"é{context.rank}" * context.rank))
    assert texts == [["", "é1", "é2é2"], [], []]


def test_who_gives_a_text_does_not_wait_for_the_others(world: World) -> None:
    main, first, second = world(3)
    assert second.gather("x", "b") == []
    assert first.gather("x", "a") == []
    assert main.gather("x", "m") == ["m", "a", "b"]


def test_all_get_the_text_that_the_main_process_has_made(world: World) -> None:
    makers: list[int] = []

    def work(context: ProcessContext) -> str:
        def make() -> str:
            makers.append(context.rank)
            return "x → é"

        return context.from_main("x", make)

    assert _together(world(3), work) == ["x → é"] * 3
    assert makers == [0]


# --- main_first, local_main_first -------------------------------------------------------------------------------


class _Watched:
    """A store that tells when somebody looks whether a key is there."""

    def __init__(self, store: Any, asked: threading.Event) -> None:
        self._store, self._asked = store, asked

    def check(self, keys: list[str]) -> bool:
        there: bool = self._store.check(keys)
        self._asked.set()
        return there

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_the_others_wait_until_the_main_process_is_through(world: World) -> None:
    contexts = world(3)
    asked = [threading.Event() for _ in contexts]
    watched: list[Any] = [_Watched(context.store, event) for context, event in zip(contexts, asked, strict=True)]
    order: list[int] = []

    def work(context: ProcessContext) -> None:
        own = ProcessContext(context.rank, 3, context.rank, 0, context.device, watched[context.rank])
        with own.main_first("build"):
            if own.is_main:
                assert all(event.wait(PATIENCE) for event in asked[1:])
            order.append(own.rank)

    assert _together(contexts, work) == [None] * 3
    assert order[0] == 0
    assert sorted(order) == [0, 1, 2]


@pytest.mark.parametrize(
    "error", [ValueError("broke"), KeyboardInterrupt(), StoppedError("stopped", agreed=False)], ids=repr
)
@pytest.mark.parametrize("helper", ["main_first", "from_main", "local_main_first"])
def test_a_failure_of_the_main_process_ends_the_waiting_of_the_others(
    world: World, helper: str, error: BaseException
) -> None:
    entered: list[int] = []

    def fail() -> str:
        raise error

    def work(context: ProcessContext) -> None:
        if helper == "from_main":
            context.from_main("x", fail)
            return
        with getattr(context, helper)("x"):
            entered.append(context.rank)
            fail()

    main, *others = _together(world(3), work)
    assert main is error
    assert [type(other) for other in others] == [PeerFailedError] * 2
    assert all("first failed" in str(other) for other in others)
    assert entered == ([] if helper == "from_main" else [0])


def test_a_failure_of_another_process_is_its_own(world: World) -> None:
    def work(context: ProcessContext) -> str:
        with context.main_first("x"):
            if context.rank == 1:
                raise ValueError("own")
            return "done"

    main, first, second = _together(world(3), work)
    assert (main, second) == ("done", "done")
    assert isinstance(first, ValueError)


def test_each_node_has_its_own_first_process(world: World) -> None:
    def work(context: ProcessContext) -> str:
        with context.local_main_first("x"):
            if context.node == 1:
                raise ValueError("disk of node 1")
            return "done"

    first, second, third, fourth = _together(world(4, nodes=2), work)
    assert (first, second) == ("done", "done")
    assert isinstance(third, ValueError)
    assert isinstance(fourth, PeerFailedError)


def test_a_text_is_shared_on_its_node_only(world: World) -> None:
    def work(context: ProcessContext) -> str:
        with context.local_main_first("x"):
            if context.local_rank == 0:
                context.share_on_node("path", f"/node{context.node}")
            return context.shared_on_node("path")

    assert _together(world(4, nodes=2), work) == ["/node0", "/node0", "/node1", "/node1"]
