"""One rank from top to bottom. Read this file first.

    preflight (done by the CLI) -> tokenizer -> model -> token cache -> rows -> run directory -> loop -> final/

Everything that can be wrong with the user's input is found before the run directory is made. After that point a
failure is written to status.json, and complete checkpoints stay.
"""

from __future__ import annotations

import contextlib
import math
import platform
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
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
from eulerforge.errors import TrainingError
from eulerforge.files import publish_directory, shown_path
from eulerforge.metrics.console import Console
from eulerforge.metrics.trackers import CompositeTracker, ConsoleTracker, JsonlTracker, TensorBoardTracker, Tracker
from eulerforge.models.build import embedding_rows
from eulerforge.models.forward import CausalForward
from eulerforge.models.tokenizer import Tokenizer, adopt_special_ids, load_tokenizer
from eulerforge.optim.optimizer import build_adamw
from eulerforge.optim.schedules import learning_rate
from eulerforge.preflight import Preflight
from eulerforge.train.export import gather_state, write_model_directory
from eulerforge.train.load import ModelRequest, load_model
from eulerforge.train.loop import LoopParts, fit
from eulerforge.train.run_directory import NullRunDirectory, RunDirectory
from eulerforge.train.signals import StopWatch
from eulerforge.train.state import TrainState
from eulerforge.train.step import StepParts


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
class Setup:
    """All that has been loaded and found good before the run directory is made.

    Attributes:
        accumulation: micro-batches per step.
    """

    flight: Preflight
    launch: LaunchDecisions
    context: ProcessContext
    tokenizer: Tokenizer
    model: Any
    parallel: ParallelModel
    cache: TokenCache
    rows: PackedRows | DocumentRows
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


def pretrain(flight: Preflight, launch: LaunchDecisions, console: Console) -> Path:
    """Run a pretraining from checked input to `final/`; the run directory.

    Raises:
        InputError: model, tokenizer or data turn out to be wrong while loading; nothing has been written.
        TrainingError: the run could not go on; status.json says why.
        StoppedError: a signal came while the run was being set up.
    """
    transformers.utils.logging.disable_progress_bar()
    with StopWatch().listening() as watch:
        setup = _set_up(flight, launch, console)
        context = setup.context
        path = context.broadcast(lambda: RunDirectory.create(flight.preset.output_dir, datetime.now()).path)
        run = RunDirectory(path) if context.is_main else NullRunDirectory(path)
        state = TrainState()
        with run.recorded(state):
            run.write_config(_config_snapshot(setup))
            _announce(setup, run)
            watch.defer()
            with contextlib.closing(_make_tracker(setup, run)) as tracker:
                meter = fit(_loop_parts(setup, run, tracker, watch), state)
            if state.stopped:
                raise TrainingError(
                    f"stopped by a signal ({watch.received or 'on another rank'}) after step {state.step}",
                    "start the run again in a new output_dir; resuming is not available in this version",
                )
            _save(setup, run.final)
            done = f"Training complete. {state.step} steps in {meter.elapsed:.1f}s."
            console.say(f"{done} Final model saved to {shown_path(run.final)}")
        finish_processes(context, keep=setup)
    return run.path


def _set_up(flight: Preflight, launch: LaunchDecisions, console: Console) -> Setup:
    """Load everything; the last place where the input can turn out to be wrong."""
    preset = flight.preset
    context = start_processes(launch.device, launch.world_size, preset.distributed.timeout_seconds)
    with context.local_main_first("tokenizer"):
        tokenizer = load_tokenizer(
            flight.tokenizer, preset.trust_remote_code, preset.data.add_bos, preset.data.add_eos
        )
    console.say(f"Loading model from {flight.directory.path}")
    model, parallel = load_model(
        ModelRequest(flight.directory, flight.precision, preset, tokenizer, context, console)
    )
    for warning in adopt_special_ids(model, tokenizer, flight.directory):
        console.warn(warning)
    with context.local_main_first("tokens"):
        cache = _load_tokens(flight, tokenizer, console)
    # Nodes may need very different times for their caches; from here on ranks wait in collectives.
    context.meet("set up")
    rows = _make_rows(flight, cache, console)
    model.train()
    accumulation = grad_accum_steps(preset, context.world_size)
    return Setup(flight, launch, context, tokenizer, model, parallel, cache, rows, accumulation, console)


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


def _loop_parts(setup: Setup, run: RunDirectory, tracker: Tracker, watch: StopWatch) -> LoopParts:
    training, context = setup.training, setup.context
    # This seeds dropout, another on each rank, independent of how much randomness building the model has used.
    torch.manual_seed(training.seed + context.rank)
    optimizer = build_adamw(
        setup.model, lr=training.lr, weight_decay=training.weight_decay, betas=training.betas, eps=training.eps
    )
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
        save=partial(_save_checkpoint, setup, run),
        on_first_step=partial(_judge_first_loss, vocabulary=embedding_rows(setup.model), console=setup.console),
        max_steps=training.max_steps,
        log_steps=training.log_steps,
        save_steps=training.save_steps,
        rows_per_step=setup.rows_per_step,
        rows_per_epoch=len(setup.rows),
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


def _make_tracker(setup: Setup, run: RunDirectory) -> CompositeTracker:
    if not setup.context.is_main:
        return CompositeTracker([])
    console = ConsoleTracker(setup.console, setup.training.max_steps)
    return CompositeTracker([JsonlTracker(run.metrics), TensorBoardTracker(run.tensorboard), console])


def _save_checkpoint(setup: Setup, run: RunDirectory, step: int) -> None:
    _save(setup, run.checkpoint(step))
    setup.console.say(f"Checkpoint saved: {shown_path(run.checkpoint(step))}")


def _save(setup: Setup, target: Path) -> None:
    """Write a Hugging Face directory, complete or not at all; rank 0 writes, all ranks give their shards.

    The others do not wait in a collective while rank 0 is busy with the disk.
    """
    dtype = getattr(torch, setup.flight.precision.saved)
    state = gather_state(setup.model, dtype, keep=setup.context.is_main)
    with setup.context.main_first(f"save {target.name}"):
        if setup.context.is_main:
            with publish_directory(target) as temporary:
                write_model_directory(temporary, setup.model, state, setup.tokenizer, setup.flight.directory, dtype)


def _config_snapshot(setup: Setup) -> dict[str, Any]:
    """Content of pretrain_config.json."""
    flight, tokenizer, cache = setup.flight, setup.tokenizer, setup.cache
    preset = flight.preset.model_dump(mode="json")
    preset["model_dir"] = str(flight.directory.path)
    preset["data"]["path"] = str(Path(str(preset["data"]["path"])).expanduser().absolute())
    return {
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
