"""Who this process is: rank, world size, device. One process is the case world size 1, not another code path."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ProcessContext:
    """This process among all of the run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0


def single_process(device: str) -> ProcessContext:
    """The context of a run with one process on `cpu` or `cuda:N`."""
    chosen = torch.device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return ProcessContext(rank=0, world_size=1, device=chosen)
