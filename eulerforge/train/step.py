"""One optimiser step over all processes: forward and backward of all micro-batches, clip, update."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from eulerforge.data.rows import MicroBatch, step_hash
from eulerforge.distributed.context import ProcessContext
from eulerforge.distributed.gradients import fill_missing_gradients, multiply_gradients
from eulerforge.errors import TrainingError
from eulerforge.models.forward import CausalForward
from eulerforge.optim.optimizer import clip_gradients
from eulerforge.precision.audit import PrecisionAudit
from eulerforge.train.loss import next_token_loss
from eulerforge.train.scaler import LossScale


@dataclass(frozen=True)
class StepResult:
    """Values of one step, the same on every process.

    Attributes:
        loss: sum of target-token losses over all micro-batches and ranks, divided by their number.
        grad_norm: L2 norm over all parameters, before clipping.
        aux_loss: mean over micro-batches and ranks, None without one.
        tokens: tokens of the step over all ranks, padding not counted.
        data_hash: of the token ids of all ranks (`data.rows.step_hash`).
        stop: whether any process was asked to stop.
        save_failed: whether a checkpoint being written in the background could not be written on any process.
        skipped: gradients overflowed in float16; nothing was updated.
    """

    loss: float
    grad_norm: float
    aux_loss: float | None
    tokens: int
    data_hash: str
    stop: bool
    save_failed: bool
    skipped: bool = False


@dataclass(frozen=True)
class StepParts:
    """What a step works with.

    Attributes:
        precision: makes the context of a forward pass (autocast, or nothing).
        synchronise: context of a micro-batch; told whether it is the step's last.
        stop_requested: whether this process was asked to stop; agreed among all at the end of a step.
        save_failed: whether this process failed to write a checkpoint in the background; agreed in the same way.
        scale: of the loss, None where gradients need none.
        audit: watches the first step.
        say: the log.
    """

    context: ProcessContext
    forward: CausalForward
    optimizer: torch.optim.Optimizer
    precision: Callable[[], AbstractContextManager[Any]]
    synchronise: Callable[[bool], AbstractContextManager[Any]]
    max_grad_norm: float | None
    stop_requested: Callable[[], bool]
    save_failed: Callable[[], bool]
    scale: LossScale | None
    audit: PrecisionAudit
    say: Callable[[str], None]

    def agree_to_stop(self) -> bool:
        """Whether any process was asked to stop, the same on all."""
        return self.context.sum([float(self.stop_requested())])[0] > 0

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """All trained parameters."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


def accumulate_gradients(parts: StepParts, batches: Sequence[MicroBatch], targets: int) -> tuple[float, float | None]:
    """Add up the gradients of a step.

    Each token counts the same wherever it stands: token losses are divided by the number of targets of the whole
    step over all ranks, not of their micro-batch. The auxiliary loss is a mean over tokens already, so each
    micro-batch counts 1 / len(batches). Parallel strategies average gradients over ranks; the token losses are
    multiplied by their number, so that the average is the sum that is meant (the auxiliary loss wants the average).

    Args:
        targets: target tokens of the step over all ranks.

    Returns:
        this rank's share of the step's loss, and its mean auxiliary loss.
    """
    losses: list[torch.Tensor] = []
    aux_losses: list[torch.Tensor] = []
    for number, batch in enumerate(batches, 1):
        with parts.synchronise(number == len(batches)):
            with parts.precision():
                logits, aux = parts.forward(batch.input_ids, batch.attention_mask, batch.segments)
            loss = next_token_loss(logits, batch.labels) / targets
            objective = loss * parts.context.world_size
            losses.append(loss.detach())
            if aux is not None:
                aux = aux / len(batches)
                objective = objective + aux
                aux_losses.append(aux.detach())
            if parts.scale is not None:
                objective = objective * parts.scale.value
            objective.backward()
    own_aux = float(torch.stack(aux_losses).sum()) if aux_losses else None
    return float(torch.stack(losses).sum()), own_aux


def train_step(step: int, parts: StepParts, batches: Sequence[MicroBatch]) -> StepResult:
    """Run one step.

    Raises:
        TrainingError: loss or gradient norm is not finite (and not for float16 alone), on every rank alike, or the
            audit found another precision than planned. Parameters are then those of the step before.
    """
    context = parts.context
    targets, tokens, *hash_sums = context.sum(
        [
            sum(batch.targets for batch in batches),
            sum(batch.tokens for batch in batches),
            sum(batch.hash_sums[0] for batch in batches),
            sum(batch.hash_sums[1] for batch in batches),
        ]
    )
    with parts.audit.watching() if parts.audit.pending else contextlib.nullcontext():
        own_loss, own_aux = accumulate_gradients(parts, batches, round(targets))
    parameters = parts.parameters
    fill_missing_gradients(parameters)
    if parts.scale is not None:
        multiply_gradients(parameters, 1 / parts.scale.value)
    grad_norm = clip_gradients(parameters, parts.max_grad_norm)
    # One small reduction carries all that ranks must agree on.
    flags = [float(parts.stop_requested()), float(parts.save_failed())]
    loss, aux, stop, save_failed = context.sum([own_loss, own_aux or 0.0, *flags])
    result = StepResult(
        loss=loss,
        grad_norm=grad_norm.item(),
        aux_loss=None if own_aux is None else aux / context.world_size,
        tokens=round(tokens),
        data_hash=step_hash(*hash_sums),
        stop=stop > 0,
        save_failed=save_failed > 0,
    )
    if parts.scale is None:
        _require_finite(step, result)
    elif not _is_finite(result):
        parts.scale.shrink(step)
        parts.optimizer.zero_grad(set_to_none=True)
        return replace(result, skipped=True)
    else:
        parts.scale.grow()
    parts.optimizer.step()
    if parts.audit.pending:
        for line in parts.audit.finish(parts.optimizer):
            parts.say(line)
    parts.optimizer.zero_grad(set_to_none=True)
    return result


def _is_finite(result: StepResult) -> bool:
    return all(math.isfinite(value) for value in (result.loss, result.grad_norm, result.aux_loss or 0.0))


def _require_finite(step: int, result: StepResult) -> None:
    values = {"loss": result.loss, "aux_loss": result.aux_loss, "grad_norm": result.grad_norm}
    for name, value in values.items():
        if value is not None and not math.isfinite(value):
            raise TrainingError(
                f"step {step}: {name} is {value} (loss {result.loss}, grad_norm {result.grad_norm}); stopped before "
                "the optimiser step, earlier checkpoints are kept",
                "lower training.lr or lengthen training.warmup_steps; with bfloat16 try dtype: float32; "
                "look at the data of that step",
            )
