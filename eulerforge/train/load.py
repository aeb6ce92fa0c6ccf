"""Model directory -> the model that trains, built the way its parallel strategy needs.

single, ddp   every process builds the whole model from config and weights (same seed, same weights)
fsdp          every process builds a skeleton without parameter memory, shards it, and reads its own rows from a
              file that a short-lived process per node has written
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eulerforge.distributed.context import ProcessContext
from eulerforge.distributed.parallelize import (
    STRATEGIES,
    ParallelModel,
    ParallelOptions,
    free_memory,
    load_shards,
)
from eulerforge.memory.peak import PeakMemory
from eulerforge.models.build import embedding_rows
from eulerforge.models.compiling import compile_blocks
from eulerforge.models.initial import InitialWeights, write_initial_weights
from eulerforge.models.lean import store_parameters
from eulerforge.models.recompute import recompute_blocks
from eulerforge.models.units import find_wrap_units
from eulerforge.precision.audit import AuditedModel
from eulerforge.precision.plan import PrecisionPlan
from eulerforge.precision.regions import Float32Region
from eulerforge.train.budget import MemoryWatch
from eulerforge.train.decide import ModelRequest, decide


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
    context = request.context
    peak = PeakMemory(context.device)
    # A skeleton first: it tells blocks and size, which decide precision and strategy, and costs no memory. The first
    # process of a node imports the directory's code before the others: transformers copies it into a cache, where a
    # second process could read a half-written file.
    with context.local_main_first("code"):
        skeleton = request.build_skeleton()
    # Of rank 0 for all: what is decided by it must be the same everywhere.
    free = int(context.from_main("free memory", lambda: str(_free_memory(context))))
    decided = decide(request, skeleton, free)
    plan = decided.precision
    selected = decided.strict if plan.selective else ()
    replicate = request.preset.distributed.replicate
    options = ParallelOptions(context, plan, decided.reason, replicate, decided.float32_parameters, selected)
    if decided.strategy == "fsdp":
        model = skeleton
        regions = _prepare(request, model, options)
        parallel = _shard(request, model, options)
    else:
        model = request.build()
        regions = _prepare(request, model, options)
        parallel = STRATEGIES[decided.strategy](model, options)
    subject = AuditedModel(
        model=model,
        plan=plan,
        strict={path: model.get_submodule(path) for path in decided.strict},
        regions=regions,
        float32_parameters=decided.float32_parameters,
        compiled=request.preset.training.compile,
        lenient=request.preset.training.precision_check == "warn",
    )
    return LoadedModel(model, parallel, plan, subject, MemoryWatch(decided.forecast, peak))


def _free_memory(context: ProcessContext) -> int:
    return free_memory(context.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


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
