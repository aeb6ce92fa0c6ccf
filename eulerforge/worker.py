"""One rank from top to bottom. Read this file first.

    preflight (done by the CLI) -> checkpoint (--resume) -> tokenizer -> model -> token cache -> rows -> run directory
    -> optimiser and trainer state -> loop -> final/

Everything that can be wrong with the user's input is found before the run directory is made or changed. After that
point a failure is written to status.json, and complete checkpoints stay.
"""

from __future__ import annotations

import contextlib
import math
import platform
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

import eulerforge
from eulerforge.config.checks import grad_accum_steps
from eulerforge.config.schema import TrainingSection
from eulerforge.data.cache import CacheSpec, TokenCache, open_or_build
from eulerforge.data.rows import DocumentRows, PackedRows, StepBatches, require_rows
from eulerforge.distributed.context import ProcessContext, finish_processes, start_processes
from eulerforge.distributed.parallelize import ParallelModel
from eulerforge.errors import OutputError, ResumeError, StoppedError
from eulerforge.files import publish_directory, shown_path
from eulerforge.metrics.console import Console
from eulerforge.metrics.meters import binary_size
from eulerforge.metrics.trackers import CompositeTracker, ConsoleTracker, JsonlTracker, TensorBoardTracker, Tracker
from eulerforge.models.build import embedding_rows
from eulerforge.models.forward import CausalForward
from eulerforge.models.tokenizer import Tokenizer, adopt_special_ids, load_tokenizer
from eulerforge.optim.optimizer import build_adamw
from eulerforge.optim.schedules import learning_rate
from eulerforge.preflight import Preflight
from eulerforge.train.checkpoint import Checkpointer, CheckpointSettings, checkpoint_bytes, disk_errors
from eulerforge.train.export import gather_state, write_model_directory
from eulerforge.train.fingerprint import (
    fixed_by_data,
    fixed_by_input,
    preset_settings,
    require_unchanged,
    setting_changes,
)
from eulerforge.train.load import ModelRequest, load_model
from eulerforge.train.loop import LoopParts, fit
from eulerforge.train.resume import choose_checkpoint
from eulerforge.train.rng import restore_rng, seed_rng
from eulerforge.train.run_directory import DEFAULT_PARENT, NullRunDirectory, RunDirectory, new_run_id
from eulerforge.train.signals import StopWatch
from eulerforge.train.state import Progress, TrainState
from eulerforge.train.step import StepParts
from eulerforge.train.trainer_state import BufferWatch, read_own


@dataclass(frozen=True)
class LaunchDecisions:
    """What the launcher decided for this rank.

    Attributes:
        device: `cpu` or `cuda:N`.
        world_size: processes of the run.
        reasons: one line per decision, for pretrain_config.json.
    """

    device: str
    world_size: int
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class ResumePoint:
    """A verified checkpoint to go on from."""

    checkpoint: Path
    progress: Progress


