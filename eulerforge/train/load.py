"""Model directory -> the model that trains, built the way its parallel strategy needs.

single, ddp   every process builds the whole model from config and weights (same seed, same weights)
fsdp          every process builds a skeleton without parameter memory, shards it, and reads its own rows from a
              file that a short-lived process per node has written
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

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
from eulerforge.metrics.console import Console
from eulerforge.metrics.meters import binary_size
from eulerforge.models.build import build_model, embedding_rows, grow_vocabulary
from eulerforge.models.directory import ModelDirectory
from eulerforge.models.initial import InitialWeights, write_initial_weights
from eulerforge.models.lean import parameters_on_meta
from eulerforge.models.stats import count_parameters, state_bytes
from eulerforge.models.tokenizer import Tokenizer
from eulerforge.precision.plan import PrecisionPlan


def load_model(
    directory: ModelDirectory,
    precision: PrecisionPlan,
    preset: PretrainPreset,
    tokenizer: Tokenizer,
    context: ProcessContext,
    console: Console,
) -> tuple[Any, ParallelModel]:
    """Build, grow the vocabulary, choose a strategy and apply it; the transformers model and its parallel form.

    Raises:
        ModelError: the directory cannot be built, or cannot be sharded.
    """
    if context.world_size == 1:
        model = build_model(directory, preset.trust_remote_code, preset.training.seed).model
        _report(model, directory, preset, tokenizer, console)
        grow_vocabulary(model, tokenizer.vocab_size)
        _report_memory(state_bytes(model), free_memory(context.device, 1), console)
        name, reason = choose_strategy(preset.distributed.strategy, 1, 0, 0)
        return model, STRATEGIES[name](model, ParallelOptions(context, precision, reason))
    return _load_parallel(directory, precision, preset, tokenizer, context, console)


def _load_parallel(
    directory: ModelDirectory,
    precision: PrecisionPlan,
    preset: PretrainPreset,
    tokenizer: Tokenizer,
    context: ProcessContext,
    console: Console,
) -> tuple[Any, ParallelModel]:
    """A skeleton first: it tells the size, which decides the strategy, and costs no memory."""
    seed = preset.training.seed
    # The first process of a node imports the directory's code before the others: transformers copies it into a cache,
    # where a second process could read a half-written file.
    with context.local_main_first("code"), parameters_on_meta():
        skeleton = build_model(directory, preset.trust_remote_code, seed, with_weights=False).model
        _report(skeleton, directory, preset, tokenizer, console)
        grow_vocabulary(skeleton, tokenizer.vocab_size)
    state = state_bytes(skeleton)
    free = free_memory(context.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    name, reason = choose_strategy(preset.distributed.strategy, context.world_size, state, free)
    console.say(f"World size {context.world_size}, strategy {name} ({reason})")
    options = ParallelOptions(context, precision, reason, preset.distributed.replicate)
    if name == "fsdp":
        _report_memory(state * options.replicate // context.world_size, free, console)
        return skeleton, _shard(skeleton, directory, preset, options)
    _report_memory(state, free, console)
    model = build_model(directory, preset.trust_remote_code, seed).model
    grow_vocabulary(model, tokenizer.vocab_size)
    return model, STRATEGIES[name](model, options)


def _report(
    skeleton: Any, directory: ModelDirectory, preset: PretrainPreset, tokenizer: Tokenizer, console: Console
) -> None:
    total, trainable = count_parameters(skeleton)
    dtype = next(skeleton.parameters()).dtype
    origin = f"initialised from seed {preset.training.seed}" if directory.weights is None else directory.weights.name
    console.say(f"Model loaded: {total:,} params, {trainable:,} trainable, dtype={dtype} ({origin})")
    console.say(f"Tokenizer: {preset.tokenizer or tokenizer.name} (vocab={tokenizer.vocab_size})")
    rows = embedding_rows(skeleton)
    if tokenizer.vocab_size > rows:
        console.say(
            f"Tokenizer vocab ({tokenizer.vocab_size}) > model vocab ({rows}). "
            f"Resizing model embeddings to {tokenizer.vocab_size}."
        )


def _report_memory(state: int, free: int, console: Console) -> None:
    console.say(f"Memory for parameters, gradients and AdamW: {binary_size(state)} per process (activations on top)")
    if state > free:
        console.warn(f"that is more than the {binary_size(free)} that is free.")


def _shard(
    skeleton: Any, directory: ModelDirectory, preset: PretrainPreset, options: ParallelOptions
) -> ParallelModel:
    context, rows = options.context, embedding_rows(skeleton)
    parallel = STRATEGIES["fsdp"](skeleton, options)
    folder: str | None = None
    try:
        with context.local_main_first("weights"):
            if context.local_rank == 0:
                folder = tempfile.mkdtemp(prefix="eulerforge-weights-")
                file = Path(folder) / "weights.safetensors"
                request = InitialWeights(
                    str(directory.path), preset.trust_remote_code, preset.training.seed, rows, str(file)
                )
                write_initial_weights(request)
                context.share_on_node("weights file", str(file))
        load_shards(skeleton, Path(context.shared_on_node("weights file")))
        context.meet("weights read")
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    return parallel
