"""A rank that stops and resumes many runs: `torchrun -m tests.kit.golden PRESET FOLDER ACCUMULATION STEPS STRATEGY`.

Starting torchrun for each stop would take minutes. Here all runs share one process group; each has its own keys in
the store, its own run directory, and goes through the same code as the command from `worker.pretrain` on.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

from torch.distributed import PrefixStore

from eulerforge import worker
from eulerforge.config.load import load_preset
from eulerforge.distributed.context import ProcessContext, start_processes
from eulerforge.errors import StoppedError
from eulerforge.loading import LaunchDecisions
from eulerforge.metrics.console import Console
from eulerforge.preflight import inspect
from eulerforge.train.signals import StopWatch


class Runs:
    """Runs of one preset in one process group."""

    def __init__(self, preset: Path, context: ProcessContext) -> None:
        self._preset, self._context, self._number = preset, context, 0

    def run(
        self, output_dir: Path, *, resume: bool = False, stop_at: int = 0, overrides: tuple[str, ...] = ()
    ) -> None:
        """One `eulerforge pretrain`. `stop_at`: number of the forward pass at which rank 0 gets a SIGTERM."""
        self._number += 1
        context = self._context
        if context.store is not None:
            context = dataclasses.replace(context, store=PrefixStore(f"run{self._number}", context.store))
        worker.start_processes = lambda *arguments: context
        worker.finish_processes = lambda context, keep: context.meet("end")
        os.environ["STOP_AT"] = str(stop_at)
        flight = inspect(
            load_preset(self._preset, [f"output_dir={output_dir}", *overrides]),
            "" if resume else None,
            owns_output=context.is_main,
        )
        launch = LaunchDecisions("cpu", context.world_size, ())
        watch = StopWatch()
        try:
            with watch.listening():
                worker.pretrain(flight, launch, Console("Pretrain", enabled=context.is_main), watch)
        except StoppedError as stop:
            assert stop.agreed
            assert stop_at
        else:
            assert not stop_at
        context.meet("left")


def main(preset: Path, folder: Path, accumulation: int, steps: list[int], strategy: str) -> None:
    """An undisturbed run, and one for each step that is stopped after it and resumed."""
    context = start_processes("cpu", int(os.environ["WORLD_SIZE"]), 60.0)
    runs = Runs(preset, context)
    chosen = (f"distributed.strategy={strategy}",)
    runs.run(folder / "straight", overrides=chosen)
    for step in steps:
        target = folder / f"stopped-{step}"
        runs.run(target, stop_at=step * accumulation, overrides=chosen)
        runs.run(target, resume=True, overrides=chosen)
    context.meet("all done")
    sys.stdout.flush()
    os._exit(0)  # as the product's workers: the destructor of a gloo group can hang


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), list(map(int, sys.argv[4].split(","))), sys.argv[5])
