"""Model directory -> the model that trains, built the way its parallel strategy needs.

single, ddp   every process builds the whole model from config and weights (same seed, same weights)
fsdp          every process builds a skeleton without parameter memory, shards it, and reads its own rows from a
              file that a short-lived process per node has written
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eulerforge.config.schema import PretrainPreset
from eulerforge.distributed.context import ProcessContext
from eulerforge.distributed.parallelize import (
    STRATEGIES,
    ParallelModel,
    ParallelOptions,
    choose_strategy,
    free_memory,
    load_shards,
)
from eulerforge.errors import PresetError
from eulerforge.memory.peak import PeakMemory
from eulerforge.metrics.console import Console
from eulerforge.models.blocks import FoundBlock
from eulerforge.models.build import build_grown, build_model, embedding_rows, grow_vocabulary
from eulerforge.models.compiling import compile_blocks
from eulerforge.models.directory import ModelDirectory
from eulerforge.models.families import families_of, find_block_modules, float32_modules, float32_parameters
from eulerforge.models.initial import InitialWeights, write_initial_weights
from eulerforge.models.lean import parameters_on_meta, store_parameters
from eulerforge.models.recompute import recompute_blocks
from eulerforge.models.stats import count_parameters, state_bytes
from eulerforge.models.tokenizer import Tokenizer
from eulerforge.models.units import find_wrap_units
from eulerforge.precision.audit import AuditedModel
from eulerforge.precision.plan import PrecisionPlan, PrecisionRequest, plan_precision
from eulerforge.precision.processor import ALLOW_VARIABLE, computes_in_bfloat16
from eulerforge.precision.regions import Float32Region
from eulerforge.precision.rules import RULES
from eulerforge.train.budget import Budget, MemoryWatch, Settled


@dataclass(frozen=True)
class ModelRequest:
    """What is to be loaded, and for whom.

    Attributes:
        blocks: families that the directory shows.
        wanted: the preset's precision.
        accumulation: micro-batches of a step.
        checkpoint: where the weights come from when a run is resumed.
        resumed_stored: dtype of parameters and optimiser state in that checkpoint.
    """

    directory: ModelDirectory
    blocks: Sequence[FoundBlock]
    wanted: PrecisionRequest
    preset: PretrainPreset
    tokenizer: Tokenizer
    context: ProcessContext
    console: Console
    accumulation: int = 1
    checkpoint: Path | None = None
    resumed_stored: str | None = None

    @property
    def seed(self) -> int:
        """Of the initial weights."""
        return self.preset.training.seed

    def build(self) -> Any:
        """The whole model on CPU with its weights, its vocabulary grown."""
        return build_grown(
            self.directory,
            self.preset.trust_remote_code,
            self.seed,
            self.tokenizer.vocab_size,
            self.checkpoint,
        )

    def build_skeleton(self) -> Any:
        """The model with real buffers and parameters without memory, its vocabulary grown."""
        with parameters_on_meta():
            model = build_model(self.directory, self.preset.trust_remote_code, self.seed, with_weights=False).model
            self.report(model)
            grow_vocabulary(model, self.tokenizer.vocab_size)
        return model

    def report(self, model: Any) -> None:
        """Say what has been loaded, before the vocabulary grows."""
        total, trainable = count_parameters(model)
        dtype, weights = next(model.parameters()).dtype, self.directory.weights
        origin = f"initialised from seed {self.seed}" if weights is None else weights.name
        if self.checkpoint is not None:
            origin = f"weights of {self.checkpoint.name}"
        needed, rows = self.tokenizer.vocab_size, embedding_rows(model)
        self.console.say(f"Model loaded: {total:,} params, {trainable:,} trainable, dtype={dtype} ({origin})")
        self.console.say(f"Tokenizer: {self.preset.tokenizer or self.tokenizer.name} (vocab={needed})")
        if needed > rows:
            self.console.say(
                f"Tokenizer vocab ({needed}) > model vocab ({rows}). Resizing model embeddings to {needed}."
            )


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be trained.

    Attributes:
        model: the transformers model.
        parallel: how it is called and shared.
        precision: the plan in force.
        audited: what the audit of the first step watches.
        memory: the forecast, to be held against the truth.
    """

    model: Any
    parallel: ParallelModel
    precision: PrecisionPlan
    audited: AuditedModel
    memory: MemoryWatch


