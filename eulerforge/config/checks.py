"""Rules between keys, and values that the schema knows but this version cannot honour yet.

Pure functions of the preset; the file system is looked at in `preflight.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

from eulerforge.config.schema import MixtureSource, PretrainPreset
from eulerforge.errors import PresetError

Finding = tuple[str, str, str]
"""(dotted key, what is wrong, how to fix it)"""


def cross_field_problems(preset: PretrainPreset) -> Iterator[Finding]:
    """Combinations of valid values that make no sense together."""
    training = preset.training
    if training.warmup_steps > training.max_steps:
        yield (
            "training.warmup_steps",
            f"{training.warmup_steps} warm-up steps do not fit into max_steps {training.max_steps}",
            "lower training.warmup_steps or raise training.max_steps",
        )
    if training.global_batch_size is not None and training.global_batch_size % training.batch_size:
        yield (
            "training.global_batch_size",
            f"{training.global_batch_size} is not a multiple of training.batch_size {training.batch_size}",
            "choose a multiple",
        )
    validation = preset.data.validation
    if validation is not None and (validation.path is None) is (validation.fraction is None):
        yield "data.validation", "needs either path or fraction", "set one of data.validation.path and .fraction"
    if validation is None and training.eval_steps is not None:
        yield "training.eval_steps", "there is nothing to evaluate on", "set data.validation, or remove eval_steps"
    if not preset.data.packing:
        if isinstance(preset.data.path[0], MixtureSource):
            yield "data.path", "a mixture counts tokens, which needs packed rows", "set data.packing: true"
        if preset.data.document_mask:
            yield "data.document_mask", "rows of one document need no mask", "remove it, or set data.packing: true"
    if preset.distributed.replicate > 1 and preset.distributed.strategy != "fsdp":
        yield "distributed.replicate", "replicas of shards need the fsdp strategy", "set distributed.strategy: fsdp"


def grad_accum_steps(preset: PretrainPreset, world_size: int) -> int:
    """Micro-batches per step and process: given, or what global_batch_size needs at this world size.

    Raises:
        PresetError: the global batch cannot be split evenly.
    """
    training = preset.training
    if training.global_batch_size is None:
        return training.grad_accum_steps
    rows = training.batch_size * world_size
    if training.global_batch_size % rows:
        raise PresetError(
            f"training.global_batch_size {training.global_batch_size} is not a multiple of batch_size x processes = "
            f"{training.batch_size} x {world_size} = {rows}",
            "choose a multiple, or another training.batch_size",
        )
    return training.global_batch_size // rows


def check_replicas(preset: PretrainPreset, world_size: int) -> None:
    """Refuse replicas that do not divide the processes.

    Raises:
        PresetError: with both numbers.
    """
    replicate = preset.distributed.replicate
    if world_size % replicate:
        raise PresetError(
            f"distributed.replicate {replicate} does not divide the {world_size} processes of this run",
            "choose a divisor of the world size",
        )


def unavailable_problems(preset: PretrainPreset) -> Iterator[Finding]:
    """Values whose machinery is not built yet. Accepting and ignoring them would be a silent fallback."""
    training = preset.training
    if training.activation_checkpointing:
        yield "training.activation_checkpointing", "not available in this version", "set it to false"
    if training.compile:
        yield "training.compile", "not available in this version", "set it to false"
    if training.dtype == "float16":
        yield "training.dtype", "float16 is not available in this version", "use bfloat16 or float32"
    if training.amp == "selective":
        yield (
            "training.amp",
            "selective is not available in this version",
            "use dtype: float32 and amp: false",
        )
    if training.dtype == "bfloat16" and training.amp is False:
        yield (
            "training.amp",
            "bfloat16 weights without float32 masters do not move under small updates; "
            "stochastic rounding is not available in this version",
            "leave amp unset (float32 master weights, bfloat16 compute)",
        )
