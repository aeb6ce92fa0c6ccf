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
from eulerforge.models.build import build_grown, build_model, embedding_rows, grow_vocabulary
from eulerforge.models.directory import ModelDirectory
from eulerforge.models.initial import InitialWeights, write_initial_weights
from eulerforge.models.lean import parameters_on_meta
from eulerforge.models.stats import count_parameters, state_bytes
from eulerforge.models.tokenizer import Tokenizer
from eulerforge.precision.plan import PrecisionPlan


@dataclass(frozen=True)
class ModelRequest:
    """What is to be loaded, and for whom.

    Attributes:
        checkpoint: where the weights come from when a run is resumed.
    """

    directory: ModelDirectory
    precision: PrecisionPlan
    preset: PretrainPreset
    tokenizer: Tokenizer
    context: ProcessContext
    console: Console
    checkpoint: Path | None = None

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


def load_model(request: ModelRequest) -> tuple[Any, ParallelModel]:
    """Build, choose a strategy and apply it; the transformers model and its parallel form.

    Raises:
        ModelError: the directory cannot be built, or cannot be sharded.
    """
    context = request.context
    if context.world_size == 1:
        model = request.build()
        _report_memory(state_bytes(model), free_memory(context.device, 1), request.console)
        name, reason = choose_strategy(request.preset.distributed.strategy, 1, 0, 0)
        return model, STRATEGIES[name](model, ParallelOptions(context, request.precision, reason))
    # A skeleton first: it tells the size, which decides the strategy, and costs no memory. The first process of a
    # node imports the directory's code before the others: transformers copies it into a cache, where a second
    # process could read a half-written file.
    with context.local_main_first("code"):
        skeleton = request.build_skeleton()
    state = state_bytes(skeleton)
    free = free_memory(context.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    distributed = request.preset.distributed
    name, reason = choose_strategy(distributed.strategy, context.world_size, state, free)
    request.console.say(f"World size {context.world_size}, strategy {name} ({reason})")
    options = ParallelOptions(context, request.precision, reason, distributed.replicate)
    if name == "fsdp":
        _report_memory(state * options.replicate // context.world_size, free, request.console)
        return skeleton, _shard(request, skeleton, options)
    _report_memory(state, free, request.console)
    model = request.build()
    return model, STRATEGIES[name](model, options)


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