def load_model(request: ModelRequest) -> LoadedModel:
    """Build, look at the blocks, settle precision and strategy, and apply them.

    Raises:
        ModelError: the directory cannot be built, or cannot be sharded.
        PresetError: the model's blocks do not bear the precision that the preset asks for, or it does not fit into
            memory.
    """
    context, console = request.context, request.console
    peak = PeakMemory(context.device)
    # A skeleton first: it tells blocks and size, which decide precision and strategy, and costs no memory. The first
    # process of a node imports the directory's code before the others: transformers copies it into a cache, where a
    # second process could read a half-written file.
    with context.local_main_first("code"):
        skeleton = request.build_skeleton()
    blocks = find_block_modules(skeleton)
    plan = settle_precision(request, families_of(blocks))
    # Of rank 0 for all: what is decided by it must be the same everywhere.
    free = int(context.from_main("free memory", lambda: str(_free_memory(context))))
    distributed = request.preset.distributed
    name, reason = choose_strategy(distributed.strategy, context.world_size, state_bytes(skeleton), free)
    if request.resumed_stored is not None:
        plan = plan.with_masters(request.resumed_stored == "float32", "as in the checkpoint")
    world_size = context.world_size
    budget = Budget(skeleton, request.preset, name, world_size, request.accumulation, context.device, free)
    settled = Settled.parse(context.from_main("memory", lambda: budget.settle(plan, console).text()))
    plan = plan.with_masters(settled.masters, settled.why)
    for line in plan.lines():
        console.say(line)
    for warning in plan.warnings:
        console.warn(warning)
    if world_size > 1:
        console.say(f"World size {world_size}, strategy {name} ({reason})")
    kept = frozenset(float32_parameters(skeleton))
    if kept and plan.compute != "float32":
        shown = ", ".join(sorted(kept)[:3]) + ", ..." * (len(kept) > 3)
        console.say(f"{len(kept)} parameters stay in float32: {shown}")
    strict = float32_modules(blocks, [family for family, rule in RULES.items() if rule.needs_float32])
    if plan.selective:
        _require_outside_of_blocks(skeleton, strict)
    selected = tuple(strict) if plan.selective else ()
    options = ParallelOptions(context, plan, reason, distributed.replicate, kept, selected)
    if name == "fsdp":
        model = skeleton
        regions = _prepare(request, model, options)
        parallel = _shard(request, model, options)
    else:
        model = request.build()
        regions = _prepare(request, model, options)
        parallel = STRATEGIES[name](model, options)
    subject = AuditedModel(
        model=model,
        plan=plan,
        strict={path: model.get_submodule(path) for path in strict},
        regions=regions,
        float32_parameters=kept,
        compiled=request.preset.training.compile,
        lenient=request.preset.training.precision_check == "warn",
    )
    return LoadedModel(model, parallel, plan, subject, MemoryWatch(settled.forecast, peak))


def _free_memory(context: ProcessContext) -> int:
    return free_memory(context.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def settle_precision(request: ModelRequest, found: Sequence[FoundBlock]) -> PrecisionPlan:
    """The plan for the blocks of the directory and of the built model, on this device.

    Raises:
        PresetError: they do not go together.
    """
    known = {block.family for block in found}
    blocks = [*found, *(block for block in request.blocks if block.family not in known)]
    wanted = request.wanted
    plan = plan_precision(wanted, blocks)
    if plan.compute != "bfloat16" or request.context.device.type != "cpu" or computes_in_bfloat16():
        return plan
    slow = "this processor has no bfloat16 instructions, it would be slower than float32"
    if wanted.dtype is None and wanted.amp is None:
        plan = plan_precision(replace(wanted, dtype="float32"), blocks)
        return replace(plan, reason=f"dtype unset, and {slow}")
    raise PresetError(
        f"training.dtype: bfloat16 on this device: {slow}",
        f"set training.dtype: float32 and training.amp: false (or {ALLOW_VARIABLE}=1 in the environment)",
        see="docs/precision.md",
    )


def _require_outside_of_blocks(model: Any, strict: Mapping[str, nn.Module]) -> None:
    """Refuse `amp: selective` where it would leave nothing in bfloat16.

    Raises:
        PresetError: a module that needs float32 holds the model's repeated blocks.
    """
    units = {id(unit) for unit in find_wrap_units(model)} if strict else set()
    for name, module in strict.items():
        if any(id(child) in units for child in module.modules() if child is not module):
            shown = f"{name or 'the model itself'} ({type(module).__name__})"
            raise PresetError(
                f"training.amp: selective keeps {shown} in float32, which holds all blocks of the model",
                "set training.amp: false",
                see="docs/precision.md",
            )


def _prepare(request: ModelRequest, model: Any, options: ParallelOptions) -> list[Float32Region]:
    """What changes in the model itself: dtype of its parameters, float32 regions, compilation, recomputation."""
    plan, training = options.precision, request.preset.training
    store_parameters(model, getattr(torch, plan.stored), options.float32_parameters)
    regions = [
        Float32Region(model.get_submodule(name), request.context.device.type, getattr(torch, plan.compute))
        for name in options.float32_modules
    ]
    if training.compile:
        compile_blocks(find_wrap_units(model), request.console.warn)
    if training.activation_checkpointing:
        units = find_wrap_units(model)
        count = recompute_blocks(units, int(training.activation_checkpointing))
        request.console.say(f"Activation checkpointing: {count} of {len(units)} blocks are computed again")
    return regions


def _shard(request: ModelRequest, skeleton: Any, options: ParallelOptions) -> ParallelModel:
    """Shard the skeleton; then one process per node writes all weights to a file, and each reads its rows."""
    context = options.context
    parallel = STRATEGIES["fsdp"](skeleton, options)
    folder: str | None = None
    try:
        with context.local_main_first("weights"):
            if context.local_rank == 0:
                folder = tempfile.mkdtemp(prefix="eulerforge-weights-")
                file = str(Path(folder) / "weights.safetensors")
                write_initial_weights(
                    InitialWeights(
                        directory=str(request.directory.path),
                        trust_remote_code=request.preset.trust_remote_code,
                        seed=request.seed,
                        rows=embedding_rows(skeleton),
                        checkpoint=None if request.checkpoint is None else str(request.checkpoint),
                        target=file,
                    )
                )
                context.share_on_node("weights file", file)
        load_shards(skeleton, Path(context.shared_on_node("weights file")))
        context.meet("weights read")
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    return parallel
