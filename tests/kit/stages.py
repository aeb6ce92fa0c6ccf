"""A rank that does parts of runs, one after the other: `[torchrun] -m tests.kit.stages PRESET STAGES`.

STAGES is JSON, a list of `Stage` as objects. All stages share one process group (see `golden.py`); with several
numbers of processes there is one command for each part of a run.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from eulerforge.distributed.context import start_processes
from tests.kit.commands import Result, Workspace, run_python
from tests.kit.golden import Runs


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Attributes:
        run: name of the run directory.
        resume: go on with it.
        stop_at: number of the forward pass at which rank `stop_rank` asks itself to stop; 0 for never.
        probe: where forward passes note their token ids, relative to the run's parent.
        overrides: of the preset.
    """

    run: str
    resume: bool = False
    stop_at: int = 0
    stop_rank: int = 0
    probe: str = "probe"
    overrides: tuple[str, ...] = ()


def run_stages(workspace: Workspace, preset: Path, nproc: int, *stages: Stage) -> Result:
    """Do the stages with `nproc` processes of one thread each. The last lines of a failure are in the error."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc))
    done = run_python(
        *(() if nproc == 1 else torchrun), "-m", "tests.kit.stages", str(preset), json.dumps([*map(asdict, stages)]),
        cwd=workspace.path,
        PYTHONPATH=str(Path(__file__).parents[2]),
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.code == 0, done.err[-6000:] + done.out[-2000:]
    return done


def main(preset: Path, stages: list[Stage]) -> None:
    """Do the stages."""
    context = start_processes("cpu", int(os.environ.get("WORLD_SIZE", "1")), 60.0)
    runs = Runs(preset, context)
    for stage in stages:
        Path(stage.probe).mkdir(exist_ok=True)
        os.environ |= {"PROBE_DIR": stage.probe, "STOP_RANK": str(stage.stop_rank)}
        target = Path(stage.run).absolute()
        runs.run(target, resume=stage.resume, stop_at=stage.stop_at, overrides=tuple(stage.overrides))
    context.meet("all done")
    sys.stdout.flush()
    os._exit(0)  # as golden.py


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Stage(**values) for values in json.loads(sys.argv[2])])
