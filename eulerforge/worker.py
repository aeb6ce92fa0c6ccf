"""One rank from top to bottom. Read this file first.

    preflight (done by the CLI) -> set up (`loading.py`) -> run directory -> parts (`assembly.py`) -> loop -> final/

Everything that can be wrong with the user's input is found before the run directory is made or changed. After that
point a failure is written to status.json, and complete checkpoints stay.
"""

from __future__ import annotations

import contextlib
import time
from datetime import datetime
from pathlib import Path

import transformers

from eulerforge.assembly import config_snapshot, loop_parts, make_tracker, write_model
from eulerforge.distributed.context import ProcessContext, finish_processes, start_processes
from eulerforge.errors import OutputError, StoppedError
from eulerforge.files import publish_directory, shown_path
from eulerforge.loading import LaunchDecisions, Setup, set_up
from eulerforge.metrics.console import Console
from eulerforge.metrics.meters import counted
from eulerforge.preflight import Preflight
from eulerforge.train.checkpoint import disk_errors
from eulerforge.train.export import gather_state
from eulerforge.train.loop import fit
from eulerforge.train.run_directory import NullRunDirectory, RunDirectory, new_run_id
from eulerforge.train.signals import StopWatch
from eulerforge.train.state import TrainState


def pretrain(flight: Preflight, launch: LaunchDecisions, console: Console, watch: StopWatch) -> Path:
    """Run a pretraining from checked input to `final/`; the run directory.

    Args:
        watch: listening already.

    Raises:
        InputError: model, tokenizer, data or checkpoint turn out to be wrong while loading; nothing has been written.
        TrainingError, CheckpointError: the run could not go on; status.json says why.
        StoppedError: the run was asked to stop.
    """
    transformers.utils.logging.disable_progress_bar()
    context = start_processes(launch.device, launch.world_size, flight.preset.distributed.timeout_seconds)
    with contextlib.ExitStack() as held:
        if context.is_main and (used := flight.run_plan.directory_in_use()) is not None:
            held.enter_context(RunDirectory(used).locked())
        setup = set_up(flight, launch, context, console, watch)
        run = _open_run(setup, held)
        _train(setup, run, watch)
    finish_processes(context, keep=setup)
    return run.path


def _open_run(setup: Setup, held: contextlib.ExitStack) -> RunDirectory:
    """Make the run directory, or put the old one in order."""
    flight, context = setup.flight, setup.context

    def make() -> str:
        used = flight.run_plan.directory_in_use()
        if used is not None:
            return str(used)
        run = RunDirectory.create(flight.run_plan.output_dir, datetime.now())
        held.enter_context(run.locked())
        return str(run.path)

    path = Path(context.from_main("run directory", make))
    run = RunDirectory(path) if context.is_main else NullRunDirectory(path)
    _require_shared(run, context)
    for line in run.tidy(setup.point.progress.step if setup.point else 0):
        setup.console.say(line)
    return run


def _require_shared(run: RunDirectory, context: ProcessContext) -> None:
    """All nodes must see the run directory, because every process writes its part of a checkpoint there.

    Raises:
        OutputError: this node does not.
    """
    mark = context.from_main("mark of the run directory", run.mark)
    # A network file system may need a moment to show a new file.
    for _ in range(50):
        if run.mark() == mark:
            return
        time.sleep(0.1)
    raise OutputError(
        f"output_dir: {run.path} on node {context.node} is not the directory that rank 0 writes to",
        "set output_dir to a file system that all nodes share",
    )


def _train(setup: Setup, run: RunDirectory, watch: StopWatch) -> None:
    point, console = setup.point, setup.console
    state = TrainState()
    if point is not None:
        state = TrainState(point.progress.step, point.progress.tokens, point.progress.elapsed, point.progress.skipped)
    with run.recorded(state):
        run_id = setup.context.from_main("run id", lambda: _run_id(setup, run))
        run.write_config(config_snapshot(setup, run, run_id))
        _announce(setup, run)
        if setup.training.max_minutes is not None:
            console.say(f"Stopping in order after {setup.training.max_minutes:g} minutes (training.max_minutes)")
        with contextlib.closing(make_tracker(setup, run, state.step)) as tracker:
            parts = loop_parts(setup, run, run_id, state, tracker, watch)
            with contextlib.closing(parts.batches):
                meter = fit(parts, state)
        if state.stopped:
            cause = watch.received or "a signal to another process"
            saved = shown_path(run.checkpoint(state.step))
            console.say(f"Stopped by {cause} after step {state.step}; {saved} is complete. Go on with --resume.")
            raise StoppedError(f"stopped by {cause}", agreed=True)
        _save_final(setup, run)
        done = f"Training complete. {state.step} steps in {meter.elapsed:.1f}s."
        console.say(f"{done} Final model saved to {shown_path(run.final)}")


def _run_id(setup: Setup, run: RunDirectory) -> str:
    """Kept when a run goes on in its directory; new for a run that begins or branches off."""
    plan = setup.flight.run_plan
    return (run.run_id if plan.resumes and not plan.branch else None) or new_run_id()


def _announce(setup: Setup, run: RunDirectory) -> None:
    """The last lines before the first step: what will be trained, how, and where it goes."""
    training, context, say = setup.training, setup.context, setup.console.say
    say(f"Run directory: {shown_path(run.path)}")
    shape = f"{training.batch_size} rows x {setup.accumulation} micro-batches x {counted(context.world_size)}"
    rows = setup.rows_per_step
    say(f"Global batch: {shape} = {rows} rows, up to {rows * setup.corpus.rows.max_length:,} tokens per step")
    say(
        f"Starting training: max_steps={training.max_steps}, batch_size={training.batch_size}, "
        f"grad_accum={setup.accumulation}, lr={training.lr}, warmup={training.warmup_steps}"
    )


def _save_final(setup: Setup, run: RunDirectory) -> None:
    """Write `final/`, complete or not at all; rank 0 writes, all ranks give their shards.

    The others do not wait in a collective while rank 0 is busy with the disk.
    """
    weights = gather_state(setup.model, setup.saved, keep=setup.context.is_main)
    with setup.context.main_first("save final"):
        if setup.context.is_main:
            errors = disk_errors(run.final, f"{shown_path(run.checkpoint(setup.training.max_steps))} is complete")
            with errors, publish_directory(run.final, replace=True) as temporary:
                write_model(setup, temporary, weights)
