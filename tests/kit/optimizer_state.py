"""`torchrun -m tests.kit.optimizer_state PRESET DIR`: one step, then the optimiser's state through DCP and back.

Checkpoints with optimiser state are not in the product yet; this shows that the state is whole and that
torch.distributed.checkpoint takes it, under any strategy.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from eulerforge.config.load import load_preset
from eulerforge.metrics.console import Console
from eulerforge.metrics.trackers import CompositeTracker
from eulerforge.preflight import inspect
from eulerforge.train.run_directory import NullRunDirectory
from eulerforge.train.signals import StopWatch
from eulerforge.train.step import train_step
from eulerforge.worker import LaunchDecisions, _loop_parts, _set_up


def main(preset: Path, folder: Path) -> None:
    launch = LaunchDecisions("cpu", int(os.environ["WORLD_SIZE"]), ())
    setup = _set_up(inspect(load_preset(preset)), launch, Console("Test", enabled=False))
    parts = _loop_parts(setup, NullRunDirectory(folder / "run"), CompositeTracker([]), StopWatch())
    train_step(1, parts.step, parts.batches(0))
    state = get_optimizer_state_dict(setup.model, parts.step.optimizer)
    names = {name for name, _ in setup.model.named_parameters()}
    assert state["state"].keys() == names, names - state["state"].keys()
    dcp.save({"optimizer": state}, checkpoint_id=folder / "checkpoint")
    loaded = {"optimizer": get_optimizer_state_dict(setup.model, parts.step.optimizer)}
    for values in loaded["optimizer"]["state"].values():
        values["exp_avg"].zero_()
    dcp.load(loaded, checkpoint_id=folder / "checkpoint")
    total = sum(float(values["exp_avg"].abs().sum()) for values in loaded["optimizer"]["state"].values())
    assert total > 0
    if setup.context.is_main:
        print(f"state of {len(names)} parameters", flush=True)
    setup.context.meet("end")
    os._exit(0)  # as the product's workers: the destructor of a gloo group can hang


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
