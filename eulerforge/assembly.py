"""Setup -> the parts that the training loop works with, put back to where a checkpoint was."""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

import eulerforge
from eulerforge.data.loader import BatchLoader
from eulerforge.data.rows import HeldOutBatches, StepBatches, StepPlan
from eulerforge.loading import Setup, precision_context
from eulerforge.metrics.console import Console
from eulerforge.metrics.meters import counted
from eulerforge.metrics.trackers import CompositeTracker, ConsoleTracker, JsonlTracker, TensorBoardTracker, Tracker
from eulerforge.models.build import embedding_rows
from eulerforge.models.forward import CausalForward
from eulerforge.optim.optimizer import build_optimizer
from eulerforge.optim.schedules import learning_rate
from eulerforge.precision.audit import PrecisionAudit
from eulerforge.train.checkpoint import Checkpointer, CheckpointSettings
from eulerforge.train.evaluate import Evaluator
from eulerforge.train.export import write_model_directory
from eulerforge.train.fingerprint import preset_settings
from eulerforge.train.loop import LoopParts
from eulerforge.train.rng import restore_rng, seed_rng
from eulerforge.train.run_directory import RunDirectory
from eulerforge.train.scaler import LossScale
from eulerforge.train.signals import StopWatch
from eulerforge.train.state import Progress, TrainState
from eulerforge.train.step import StepParts
from eulerforge.train.trainer_state import read_own


def loop_parts(
    setup: Setup, run: RunDirectory, run_id: str, state: TrainState, tracker: Tracker, watch: StopWatch
) -> LoopParts:
    training, context = setup.training, setup.context
    optimizer = build_optimizer(
        setup.model,
        kind=training.optimizer,
        lr=training.lr,
        weight_decay=training.weight_decay,
        betas=training.betas,
        eps=training.eps,
        seed=training.seed,
    )
    scale = _loss_scale(setup)
    checkpointer = _make_checkpointer(setup, run, run_id, state, optimizer, scale)
    _restore(setup, checkpointer)
    plan = StepPlan(setup.corpus.order, training.batch_size, setup.accumulation, context.world_size)
    keep_apart = setup.flight.preset.data.document_mask
    batches = StepBatches(setup.corpus.rows, plan, context.rank, setup.tokenizer.pad_id, keep_apart)

    def stop_requested() -> bool:
        return watch.received is not None

    return LoopParts(
        step=StepParts(
            context=context,
            forward=CausalForward(setup.model, setup.parallel.call, setup.document_way),
            optimizer=optimizer,
            precision=precision_context(setup.precision, context),
            synchronise=setup.parallel.synchronise,
            max_grad_norm=training.max_grad_norm,
            stop_requested=stop_requested,
            save_failed=lambda: checkpointer.failed,
            scale=scale,
            audit=PrecisionAudit(setup.audited),
            say=setup.console.say,
        ),
        batches=BatchLoader(batches.of_step, context.device, training.max_steps),
        learning_rate=partial(
            learning_rate,
            peak=training.lr,
            schedule=training.scheduler,
            warmup_steps=training.warmup_steps,
            max_steps=training.max_steps,
            min_lr_ratio=training.min_lr_ratio,
        ),
        tracker=tracker,
        evaluate=_make_evaluator(setup, stop_requested),
        save=checkpointer.save,
        wait=checkpointer.wait,
        on_first_step=partial(_judge_first_loss, vocabulary=embedding_rows(setup.model), console=setup.console),
        on_second_step=lambda: setup.console.say(setup.memory.line()),
        on_skip=partial(_tell_of_skip, scale=scale, state=state, console=setup.console),
        max_steps=training.max_steps,
        log_steps=training.log_steps,
        save_steps=training.save_steps,
        eval_steps=training.eval_steps or training.save_steps,
        rows_per_step=setup.rows_per_step,
        rows_per_epoch=len(setup.corpus.rows),
    )


def _make_evaluator(setup: Setup, stop_requested: Callable[[], bool]) -> Evaluator | None:
    if setup.corpus.validation_rows is None:
        return None
    context = setup.context
    return Evaluator(
        context=context,
        model=setup.model,
        forward=CausalForward(setup.model, document_way=setup.document_way),
        precision=precision_context(setup.precision, context),
        settle=setup.parallel.settle,
        batches=HeldOutBatches(
            setup.corpus.validation_rows,
            setup.training.batch_size,
            context.rank,
            context.world_size,
            setup.tokenizer.pad_id,
            setup.flight.preset.data.document_mask,
        ),
        stop_requested=stop_requested,
    )


def _loss_scale(setup: Setup) -> LossScale | None:
    """As the checkpoint has it, or a new one; None where gradients do not underflow."""
    if not setup.precision.scales_loss:
        return None
    kept = setup.point.progress.loss_scale if setup.point else None
    return LossScale() if kept is None else LossScale(float(kept[0]), int(kept[1]))


def _tell_of_skip(step: int, *, scale: LossScale | None, state: TrainState, console: Console) -> None:
    assert scale is not None
    console.say(
        f"step={step}: gradients overflowed in float16, nothing was updated; loss scale now {scale.value:g} "
        f"({state.skipped} skipped so far)"
    )


