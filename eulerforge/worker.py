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

import psutil
import torch
import transformers

import eulerforge
from eulerforge.config.checks import grad_accum_steps
from eulerforge.config.schema import TrainingSection
from eulerforge.data.cache import CacheSpec, TokenCache, open_or_build
from eulerforge.data.rows import DocumentRows, PackedRows, StepBatches, require_rows
from eulerforge.distributed.context import ProcessContext, single_process
from eulerforge.files import publish_directory, shown_path
from eulerforge.metrics.console import Console
from eulerforge.metrics.meters import binary_size
from eulerforge.metrics.trackers import CompositeTracker, ConsoleTracker, JsonlTracker, TensorBoardTracker, Tracker
from eulerforge.models.build import build_model, embedding_rows, grow_vocabulary
from eulerforge.models.forward import CausalForward
from eulerforge.models.stats import count_parameters, state_bytes
from eulerforge.models.tokenizer import Tokenizer, adopt_special_ids, load_tokenizer
from eulerforge.optim.optimizer import build_adamw
from eulerforge.optim.schedules import learning_rate
from eulerforge.preflight import Preflight
from eulerforge.train.export import write_model_directory
from eulerforge.train.loop import LoopParts, fit
from eulerforge.train.run_directory import RunDirectory
from eulerforge.train.state import TrainState


@dataclass(frozen=True)
class LaunchDecisions:
    """What the launcher decided for this rank.

    Attributes:
        device: `cpu` or `cuda:N`.
        reasons: one line per decision, for pretrain_config.json.
    """

    device: str
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
    """
    transformers.utils.logging.disable_progress_bar()
    setup = _set_up(flight, launch, console)
    run = RunDirectory.create(flight.preset.output_dir, datetime.now())
    state = TrainState()
    with run.recorded(state):
        run.write_config(_config_snapshot(setup))
        _announce(setup, run)
        with contextlib.closing(_make_tracker(setup, run)) as tracker:
            meter = fit(_loop_parts(setup, run, tracker), state)
        _save(setup, run.final)
        done = f"Training complete. {state.step} steps in {meter.elapsed:.1f}s."
        console.say(f"{done} Final model saved to {shown_path(run.final)}")
    return run.path


def _set_up(flight: Preflight, launch: LaunchDecisions, console: Console) -> Setup:
    """Load everything; the last place where the input can turn out to be wrong."""
    preset = flight.preset
    context = single_process(launch.device)
    tokenizer = load_tokenizer(flight.tokenizer, preset.trust_remote_code, preset.data.add_bos, preset.data.add_eos)
    model = _load_model(flight, tokenizer, console)
    cache = _load_tokens(flight, tokenizer, console)
    rows = _make_rows(flight, cache, console)
    model.to(context.device).train()
    accumulation = grad_accum_steps(preset, context.world_size)
    return Setup(flight, launch, context, tokenizer, model, cache, rows, accumulation, console)


def _load_model(flight: Preflight, tokenizer: Tokenizer, console: Console) -> Any:
    """Build the model, give it the tokenizer's vocabulary and special tokens."""
    console.say(f"Loading model from {flight.directory.path}")
    built = build_model(flight.directory, flight.preset.trust_remote_code, flight.preset.training.seed)
    model = built.model
    total, trainable = count_parameters(model)
    dtype = next(model.parameters()).dtype
    console.say(f"Model loaded: {total:,} params, {trainable:,} trainable, dtype={dtype} ({built.origin})")
    console.say(f"Tokenizer: {flight.preset.tokenizer or tokenizer.name} (vocab={tokenizer.vocab_size})")
    rows = embedding_rows(model)
    if tokenizer.vocab_size > rows:
        console.say(
            f"Tokenizer vocab ({tokenizer.vocab_size}) > model vocab ({rows}). "
            f"Resizing model embeddings to {tokenizer.vocab_size}."
        )
        grow_vocabulary(model, tokenizer.vocab_size)
    for warning in adopt_special_ids(model, tokenizer, flight.directory):
        console.warn(warning)
    return model


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
    shape = f"{training.batch_size} rows x {setup.accumulation} micro-batches x {context.world_size} process"
    rows = setup.rows_per_step
    say(f"Global batch: {shape} = {rows} rows, up to {rows * setup.rows.max_length:,} tokens per step")
    state = state_bytes(setup.model)
    say(f"Memory for parameters, gradients and AdamW: {binary_size(state)} (activations come on top)")
    available = _available_memory(context.device)
    if state > available:
        setup.console.warn(f"that is more than the {binary_size(available)} that {context.device} has free.")
    say(
        f"Starting training: max_steps={training.max_steps}, batch_size={training.batch_size}, "
        f"grad_accum={setup.accumulation}, lr={training.lr}, warmup={training.warmup_steps}"
    )


def _available_memory(device: torch.device) -> int:
    """Free bytes, counting the parameters that are there already as used."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _loop_parts(setup: Setup, run: RunDirectory, tracker: Tracker) -> LoopParts:
    training, context = setup.training, setup.context
    # This seeds dropout, independent of how much randomness building the model has used.
    torch.manual_seed(training.seed)
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
        forward=CausalForward(setup.model),
        optimizer=optimizer,
        batches=lambda step: [batch.to(context.device) for batch in batches.of_step(step)],
        learning_rate=partial(
            learning_rate,
            peak=training.lr,
            schedule=training.scheduler,
            warmup_steps=training.warmup_steps,
            max_steps=training.max_steps,
            min_lr_ratio=training.min_lr_ratio,
        ),
        precision=_precision_context(setup),
        tracker=tracker,
        save=partial(_save_checkpoint, setup, run),
        on_first_step=partial(_judge_first_loss, vocabulary=embedding_rows(setup.model), console=setup.console),
        max_steps=training.max_steps,
        max_grad_norm=training.max_grad_norm,
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
    console = ConsoleTracker(setup.console, setup.training.max_steps)
    return CompositeTracker([JsonlTracker(run.metrics), TensorBoardTracker(run.tensorboard), console])


def _save_checkpoint(setup: Setup, run: RunDirectory, step: int) -> None:
    _save(setup, run.checkpoint(step))
    setup.console.say(f"Checkpoint saved: {shown_path(run.checkpoint(step))}")


def _save(setup: Setup, target: Path) -> None:
    """Write a Hugging Face directory that is either complete or not there."""
    dtype = getattr(torch, setup.flight.precision.saved)
    with publish_directory(target) as temporary:
        write_model_directory(temporary, setup.model, setup.tokenizer, setup.flight.directory, dtype)


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
        "decisions": [*setup.launch.reasons, f"precision: {flight.precision.reason}"],
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
