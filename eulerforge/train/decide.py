"""What is decided about a model before it gets memory: precision, parallel strategy, whether it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from eulerforge.config.schema import PretrainPreset
from eulerforge.distributed.context import ProcessContext
from eulerforge.distributed.parallelize import choose_strategy
from eulerforge.errors import PresetError
from eulerforge.metrics.console import Console
from eulerforge.models.blocks import FoundBlock
from eulerforge.models.build import build_grown, build_model, embedding_rows, grow_vocabulary
from eulerforge.models.directory import ModelDirectory
from eulerforge.models.families import families_of, find_block_modules, float32_modules, float32_parameters
from eulerforge.models.lean import parameters_on_meta
from eulerforge.models.stats import count_parameters, state_bytes
from eulerforge.models.tokenizer import Tokenizer
from eulerforge.models.units import find_wrap_units
from eulerforge.precision.plan import PrecisionPlan, PrecisionRequest, plan_precision
from eulerforge.precision.processor import ALLOW_VARIABLE, computes_in_bfloat16
from eulerforge.precision.rules import RULES
from eulerforge.train.budget import Budget, Settled


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
class Decisions:
    """How a model will be trained.

    Attributes:
        precision: the plan in force.
        strategy, reason: a key of `STRATEGIES`, and why.
        float32_parameters: names of parameters that stay in float32 whatever the plan.
        strict: paths of modules that must compute in float32.
        forecast: bytes of memory per process, 0 if unknown.
    """

    precision: PrecisionPlan
    strategy: str
    reason: str
    float32_parameters: frozenset[str]
    strict: tuple[str, ...]
    forecast: int


def decide(request: ModelRequest, skeleton: Any, free: int | None) -> Decisions:
    """Decide, and say so. All processes must call it, with the same `free`.

    Args:
        skeleton: the model; its parameters need no memory.
        free: bytes that one process may use; None where that cannot be known.

    Raises:
        PresetError: the model's blocks do not bear the precision that the preset asks for, or it does not fit into
            memory.
    """
    context, console, world_size = request.context, request.console, request.context.world_size
    blocks = find_block_modules(skeleton, console.warn)
    plan = settle_precision(request, families_of(blocks))
    wanted = request.preset.distributed.strategy
    name, reason = choose_strategy(wanted, world_size, state_bytes(skeleton), free)
    if request.resumed_stored is not None:
        plan = plan.with_masters(request.resumed_stored == "float32", "as in the checkpoint")
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
    return Decisions(plan, name, reason, kept, tuple(strict), settled.forecast)


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