def _make_checkpointer(
    setup: Setup,
    run: RunDirectory,
    run_id: str,
    state: TrainState,
    optimizer: torch.optim.Optimizer,
    scale: LossScale | None,
) -> Checkpointer:
    training = setup.training
    settings = preset_settings(setup.flight.preset)

    def progress() -> Progress:
        return Progress(
            run=run_id,
            step=state.step,
            tokens=state.tokens,
            elapsed=state.elapsed,
            world_size=setup.context.world_size,
            strategy=setup.parallel.strategy,
            stored=setup.precision.stored,
            masters=setup.masters,
            skipped=state.skipped,
            loss_scale=None if scale is None else (scale.value, scale.good_steps),
            fixed=setup.fixed,
            settings=settings,
        )

    return Checkpointer(
        settings=CheckpointSettings(
            saved=setup.saved,
            masters=setup.masters,
            keep=None if training.keep_checkpoints == "all" else int(training.keep_checkpoints),
            asynchronous=training.async_checkpoint,
            resumed_from=setup.point.checkpoint if setup.point else None,
        ),
        context=setup.context,
        run=run,
        model=setup.model,
        optimizer=optimizer,
        buffers=setup.buffers,
        progress=progress,
        write_model=partial(write_model, setup),
        console=setup.console,
    )


def _restore(setup: Setup, checkpointer: Checkpointer) -> None:
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
        f"{point.checkpoint.name} was written by {counted(point.progress.world_size)}, this run has "
        f"{context.world_size}: random numbers (dropout) begin anew"
    )


def _judge_first_loss(loss: float, vocabulary: int, console: Console) -> None:
    """An untrained model predicts all tokens alike: its loss is near ln(vocabulary)."""
    console.say(
        f"First loss: {loss:.4f}; an untrained model over {vocabulary} tokens has about {math.log(vocabulary):.4f}"
    )


def make_tracker(setup: Setup, run: RunDirectory, done: int) -> CompositeTracker:
    if not setup.context.is_main:
        return CompositeTracker([])
    console = ConsoleTracker(setup.console, setup.training.max_steps, done)
    return CompositeTracker([JsonlTracker(run.metrics), TensorBoardTracker(run.tensorboard, done), console])


def write_model(setup: Setup, target: Path, weights: dict[str, torch.Tensor]) -> None:
    write_model_directory(target, setup.model, weights, setup.tokenizer, setup.flight.directory, setup.saved)


def config_snapshot(setup: Setup, run: RunDirectory, run_id: str) -> dict[str, Any]:
    """Content of pretrain_config.json."""
    flight, tokenizer = setup.flight, setup.tokenizer
    preset = flight.preset.model_dump(mode="json")
    preset["model_dir"] = str(flight.directory.path)
    preset["data"]["path"] = _absolute(preset["data"]["path"])
    if preset["data"]["validation"] and preset["data"]["validation"]["path"]:
        preset["data"]["validation"]["path"] = _absolute(preset["data"]["validation"]["path"])
    point = setup.point
    branched_from = point.checkpoint if point is not None and flight.run_plan.branch else run.branched_from
    return {
        "run_id": run_id,
        "branched_from": None if branched_from is None else str(branched_from),
        "resumed_from": None if point is None else {"checkpoint": str(point.checkpoint), "step": point.progress.step},
        "preset": preset,
        "preset_file": str(flight.loaded.path.absolute()),
        "overrides": list(flight.loaded.overrides),
        "world_size": setup.context.world_size,
        "grad_accum_steps": setup.accumulation,
        "device": setup.launch.device,
        "precision": asdict(setup.precision),
        "strategy": setup.parallel.strategy,
        "memory_forecast": setup.memory.forecast,
        "decisions": [
            *setup.launch.reasons,
            f"strategy {setup.parallel.strategy}: {setup.parallel.reason}",
            *(f"precision: {line.strip()}" for line in setup.precision.lines()),
        ],
        "model_hints": [asdict(hint) for hint in flight.hints],
        "tokenizer": {"name": tokenizer.name, "vocab": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint},
        "data": {
            "tokens": sum(cache.stream.tokens for cache in setup.corpus.caches),
            "counts": asdict(setup.corpus.counts),
            "rows_per_step": setup.rows_per_step,
            "parts": [
                {
                    "path": part.name,
                    "weight": float(part.weight),
                    "files": [str(file.path) for file in part.files],
                    "cache": str(cache.path),
                    "digest": cache.digest,
                    "tokens": cache.stream.tokens,
                    "documents": cache.stream.documents,
                    "held_out": held_out,
                    "counts": asdict(cache.counts),
                }
                for part, cache, held_out in zip(
                    flight.corpus.parts, setup.corpus.caches, setup.corpus.held_out, strict=True
                )
            ],
        },
        "versions": {
            "eulerforge": eulerforge.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "command": sys.argv,
    }


def _absolute(value: Any) -> Any:
    """The value of `data.path` with absolute paths."""
    if isinstance(value, list):
        return [_absolute(entry) for entry in value]
    if isinstance(value, dict):
        return value | {"path": _absolute(value["path"])}
    return str(Path(value).expanduser().absolute())
