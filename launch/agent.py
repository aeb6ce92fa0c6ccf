"""`python -m launch.agent OPTIONS`: torchrun, changed where it would break a run or bury its error.

- It outlives signals. Plain torchrun dies of SIGUSR1 and leaves its workers behind, and on SIGTERM gives them 30 s.
  The parent passes signals to the workers itself; SLURM may still send them to every process, this one too.
- It does not outlive its parent: when that was killed, it kills the workers and itself.
- What it has to say goes to `agent.log` and `agent.json` in the launch directory; the parent decides what is shown.
- On several nodes a failure is told to the other agents, whose workers could otherwise wait in a collective for long.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType

import psutil

from launch.outcome import LAUNCH_DIR, write_json
from launch.processes import alive, kill, members

PARENT = "EULERFORGE_LAUNCH_PARENT"
"""Environment variable: the process id of the parent."""

REPORT = "agent.json"
LOG = "agent.log"
FAILING = "failing.json"
"""Exists from the moment on when this node's workers, or another node, failed. `{"remote": bool}`"""

HOST_SECONDS = 600.0
"""How long a node waits for the one that holds the store."""

_FAILED_KEY = "eulerforge/failed"


def main(arguments: Sequence[str]) -> None:
    """Run torchrun with these options. Does not return: ends the process with torchrun's exit code."""
    folder = Path(os.environ[LAUNCH_DIR])
    _outlive_signals()
    parent = int(os.environ.pop(PARENT))
    follower = threading.Thread(target=_follow_parent, args=(parent, folder), daemon=True)
    follower.start()
    # Python's own stderr only. The file descriptor stays the user's: workers inherit it.
    sys.stderr = (folder / LOG).open("w", buffering=1, encoding="utf-8", errors="replace")
    report: dict[str, object] = {}
    # torchrun installs signal handlers of its own unless it runs outside the main thread.
    thread = threading.Thread(target=_torchrun, args=(list(arguments), folder, report), daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(1.0)
    if os.getppid() != parent:
        follower.join()  # ends the process
    write_json(folder / REPORT, report)
    sys.stderr.flush()
    # Not sys.exit: a destructor of a store must not hold up the end.
    os._exit(0 if report.get("succeeded") else 1)


def _outlive_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT):
        # A handler that does nothing, not SIG_IGN: workers would inherit "ignored", but exec resets a handler.
        if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
            signal.signal(number, _do_nothing)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    pass


def _follow_parent(parent: int, folder: Path) -> None:
    """Once the parent is gone nobody waits for the workers or tidies up: end them."""
    while os.getppid() == parent:
        time.sleep(1.0)
    # The thread that runs torchrun may be starting workers just now, hence a loop.
    while left := [
        process for process in {*psutil.Process().children(recursive=True), *members(folder)} if alive(process)
    ]:
        kill(left)
    for _ in range(20):  # torchrun's thread may write a last file meanwhile
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
        time.sleep(0.05)
    os._exit(1)


def _torchrun(arguments: list[str], folder: Path, report: dict[str, object]) -> None:
    """Fill the report: `succeeded`, `failures` of workers in the order they were found, or torchrun's own `error`."""
    user_level = os.environ.get("TORCH_CPP_LOG_LEVEL")
    # C++ writes to the file descriptor that is the user's, for example while it waits for the other nodes.
    os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"
    # torchrun makes a directory in the temporary directory for every run and never removes it.
    os.environ["PET_LOG_DIR"] = str(folder / "torchrun")
    try:
        from torch.distributed import run
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        options = run.parse_args(arguments)
        # Both were for this process, not for the workers.
        del os.environ["PET_LOG_DIR"], os.environ["TORCH_CPP_LOG_LEVEL"]
        if user_level is not None:
            os.environ["TORCH_CPP_LOG_LEVEL"] = user_level
        watch = _FailureWatch(folder)
        logger = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
        logger.setLevel(logging.WARNING)
        logger.addHandler(watch)
        # It warns that its signal handlers are missing. That is intended.
        logger.addFilter(lambda record: "register signal handlers" not in str(record.msg))
        if options.nnodes != "1" and not options.standalone:
            if "is_host=0" in options.rdzv_conf:
                _wait_for_host(options.rdzv_endpoint)
            threading.Thread(target=watch.follow_other_nodes, args=(options.rdzv_endpoint,), daemon=True).start()
        try:
            # Not run.main: that is wrapped in @record, which logs a failed worker once more.
            run.run(options)
            report["succeeded"] = True
        except ChildFailedError as error:
            watch.announce()
            report["failures"] = [
                {"rank": rank, "pid": failure.pid, "exit_code": failure.exitcode}
                for rank, failure in error.failures.items()
            ]
        except BaseException:
            watch.announce()
            raise
    except BaseException as error:  # argparse's SystemExit too
        report["error"] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        traceback.print_exc()


def _wait_for_host(endpoint: str) -> None:
    """Until the node that holds the store is there, or torchrun shall say in its words that it is not.

    torchrun waits 600 s for a node that joins, but only 60 s for the one that is joined.
    """
    end = time.monotonic() + HOST_SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(_split(endpoint), timeout=5.0):
            return
        time.sleep(0.5)


def _split(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":")
    return host.strip("[]"), int(port)


class _FailureWatch(logging.Handler):
    """Notices that torchrun has begun to end the workers, which it tells only its log until all are gone."""

    def __init__(self, folder: Path) -> None:
        super().__init__(logging.WARNING)
        self._folder = folder
        self._failed = threading.Event()
        self._connected = False
        self._told = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if "closing signal" in str(record.msg):
            self._fail(remote=False)

    def announce(self) -> None:
        """Tell the other nodes before this agent ends; a node that cannot be reached is not waited for."""
        self._fail(remote=False)
        if self._connected:
            self._told.wait(3.0)

    def follow_other_nodes(self, endpoint: str) -> None:
        """Exchange "failed" through the store in which the agents met.

        torchrun itself notices another node's failure only if that one held the store.
        """
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

        host, port = _split(endpoint)
        store = None
        while store is None and not self._failed.is_set():
            # The node that holds the store may start later.
            with contextlib.suppress(Exception):
                store = TCPStore(
                    host,
                    port,
                    is_master=False,
                    wait_for_workers=False,
                    timeout=timedelta(seconds=10),
                )
            if store is None:
                time.sleep(1.0)
        if store is None:
            return
        self._connected = True
        try:
            while not self._failed.wait(0.5):
                if store.check([_FAILED_KEY]):
                    self._fail(remote=True)
                    break
            store.set(_FAILED_KEY, "1")
        except Exception:
            # The store is gone with its node. After a good end that does not matter: it is then too late for this.
            self._fail(remote=True)
        self._told.set()

    def _fail(self, *, remote: bool) -> None:
        path = self._folder / FAILING
        if not path.exists():
            with contextlib.suppress(OSError):
                write_json(path, {"remote": remote})
        self._failed.set()


if __name__ == "__main__":
    main(sys.argv[1:])