@dataclass(frozen=True)
class Setup:
    """All that has been loaded and found good before the run directory is made.

    Attributes:
        point: where the run goes on, None for one that begins.
        buffers: the model's buffers as built.
        fixed: what a resume must not change.
        accumulation: micro-batches per step.
    """

    flight: Preflight
    launch: LaunchDecisions
    context: ProcessContext
    point: ResumePoint | None
    tokenizer: Tokenizer
    model: Any
    parallel: ParallelModel
    buffers: BufferWatch
    cache: TokenCache
    rows: PackedRows | DocumentRows
    fixed: dict[str, Any]
    accumulation: int
    console: Console

    @property
    def training(self) -> TrainingSection:
        """The preset's `training` section."""
        return self.flight.preset.training

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimiser step over all processes."""
        return self.training.batch_size * self.accumulation * self.context.world_size

    @property
    def saved(self) -> torch.dtype:
        """Dtype of saved weights."""
        return getattr(torch, self.flight.precision.saved)

    @property
    def masters(self) -> bool:
        """Whether a checkpoint must hold weights of its own, because the saved ones are less precise."""
        return self.flight.precision.saved != self.flight.precision.stored


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
        setup = _set_up(flight, launch, context, console, watch)
        run = _open_run(setup, held)
        _train(setup, run, watch)
    finish_processes(context, keep=setup)
    return run.path


def _set_up(
    flight: Preflight, launch: LaunchDecisions, context: ProcessContext, console: Console, watch: StopWatch
) -> Setup:
    """Load everything; the last place where the input can turn out to be wrong."""
    preset = flight.preset
    accumulation = grad_accum_steps(preset, context.world_size)
    point = _resume_point(flight, context, console)
    with context.local_main_first("tokenizer"):
        tokenizer = load_tokenizer(
            flight.tokenizer, preset.trust_remote_code, preset.data.add_bos, preset.data.add_eos
        )
    rows_per_step = preset.training.batch_size * accumulation * context.world_size
    fixed = fixed_by_input(flight.directory, tokenizer, preset, rows_per_step)
    _compare(point, fixed, console)
    console.say(f"Loading model from {flight.directory.path}")
    request = ModelRequest(flight.directory, flight.precision, preset, tokenizer, context, console)
    model, parallel = load_model(replace(request, checkpoint=point.checkpoint if point else None))
    for warning in adopt_special_ids(model, tokenizer, flight.directory):
        console.warn(warning)
    with context.local_main_first("tokens"):
        cache = _load_tokens(flight, tokenizer, console)
    fixed_data = fixed_by_data(cache)
    _compare(point, fixed_data, console)
    rows = _make_rows(flight, cache, console)
    model.train()
    setup = Setup(
        flight,
        launch,
        context,
        point,
        tokenizer,
        model,
        parallel,
        BufferWatch(model),
        cache,
        rows,
        fixed | fixed_data,
        accumulation,
        console,
    )
    _look_for_space(setup)
    # Nodes may need very different times for their caches; from here on ranks wait in collectives, and a signal
    # must not take one of them out of the others' middle.
    watch.defer()
    if not context.meet_unless("set up", lambda: watch.received is not None):
        raise watch.stopped_early()
    return setup


def _resume_point(flight: Preflight, context: ProcessContext, console: Console) -> ResumePoint | None:
    """Rank 0 chooses, for all."""
    plan = flight.run_plan
    if not plan.resumes:
        return None
    chosen = context.from_main("resume from", lambda: str(choose_checkpoint(plan, console.say) or ""))
    if not chosen:
        console.say(f"No checkpoint in {shown_path(Path(str(plan.source)))} yet: starting from the beginning.")
        return None
    checkpoint = Path(chosen)
    progress = Progress.read(checkpoint)
    last = flight.preset.training.max_steps
    if progress.step > last:
        raise ResumeError(
            f"--resume: {shown_path(checkpoint)} is beyond training.max_steps {last}",
            f"raise training.max_steps to {progress.step} or more, or resume from an earlier checkpoint",
        )
    console.say(f"Resuming from {shown_path(checkpoint)} (step {progress.step} of {last})")
    plain, shaping = setting_changes(progress, flight.preset)
    if plain:
        console.say(f"Changed since {checkpoint.name}: {', '.join(plain)}")
    if shaping:
        console.warn(
            f"changed since {checkpoint.name}: {', '.join(shaping)}; training goes on under the new values from step "
            f"{progress.step + 1} on"
        )
    return ResumePoint(checkpoint, progress)


def _compare(point: ResumePoint | None, fixed: dict[str, Any], console: Console) -> None:
    if point is not None:
        for warning in require_unchanged(point.progress, fixed, point.checkpoint.name):
            console.warn(warning)


def _look_for_space(setup: Setup) -> None:
    """Refuse a run that cannot save a single checkpoint, before it has trained for hours."""
    folder = Path(setup.flight.run_plan.output_dir or DEFAULT_PARENT).expanduser().absolute()
    existing = next(place for place in (folder, *folder.parents) if place.is_dir())
    needed = checkpoint_bytes(setup.model, setup.saved, setup.masters)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"output_dir: a checkpoint of this model needs about {binary_size(needed)}, and {binary_size(free)} is "
            f"free in {existing}",
            "free some space or set output_dir to another disk",
        )
    training = setup.training
    kept = -(-training.max_steps // training.save_steps)
    if training.keep_checkpoints != "all":
        kept = min(kept, int(training.keep_checkpoints) + 1)
    setup.console.say(f"Checkpoints: about {binary_size(needed)} each, {binary_size(free)} free")
    if kept * needed > free:
        setup.console.warn(
            f"{kept} checkpoints need {binary_size(kept * needed)}: set training.keep_checkpoints or free some space."
        )


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
    _require_shared(path, context)
    run = RunDirectory(path) if context.is_main else NullRunDirectory(path)
    for line in run.tidy(setup.point.progress.step if setup.point else 0):
        setup.console.say(line)
    return run


def _require_shared(path: Path, context: ProcessContext) -> None:
    """All nodes must see the run directory, because every process writes its part of a checkpoint there.

    Raises:
        OutputError: this node does not.
    """
    # A network file system may need a moment to show a new directory.
    for _ in range(50):
        if path.is_dir():
            return
        time.sleep(0.1)
    raise OutputError(
        f"output_dir: {path} was made by rank 0, but is not visible on node {context.node}",
        "set output_dir to a file system that all nodes share",
    )


def _train(setup: Setup, run: RunDirectory, watch: StopWatch) -> None:
    point, console = setup.point, setup.console
    state = TrainState()
    if point is not None:
        state = TrainState(point.progress.step, point.progress.tokens, point.progress.elapsed)
    with run.recorded(state):
        run_id = setup.context.from_main("run id", lambda: _run_id(setup, run))
        run.write_config(_config_snapshot(setup, run_id))
        _announce(setup, run)
        if setup.training.max_minutes is not None:
            console.say(f"Stopping in order after {setup.training.max_minutes:g} minutes (training.max_minutes)")
        with contextlib.closing(_make_tracker(setup, run, state.step)) as tracker:
            meter = fit(_loop_parts(setup, run, run_id, state, tracker, watch), state)
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
    return (
        run.run_id if setup.flight.run_plan.resumes and not setup.flight.run_plan.branch else None
    ) or new_run_id()


def _load_tokens(flight: Preflight, tokenizer: Tokenizer, console: Console) -> TokenCache:
    data = flight.preset.data
    spec = CacheSpec(
        flight.files,
        data.text_column,
        data.on_bad_line,
        bos_id=tokenizer.bos_id if data.add_bos else None,
        eos_id=tokenizer.eos_id if data.add_eos else None,
    )
    check = partial(require_rows, max_length=data.max_length, packing=data.packing)
    cache = open_or_build(spec, tokenizer, flight.cache_dir, check, console.say)
    counts = cache.counts
    console.say(f"Loaded {counts.documents} texts from {data.path}")
    notes = {
        **{f"skipped, {kind}": number for kind, number in counts.skipped.items()},
        "empty texts dropped": counts.empty,
        "texts with lone surrogates repaired": counts.repaired,
    }
    if any(notes.values()):
        console.say("Data notes: " + ", ".join(f"{number} {what}" for what, number in notes.items() if number))
    console.say(f"Token cache: {'reused' if cache.reused else 'built'} {cache.path}")
    return cache


def _make_rows(flight: Preflight, cache: TokenCache, console: Console) -> PackedRows | DocumentRows:
    length, total = flight.preset.data.max_length, len(cache.tokens)
    if flight.preset.data.packing:
        packed = PackedRows(cache.tokens, length)
        console.say(f"Packed: {total:,} tokens → {len(packed):,} chunks (max_length={length})")
        return packed
    rows = DocumentRows(cache.tokens, cache.offsets, length)
    padding = 1 - rows.real_tokens / (len(rows) * length)
    console.say(
        f"Rows: {cache.documents:,} texts → {len(rows):,} rows (max_length={length}, {rows.cut:,} cut, "
        f"{rows.left_out:,} of one token left out, {padding:.1%} padding)"
    )
    return rows


def _announce(setup: Setup, run: RunDirectory) -> None:
    """The last lines before the first step: what will be trained, how, and where it goes."""
    training, context, say = setup.training, setup.context, setup.console.say
    say(f"Run directory: {shown_path(run.path)}")
    processes = "process" if context.world_size == 1 else "processes"
    shape = f"{training.batch_size} rows x {setup.accumulation} micro-batches x {context.world_size} {processes}"
    rows = setup.rows_per_step
    say(f"Global batch: {shape} = {rows} rows, up to {rows * setup.rows.max_length:,} tokens per step")
    say(
        f"Starting training: max_steps={training.max_steps}, batch_size={training.batch_size}, "
        f"grad_accum={setup.accumulation}, lr={training.lr}, warmup={training.warmup_steps}"
    )


def _loop_parts(
    setup: Setup, run: RunDirectory, run_id: str, state: TrainState, tracker: Tracker, watch: StopWatch
) -> LoopParts:
    training, context = setup.training, setup.context
    optimizer = build_adamw(
        setup.model, lr=training.lr, weight_decay=training.weight_decay, betas=training.betas, eps=training.eps
    )
    checkpointer = _make_checkpointer(setup, run, run_id, state, optimizer)
    _restore(setup, optimizer, checkpointer)
    batches = StepBatches(
        setup.rows,
        seed=training.seed,
        batch_size=training.batch_size,
        accumulation=setup.accumulation,
        rank=context.rank,
        world_size=context.world_size,
        pad_id=setup.tokenizer.pad_id,
    )
    return LoopParts(
        step=StepParts(
            context=context,
            forward=CausalForward(setup.model, setup.parallel.call),
            optimizer=optimizer,
            precision=_precision_context(setup),
            synchronise=setup.parallel.synchronise,
            max_grad_norm=training.max_grad_norm,
            stop_requested=lambda: watch.received is not None,
            save_failed=lambda: checkpointer.failed,
        ),
        batches=lambda step: [batch.to(context.device) for batch in batches.of_step(step)],
        learning_rate=partial(
            learning_rate,
            peak=training.lr,
            schedule=training.scheduler,
            warmup_steps=training.warmup_steps,
            max_steps=training.max_steps,
            min_lr_ratio=training.min_lr_ratio,
        ),
        tracker=tracker,
        save=checkpointer.save,
        wait=checkpointer.wait,
        on_first_step=partial(_judge_first_loss, vocabulary=embedding_rows(setup.model), console=setup.console),
        max_steps=training.max_steps,
        log_steps=training.log_steps,
        save_steps=training.save_steps,
        rows_per_step=setup.rows_per_step,
        rows_per_epoch=len(setup.rows),
    )


def _make_checkpointer(
    setup: Setup, run: RunDirectory, run_id: str, state: TrainState, optimizer: torch.optim.Optimizer
) -> Checkpointer:
    training = setup.training
    settings = preset_settings(setup.flight.preset)

    def progress() -> Progress:
        return Progress(
            run_id,
            state.step,
            state.tokens,
            state.elapsed,
            setup.context.world_size,
            setup.parallel.strategy,
            setup.masters,
            setup.fixed,
            settings,
        )

    return Checkpointer(
        CheckpointSettings(
            setup.saved,
            setup.masters,
            None if training.keep_checkpoints == "all" else int(training.keep_checkpoints),
            training.async_checkpoint,
            setup.point.checkpoint if setup.point else None,
        ),
        setup.context,
        run,
        setup.model,
        optimizer,
        setup.buffers,
        progress,
        partial(_write_model, setup),
        setup.console,
    )


def _restore(setup: Setup, optimizer: torch.optim.Optimizer, checkpointer: Checkpointer) -> None:
    """Optimiser, masters, random number generators and buffers as they were; the weights have been loaded."""
    point, context = setup.point, setup.context
    # This seeds dropout, another on each rank, independent of how much randomness building the model has used.
    seed_rng(setup.training.seed + context.rank)
    if point is None:
        return
    checkpointer.load(point.checkpoint, point.progress)
    same_ranks = point.progress.world_size == context.world_size
    rng, buffers = read_own(point.checkpoint, context.rank if same_ranks else 0)
    setup.buffers.restore(buffers)
    if same_ranks:
        restore_rng(rng, context.device)
        return
    # Each rank had its own stream; another number of ranks has no use for those.
    seed_rng(setup.training.seed + context.rank + context.world_size * (point.progress.step + 1))
    setup.console.say(
        f"{point.checkpoint.name} was written by {point.progress.world_size} processes, this run has "
        f"{context.world_size}: random numbers (dropout) begin anew"
    )


def _precision_context(setup: Setup) -> Callable[[], AbstractContextManager[Any]]:
    plan = setup.flight.precision
    if not plan.autocast:
        return contextlib.nullcontext
    return partial(torch.autocast, setup.context.device.type, dtype=getattr(torch, plan.compute))


def _judge_first_loss(loss: float, vocabulary: int, console: Console) -> None:
    """An untrained model predicts all tokens alike: its loss is near ln(vocabulary)."""
    console.say(
        f"First loss: {loss:.4f}; an untrained model over {vocabulary} tokens has about {math.log(vocabulary):.4f}"
    )


def _make_tracker(setup: Setup, run: RunDirectory, done: int) -> CompositeTracker:
    if not setup.context.is_main:
        return CompositeTracker([])
    console = ConsoleTracker(setup.console, setup.training.max_steps, done)
    return CompositeTracker([JsonlTracker(run.metrics), TensorBoardTracker(run.tensorboard, done), console])


def _write_model(setup: Setup, target: Path, weights: dict[str, torch.Tensor]) -> None:
    write_model_directory(target, setup.model, weights, setup.tokenizer, setup.flight.directory, setup.saved)


def _save_final(setup: Setup, run: RunDirectory) -> None:
    """Write `final/`, complete or not at all; rank 0 writes, all ranks give their shards.

    The others do not wait in a collective while rank 0 is busy with the disk.
    """
    weights = gather_state(setup.model, setup.saved, keep=setup.context.is_main)
    with setup.context.main_first("save final"):
        if setup.context.is_main:
            errors = disk_errors(run.final, f"{shown_path(run.checkpoint(setup.training.max_steps))} is complete")
            with errors, publish_directory(run.final, replace=True) as temporary:
                _write_model(setup, temporary, weights)


def _config_snapshot(setup: Setup, run_id: str) -> dict[str, Any]:
    """Content of pretrain_config.json."""
    flight, tokenizer, cache = setup.flight, setup.tokenizer, setup.cache
    preset = flight.preset.model_dump(mode="json")
    preset["model_dir"] = str(flight.directory.path)
    preset["data"]["path"] = str(Path(str(preset["data"]["path"])).expanduser().absolute())
    point = setup.point
    return {
        "run_id": run_id,
        "resumed_from": None if point is None else {"checkpoint": str(point.checkpoint), "step": point.progress.step},
        "preset": preset,
        "preset_file": str(flight.loaded.path.absolute()),
        "overrides": list(flight.loaded.overrides),
        "world_size": setup.context.world_size,
        "grad_accum_steps": setup.accumulation,
        "device": setup.launch.device,
        "precision": asdict(flight.precision),
        "strategy": setup.parallel.strategy,
        "decisions": [
            *setup.launch.reasons,
            f"strategy {setup.parallel.strategy}: {setup.parallel.reason}",
            f"precision: {flight.precision.reason}",
        ],
        "model_hints": [asdict(hint) for hint in flight.hints],
        "tokenizer": {"name": tokenizer.name, "vocab": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint},
        "data": {
            "files": [str(path) for path in flight.files],
            "cache": str(cache.path),
            "tokens": len(cache.tokens),
            "counts": asdict(cache.counts),
        },
        "versions": {
            "eulerforge": eulerforge.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "command": sys.argv,
    }
