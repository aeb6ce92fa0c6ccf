"""Who this process is among all of the run, and the few things that processes do together.

Every helper is a no-op at world size 1, so one process is not another code path. Torchrun's environment variables
(RANK, WORLD_SIZE, LOCAL_RANK, GROUP_RANK, MASTER_ADDR, MASTER_PORT) are the only source; no cluster is known here.

Waiting for slow work of one process (building a token cache, writing a checkpoint) goes through the key-value store
of the rendezvous, not through a collective: a collective would be cut off by its timeout.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from eulerforge.errors import PeerFailedError

_POLL_SECONDS = 0.05
_DONE, _FAILED = "done", "failed"


@dataclass(frozen=True)
class ProcessContext:
    """This process among all of the run.

    Attributes:
        rank, world_size: among all processes of all nodes.
        local_rank: on this node.
        node: number of this node.
        device: where this process computes.
        store: key-value store of the rendezvous, None for one process.
    """

    rank: int
    world_size: int
    local_rank: int
    node: int
    device: torch.device
    store: Store | None

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add up numbers over all processes, element by element, in float64 (float32 where the device has none)."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def from_main(self, name: str, make: Callable[[], str]) -> str:
        """The text that rank 0 makes, on every process, however long it takes (`name` is used once in a run).

        Raises:
            PeerFailedError: rank 0 failed to make it.
        """
        if self.store is None:
            return make()
        with self.main_first(name):
            if self.is_main:
                self.store.set(f"from_main/{name}", make())
        return self.store.get(f"from_main/{name}").decode()

    def gather(self, name: str, text: str) -> list[str]:
        """The texts of all processes by rank, on rank 0; an empty list elsewhere (`name` is used once in a run)."""
        if self.store is None:
            return [text]
        keys = [f"gather/{name}/{rank}" for rank in range(self.world_size)]
        self.store.set(keys[self.rank], text)
        if not self.is_main:
            return []
        while not self.store.check(keys):
            time.sleep(_POLL_SECONDS)
        return [self.store.get(key).decode() for key in keys]

    def meet(self, name: str) -> None:
        """Wait until every process has come here, however long that takes (`name` is used once in a run)."""
        self.meet_unless(name, lambda: False)

    def meet_unless(self, name: str, stop: Callable[[], bool]) -> bool:
        """As `meet`, but any process may call the meeting off; whether it took place, the same on all that came.

        Args:
            stop: asked while waiting; True calls it off.
        """
        if self.store is None:
            return not stop()
        verdict = f"meet/{name}/verdict"
        called_off = stop()
        # Who comes to call it off does not arrive: with its number complete, the others would hold it.
        arrived = 0 if called_off else self.store.add(f"meet/{name}", 1)
        while True:
            if called_off or stop() or arrived == self.world_size:
                # Of two processes that see it differently at the same time, the first decides for both.
                outcome = "off" if called_off or stop() else "held"
                return self.store.compare_set(verdict, "", outcome) == b"held"
            if self.store.check([verdict]):
                return self.store.get(verdict) == b"held"
            time.sleep(_POLL_SECONDS)
            arrived = self.store.add(f"meet/{name}", 0)

    def share_on_node(self, name: str, text: str) -> None:
        """Give a text to the other processes of this node."""
        if self.store is not None:
            self.store.set(f"node{self.node}/{name}", text)

    def shared_on_node(self, name: str) -> str:
        """What `share_on_node` was given; it must have happened before (see `local_main_first`)."""
        assert self.store is not None
        return self.store.get(f"node{self.node}/{name}").decode()

    @contextlib.contextmanager
    def main_first(self, name: str) -> Iterator[None]:
        """Rank 0 runs the block first; the others wait without a time limit, then run it too.

        Raises:
            PeerFailedError: rank 0 failed in the block.
        """
        with self._first(f"main/{name}", leads=self.is_main):
            yield

    @contextlib.contextmanager
    def local_main_first(self, name: str) -> Iterator[None]:
        """As `main_first`, for the first process of each node: files of a node are then there for the others.

        Raises:
            PeerFailedError: the node's first process failed in the block.
        """
        with self._first(f"node{self.node}/{name}", leads=self.local_rank == 0):
            yield

    @contextlib.contextmanager
    def _first(self, key: str, leads: bool) -> Iterator[None]:
        if self.store is None:
            yield
        elif leads:
            try:
                yield
            except BaseException:
                self.store.set(key, _FAILED)
                raise
            self.store.set(key, _DONE)
        else:
            while not self.store.check([key]):
                time.sleep(_POLL_SECONDS)
            if self.store.get(key).decode() == _FAILED:
                raise PeerFailedError(f"the process that does {key!r} first failed", "see that process's message")
            yield


def start_processes(device: str, world_size: int, timeout_seconds: float) -> ProcessContext:
    """Join the run: one process by itself, or the process group that torchrun's environment describes.

    Args:
        device: `cpu` or `cuda:N`, this process's own.
        world_size: processes of the run, as the launcher decided.
        timeout_seconds: after which a collective that a process does not join is an error.
    """
    chosen = torch.device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size == 1:
        return ProcessContext(0, 1, 0, 0, chosen, None)
    timeout = timedelta(seconds=timeout_seconds)
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    dist.init_process_group(
        "nccl" if chosen.type == "cuda" else "gloo",
        store=PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    local_rank, node = int(os.environ["LOCAL_RANK"]), int(os.environ.get("GROUP_RANK", "0"))
    return ProcessContext(rank, world_size, local_rank, node, chosen, PrefixStore("eulerforge", store))


_KEPT_ALIVE: list[object] = []


def finish_processes(context: ProcessContext, keep: object) -> None:
    """End a run in order: all processes meet, and each leaves by `os._exit` afterwards (see `cli.main`).

    The process group is not destroyed, and `keep` (what holds DDP or FSDP) is never freed: the destructor of a gloo
    group joins threads that may wait for the GIL, which the destructor holds. Seen with torch 2.13: a rank that had
    finished hung for ever in the destructor of DDP's reducer.
    """
    if context.world_size > 1:
        context.meet("end")
        _KEPT_ALIVE.append(keep)
