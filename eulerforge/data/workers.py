"""Tokenising processes: a parent deals out tasks, workers make shards and tell how far they are.

Workers are started afresh (spawn): a fork would copy CUDA contexts and the threads of a process group. They import
neither torch nor transformers. A worker ends by itself when its parent is gone, even by SIGKILL.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from eulerforge.data.build import BuiltTask, Report, Task, Workplace, build_task
from eulerforge.errors import DataError, InputError, PreparationError, Problem
from eulerforge.models.fast_encoder import FastEncoder


def build_in_processes(
    tasks: Sequence[Task], place: Workplace, serialized: str, processes: int, report: Report
) -> list[BuiltTask]:
    """Make the shards of all tasks; the results by task.

    Args:
        serialized: what a worker makes its encoder from.

    Raises:
        DataError: bad input.
        PreparationError: a worker died, or failed for a reason of the program.
    """
    built: list[BuiltTask | None] = [None] * len(tasks)
    waiting = iter(range(len(tasks)))
    with _started(processes, place, serialized) as workers:
        busy = {worker.connection: worker for worker in workers if worker.give(waiting, tasks)}
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                worker = busy[connection]
                kind, *content = worker.receive()
                if kind == "progress":
                    report(*content)
                elif kind == "input":
                    raise DataError.of([Problem(*problem) for problem in content[0]], see=content[1])
                elif kind == "disk":
                    raise OSError(*content)
                elif kind == "failed":
                    raise PreparationError(
                        f"a tokenising process failed:\n{content[0]}", "this is a defect of the program; report it"
                    )
                else:
                    built[worker.task] = content[0]
                    if not worker.give(waiting, tasks):
                        del busy[connection]
    return [task for task in built if task is not None]


class _Worker:
    """The parent's side of a worker."""

    def __init__(self, process: BaseProcess, connection: Connection) -> None:
        self.process = process
        self.connection = connection
        self.task = -1

    def give(self, waiting: Iterator[int], tasks: Sequence[Task]) -> bool:
        """Hand over the next task, if there is one."""
        self.task = next(waiting, -1)
        if self.task >= 0:
            with self._alive():
                self.connection.send(tasks[self.task])
        return self.task >= 0

    def receive(self) -> tuple[Any, ...]:
        with self._alive():
            return self.connection.recv()

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):
            self.process.join()
            raise PreparationError(
                f"a tokenising process ended without a word (exit code {self.process.exitcode}; -9 is what the "
                "system does when memory runs out)",
                "run it again, finished parts are kept; with less memory set data.num_workers lower",
            ) from None


@contextlib.contextmanager
def _started(processes: int, place: Workplace, serialized: str) -> Iterator[list[_Worker]]:
    context = multiprocessing.get_context("spawn")
    workers: list[_Worker] = []
    try:
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, place, serialized), daemon=True)
            process.start()
            theirs.close()  # so that the end of the worker is the end of the connection
            workers.append(_Worker(process, ours))
        yield workers
    finally:
        for worker in workers:
            worker.process.kill()
            worker.connection.close()
        for worker in workers:
            worker.process.join()


def _work(connection: Connection, place: Workplace, serialized: str) -> None:
    """A worker's life."""
    # The parent hears of signals and ends its workers.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # One process a core: threads on top of that would fight for the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        encoder = FastEncoder(serialized)
        while True:
            task = connection.recv()
            built = build_task(
                task,
                place,
                encoder,
                lambda size, documents, tokens: connection.send(("progress", size, documents, tokens)),
            )
            connection.send(("done", built))
    except InputError as error:
        connection.send(("input", [(problem.what, problem.fix) for problem in error.problems], error.see))
    except OSError as error:  # of writing; what reading raises is a DataError
        connection.send(("disk", error.errno, error.strerror or str(error)))
    except Exception:
        connection.send(("failed", traceback.format_exc()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
