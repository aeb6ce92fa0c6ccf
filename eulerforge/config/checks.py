"""Rules between keys.

Pure functions of the preset; the file system is looked at in `preflight.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

from eulerforge.config.schema import MixtureSource, PretrainPreset, TrainingSection
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
    yield from _precision_problems(training)
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


def _precision_problems(training: TrainingSection) -> Iterator[Finding]:
    dtype, amp, masters = training.dtype, training.amp, training.master_weights
    if dtype == "float16" and amp is False:
        yield (
            "training.amp",
            "float16 weights underflow; float16 is for the computation, with float32 weights",
            "leave amp unset",
        )
    if amp == "selective" and dtype not in (None, "float32"):
        yield (
            "training.amp",
            f"selective keeps some blocks in float32, which dtype: {dtype} does not have",
            "set training.dtype: float32 (other blocks are computed in bfloat16)",
        )
    if masters is False and (dtype in ("float32", "float16") or amp == "selective"):
        yield (
            "training.master_weights",
            "false stores weights in bfloat16, but dtype and amp ask for float32 weights",
            "set training.dtype: bfloat16, or leave master_weights unset",
        )
    if masters is True and dtype == "bfloat16" and amp is False:
        yield (
            "training.master_weights",
            "amp: false computes in the stored dtype, which would be float32",
            "leave amp unset (float32 master weights, bfloat16 compute), or set training.master_weights: false",
        )


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
