"""Everything that is loaded before a run directory is made: the last place where the input can turn out to be wrong.

checkpoint (--resume) -> tokenizer -> model -> token cache -> rows -> room on the disk
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from eulerforge.config.checks import grad_accum_steps
from eulerforge.config.schema import PretrainPreset, TrainingSection
from eulerforge.data.cache import CacheSpec, TokenCache, Tokens, open_or_build
from eulerforge.data.rows import DocumentRows, PackedRows, require_rows
from eulerforge.distributed.context import ProcessContext
from eulerforge.distributed.parallelize import ParallelModel
from eulerforge.errors import OutputError, ResumeError
from eulerforge.files import shown_path, tree_bytes
from eulerforge.metrics.console import Console
from eulerforge.metrics.meters import binary_size
from eulerforge.models.tokenizer import Tokenizer, adopt_special_ids, load_tokenizer
from eulerforge.preflight import Preflight
from eulerforge.train.checkpoint import checkpoint_bytes
from eulerforge.train.fingerprint import fixed_by_data, fixed_by_input, require_unchanged, setting_changes
from eulerforge.train.load import ModelRequest, load_model
from eulerforge.train.resume import choose_checkpoint
from eulerforge.train.run_directory import DEFAULT_PARENT, RunDirectory
from eulerforge.train.signals import StopWatch
from eulerforge.train.state import Progress
from eulerforge.train.trainer_state import BufferWatch


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
        validation_rows: held-out rows, None without any.
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
    validation_rows: PackedRows | DocumentRows | None
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


def set_up(
    flight: Preflight, launch: LaunchDecisions, context: ProcessContext, console: Console, watch: StopWatch
) -> Setup:
    """Load everything.

    Args:
        watch: listening already; from the end of this on it only takes notes.

    Raises:
        InputError: model, tokenizer, data or checkpoint are wrong.
        StoppedError: a process was asked to stop.
    """
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
        validation = _load_validation(flight, tokenizer, console)
    held_out = _held_out_documents(flight.preset, cache)
    fixed_data = fixed_by_data(cache, held_out)
    _compare(point, fixed_data, console)
    rows, validation_rows = _make_rows(flight, cache, held_out, validation, console)
    model.train()
    setup = Setup(
        flight=flight,
        launch=launch,
        context=context,
        point=point,
        tokenizer=tokenizer,
        model=model,
        parallel=parallel,
        buffers=BufferWatch(model),
        cache=cache,
        rows=rows,
        validation_rows=validation_rows,
        fixed=fixed | fixed_data,
        accumulation=accumulation,
        console=console,
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
    used = setup.flight.run_plan.directory_in_use()
    # What a killed save has left is removed before the next one.
    removable = 0 if used is None else sum(map(tree_bytes, RunDirectory(used).leftovers()))
    free = shutil.disk_usage(existing).free + removable
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


def _load_tokens(flight: Preflight, tokenizer: Tokenizer, console: Console) -> TokenCache:
    cache = _open_cache(flight, flight.files, "data.path", tokenizer, console)
    counts = cache.counts
    console.say(f"Loaded {counts.documents} texts from {flight.preset.data.path}")
    notes = {
        **{f"skipped, {kind}": number for kind, number in counts.skipped.items()},
        "empty texts dropped": counts.empty,
        "texts with lone surrogates repaired": counts.repaired,
    }
    if any(notes.values()):
        console.say("Data notes: " + ", ".join(f"{number} {what}" for what, number in notes.items() if number))
    console.say(f"Token cache: {'reused' if cache.reused else 'built'} {cache.path}")
    return cache


def _load_validation(flight: Preflight, tokenizer: Tokenizer, console: Console) -> TokenCache | None:
    if not flight.validation_files:
        return None
    return _open_cache(flight, flight.validation_files, "data.validation.path", tokenizer, console)


def _open_cache(
    flight: Preflight, files: tuple[Path, ...], key: str, tokenizer: Tokenizer, console: Console
) -> TokenCache:
    data = flight.preset.data
    spec = CacheSpec(
        files,
        data.text_column,
        data.on_bad_line,
        bos_id=tokenizer.bos_id if data.add_bos else None,
        eos_id=tokenizer.eos_id if data.add_eos else None,
        key=key,
    )
    check = partial(require_rows, max_length=data.max_length, packing=data.packing, key=key)
    return open_or_build(spec, tokenizer, flight.cache_dir, check, console.say)


def _held_out_documents(preset: PretrainPreset, cache: TokenCache) -> int:
    """How many of the last documents are not trained on."""
    validation = preset.data.validation
    if validation is None or validation.fraction is None:
        return 0
    return math.ceil(validation.fraction * cache.documents)


def _make_rows(
    flight: Preflight, cache: TokenCache, held_out: int, validation: TokenCache | None, console: Console
) -> tuple[PackedRows | DocumentRows, PackedRows | DocumentRows | None]:
    """Training rows, and held-out rows if there are any."""
    data = flight.preset.data
    border = cache.documents - held_out
    training_offsets = cache.offsets[: border + 1]
    if held_out:
        check = partial(require_rows, max_length=data.max_length, packing=data.packing)
        check(training_offsets, key="data.validation.fraction", what="what is left to train on")
        check(cache.offsets[border:], key="data.validation.fraction", what="the held-out part")
    rows = _rows_of(flight.preset, cache.tokens, training_offsets)
    console.say(_shape(flight.preset, rows))
    held: PackedRows | DocumentRows | None = None
    if held_out:
        start = int(cache.offsets[border])
        held = _rows_of(flight.preset, cache.tokens[start:], cache.offsets[border:] - start)
    elif validation is not None:
        held = _rows_of(flight.preset, validation.tokens, validation.offsets)
    if held is not None:
        documents = held_out or (validation.documents if validation else 0)
        console.say(f"Held out: {documents:,} texts, {len(held):,} rows of {data.max_length} tokens")
    return rows, held


def _rows_of(preset: PretrainPreset, tokens: Tokens, offsets: npt.NDArray[np.int64]) -> PackedRows | DocumentRows:
    if preset.data.packing:
        return PackedRows(tokens[: offsets[-1]], preset.data.max_length)
    return DocumentRows(tokens, offsets, preset.data.max_length)


def _shape(preset: PretrainPreset, rows: PackedRows | DocumentRows) -> str:
    """What the corpus has become, for the log."""
    length = preset.data.max_length
    if isinstance(rows, PackedRows):
        return f"Packed: {rows.total:,} tokens → {len(rows):,} chunks (max_length={length})"
    padding = 1 - rows.real_tokens / (len(rows) * length)
    return (
        f"Rows: {rows.texts:,} texts → {len(rows):,} rows (max_length={length}, {rows.cut:,} cut, "
        f"{rows.left_out:,} of one token left out, {padding:.1%} padding)"
    )
