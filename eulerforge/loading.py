"""Everything that is loaded before a run directory is made: the last place where the input can turn out to be wrong.

checkpoint (--resume) -> tokenizer -> model -> token cache -> rows -> room on the disk
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from eulerforge.config.checks import grad_accum_steps
from eulerforge.config.schema import TrainingSection
from eulerforge.corpus import Corpus, make_corpus, open_caches, say_mixture
from eulerforge.data.cache import Voice
from eulerforge.distributed.context import ProcessContext
from eulerforge.distributed.parallelize import ParallelModel
from eulerforge.errors import OutputError, ResumeError
from eulerforge.files import shown_path, tree_bytes
from eulerforge.metrics.console import Console
from eulerforge.metrics.meters import binary_size
from eulerforge.metrics.progress import tokenizing
from eulerforge.models.build import embedding_rows
from eulerforge.models.document_mask import Way
from eulerforge.models.document_probe import ProbedModel, find_way
from eulerforge.models.tokenizer import Tokenizer, adopt_special_ids, load_tokenizer
from eulerforge.precision.audit import AuditedModel
from eulerforge.precision.plan import PrecisionPlan
from eulerforge.preflight import Preflight, precision_request
from eulerforge.train.budget import MemoryWatch
from eulerforge.train.checkpoint import checkpoint_bytes
from eulerforge.train.decide import ModelRequest
from eulerforge.train.fingerprint import fixed_by_data, fixed_by_input, require_unchanged, setting_changes
from eulerforge.train.load import LoadedModel, load_model
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

    def stored_for(self, dtype: str | None) -> str | None:
        """How its numbers were stored, for a run that goes on with the same `training.dtype`; else None."""
        return self.progress.stored if self.progress.settings.get("training.dtype") == dtype else None


@dataclass(frozen=True)
class Setup:
    """All that has been loaded and found good before the run directory is made.

    Attributes:
        point: where the run goes on, None for one that begins.
        buffers: the model's buffers as built.
        corpus: rows and their order.
        precision: how numbers are held.
        audited: what the audit of the first step watches.
        memory: the forecast, to be held against the truth.
        document_way: how the model is told of documents that must not see each other, None if they may.
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
    precision: PrecisionPlan
    audited: AuditedModel
    memory: MemoryWatch
    buffers: BufferWatch
    corpus: Corpus
    document_way: Way | None
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
        return getattr(torch, self.precision.saved)

    @property
    def masters(self) -> bool:
        """Whether a checkpoint must hold weights of its own, because the saved ones are less precise."""
        return any(p.is_floating_point() and p.dtype != self.saved for p in self.model.parameters())


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
            flight.corpus.tokenizer, preset.trust_remote_code, preset.data.add_bos, preset.data.add_eos
        )
    rows_per_step = preset.training.batch_size * accumulation * context.world_size
    fixed = fixed_by_input(flight.directory, tokenizer, preset, rows_per_step)
    _compare(point, fixed, console)
    console.say(f"Loading model from {flight.directory.path}")
    wanted = precision_request(preset)
    request = ModelRequest(flight.directory, flight.blocks, wanted, preset, tokenizer, context, console, accumulation)
    if point is not None:
        request = replace(request, checkpoint=point.checkpoint, resumed_stored=point.stored_for(wanted.dtype))
    loaded = load_model(request)
    model = loaded.model
    for warning in adopt_special_ids(model, tokenizer, flight.directory):
        console.warn(warning)
    voice = Voice(console.say, partial(tokenizing, console))
    with context.local_main_first("tokens"):
        caches = open_caches(flight.corpus, preset, tokenizer, voice)
    corpus = make_corpus(preset, flight.corpus.parts, caches, console.say)
    fixed_data = fixed_by_data(corpus.caches, [part.weight for part in flight.corpus.parts], corpus.held_out)
    _compare(point, fixed_data, console)
    if len(corpus.caches) > 1:
        say_mixture(corpus, flight.corpus.parts, rows_per_step * preset.training.max_steps, console.say)
    model.train()
    way = _document_way(flight, loaded, context)
    setup = Setup(
        flight=flight,
        launch=launch,
        context=context,
        point=point,
        tokenizer=tokenizer,
        model=model,
        parallel=loaded.parallel,
        precision=loaded.precision,
        audited=loaded.audited,
        memory=loaded.memory,
        buffers=BufferWatch(model),
        corpus=corpus,
        document_way=way,
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


def precision_context(plan: PrecisionPlan, context: ProcessContext) -> Callable[[], AbstractContextManager[Any]]:
    """Makes the context of a forward pass: autocast, or nothing."""
    if not plan.autocast:
        return contextlib.nullcontext
    return partial(torch.autocast, context.device.type, dtype=getattr(torch, plan.compute))


def _document_way(flight: Preflight, loaded: LoadedModel, context: ProcessContext) -> Way | None:
    """How the model keeps documents apart, if it has to; proven by a probe."""
    if not flight.preset.data.document_mask:
        return None
    context.meet("probe")  # forward passes of sharded models are collectives
    precision, settle = precision_context(loaded.precision, context), loaded.parallel.settle
    rows = embedding_rows(loaded.model)
    return find_way(ProbedModel(loaded.model, rows, precision, settle, context.device))


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
