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
    COMFORTABLE,
    STRATEGIES,
    ParallelModel,
    ParallelOptions,
    choose_strategy,
    free_memory,
    load_shards,
)
from eulerforge.errors import PresetError
from eulerforge.metrics.console import Console
from eulerforge.metrics.meters import binary_size
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


@dataclass(frozen=True)
class ModelRequest:
    """What is to be loaded, and for whom.

    Attributes:
        blocks: families that the directory shows.
        wanted: the preset's precision.
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
    checkpoint: Path | None = None
    resumed_stored: str | None = None

    @property
    def seed(self) -> int:
        """Of the initial weights."""
        return self.preset.training.seed

    def build(self) -> Any:
        """The whole model on CPU with its weights, its vocabulary grown."""
        report = self.report if self.context.world_size == 1 else lambda model: None
        return build_grown(
            self.directory,
            self.preset.trust_remote_code,
            self.seed,
            self.tokenizer.vocab_size,
            self.checkpoint,
            report,
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
    """

    model: Any
    parallel: ParallelModel
    precision: PrecisionPlan
    audited: AuditedModel


def load_model(request: ModelRequest) -> LoadedModel:
    """Build, look at the blocks, settle precision and strategy, and apply them.

    Raises:
        ModelError: the directory cannot be built, or cannot be sharded.
        PresetError: the model's blocks do not bear the precision that the preset asks for.
    """
    context, console = request.context, request.console
    several = context.world_size > 1
    if several:
        # A skeleton first: it tells the size, which decides the strategy, and costs no memory. The first process of
        # a node imports the directory's code before the others: transformers copies it into a cache, where a second
        # process could read a half-written file.
        with context.local_main_first("code"):
            model = request.build_skeleton()
    else:
        model = request.build()
    blocks = find_block_modules(model)
    plan = settle_precision(request, families_of(blocks))
    free = free_memory(context.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    name, reason = choose_strategy(request.preset.distributed.strategy, context.world_size, state_bytes(model), free)
    replicate = request.preset.distributed.replicate
    shards = context.world_size // replicate if name == "fsdp" else 1
    plan = _settle_masters(plan, request, state_bytes(model) // shards, free)
    for line in plan.lines():
        console.say(line)
    for warning in plan.warnings:
        console.warn(warning)
    if several:
        console.say(f"World size {context.world_size}, strategy {name} ({reason})")
    kept = frozenset(float32_parameters(model))
    if kept and plan.compute != "float32":
        shown = ", ".join(sorted(kept)[:3]) + ", ..." * (len(kept) > 3)
        console.say(f"{len(kept)} parameters stay in float32: {shown}")
    strict = float32_modules(blocks, [family for family, rule in RULES.items() if rule.needs_float32])
    if plan.selective:
        _require_outside_of_blocks(model, strict)
    options = ParallelOptions(context, plan, reason, replicate, kept, tuple(strict) if plan.selective else ())
    if name == "fsdp":
        regions = _prepare(request, model, options)
        _report_memory(state_bytes(model) // shards, free, console)
        parallel = _shard(request, model, options)
    else:
        if several:
            model = request.build()
        regions = _prepare(request, model, options)
        _report_memory(state_bytes(model), free, console)
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
    return LoadedModel(model, parallel, plan, subject)


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


def _settle_masters(plan: PrecisionPlan, request: ModelRequest, state: int, free: int) -> PrecisionPlan:
    """Decide `master_weights: auto`.

    Args:
        state: bytes of float32 parameters, gradients and optimiser on one process.
    """
    if plan.masters is not None:
        return plan
    if request.resumed_stored is not None:
        return plan.with_masters(request.resumed_stored == "float32", "as in the checkpoint")
    fits = state <= COMFORTABLE * free
    arithmetic = f"auto: with them {binary_size(state)} of {binary_size(free)} free per process"
    return plan.with_masters(fits, f"{arithmetic}: it {'fits' if fits else 'does not fit'}")


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


def _report_memory(state: int, free: int, console: Console) -> None:
    console.say(f"Memory for parameters, gradients and AdamW: {binary_size(state)} per process (activations on top)")
    if state > free:
        console.warn(f"that is more than the {binary_size(free)} that is free.")


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
