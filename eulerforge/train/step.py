"""One optimiser step: forward and backward of all micro-batches, clip, update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from eulerforge.data.rows import MicroBatch
from eulerforge.errors import TrainingError
from eulerforge.models.forward import CausalForward
from eulerforge.optim.optimizer import clip_gradients
from eulerforge.train.loss import next_token_loss


@dataclass(frozen=True)
class StepResult:
    """Global values of one step.

    Attributes:
        loss: sum of target-token losses over all micro-batches, divided by their number.
        grad_norm: before clipping.
        aux_loss: mean over micro-batches, None without one.
        targets: target tokens of the step.
    """

    loss: float
    grad_norm: float
    aux_loss: float | None
    targets: int


def accumulate_gradients(
    forward: CausalForward, batches: Sequence[MicroBatch], precision: Callable[[], AbstractContextManager[Any]]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Add up the gradients of a step.

    Each token counts the same wherever it stands: token losses are divided by the number of targets of the whole
    step, not of their micro-batch. The auxiliary loss is a mean over tokens already, so each micro-batch counts
    1 / len(batches).

    Args:
        precision: makes the context of the forward pass (autocast, or nothing).

    Returns:
        the step's loss and its mean auxiliary loss, detached scalars.
    """
    targets = sum(batch.targets for batch in batches)
    total_loss: torch.Tensor | None = None
    total_aux: torch.Tensor | None = None
    for batch in batches:
        with precision():
            logits, aux = forward(batch.input_ids, batch.attention_mask)
        loss = next_token_loss(logits, batch.labels) / targets
        objective = loss
        total_loss = loss.detach() if total_loss is None else total_loss + loss.detach()
        if aux is not None:
            aux = aux / len(batches)
            objective = loss + aux
            total_aux = aux.detach() if total_aux is None else total_aux + aux.detach()
        objective.backward()
    assert total_loss is not None
    return total_loss, total_aux


def train_step(
    *,
    step: int,
    forward: CausalForward,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[MicroBatch],
    precision: Callable[[], AbstractContextManager[Any]],
    max_grad_norm: float | None,
) -> StepResult:
    """Run one step.

    Raises:
        TrainingError: loss or gradient norm is not finite. Parameters are then those of the step before.
    """
    loss, aux = accumulate_gradients(forward, batches, precision)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grad_norm = clip_gradients(parameters, max_grad_norm)
    result = StepResult(
        loss=loss.item(),
        grad_norm=grad_norm.item(),
        aux_loss=None if aux is None else aux.item(),
        targets=sum(batch.targets for batch in batches),
    )
    _require_finite(step, result)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return result


def _require_finite(step: int, result: StepResult) -> None:
    values = {"loss": result.loss, "aux_loss": result.aux_loss, "grad_norm": result.grad_norm}
    for name, value in values.items():
        if value is not None and not torch.isfinite(torch.tensor(value)):
            raise TrainingError(
                f"step {step}: {name} is {value} (loss {result.loss}, grad_norm {result.grad_norm}); stopped before "
                "the optimiser step, earlier checkpoints are kept",
                "lower training.lr or lengthen training.warmup_steps; with bfloat16 try dtype: float32; "
                "look at the data of that step",
            )
