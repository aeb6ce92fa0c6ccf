"""Loss on held-out rows, by all processes together. Mode and random numbers are put back afterwards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from eulerforge.data.rows import HeldOutBatches
from eulerforge.distributed.context import ProcessContext
from eulerforge.models.forward import CausalForward
from eulerforge.train.loss import next_token_loss
from eulerforge.train.rng import capture_rng, restore_rng


@dataclass(frozen=True)
class Evaluation:
    """What came of an evaluation, the same on every process.

    Attributes:
        loss: cross entropy in nats per target token; None if it was broken off.
        stop: a process was asked to stop meanwhile.
    """

    loss: float | None
    stop: bool


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a model.

    Attributes:
        model: whose mode is switched.
        forward: calls it, without what ddp wraps around it: there are no gradients to exchange.
        precision: makes the context of a forward pass.
        settle: puts sharded parameters back after forward passes without a backward pass.
        stop_requested: asked at each batch; an evaluation can take minutes.
    """

    context: ProcessContext
    model: nn.Module
    forward: CausalForward
    precision: Callable[[], AbstractContextManager[Any]]
    settle: Callable[[], None]
    batches: HeldOutBatches
    stop_requested: Callable[[], bool]

    def __call__(self) -> Evaluation:
        """Evaluate all rows, or until a process is asked to stop. All processes must call it."""
        device = self.context.device
        rng = capture_rng(device)
        self.model.eval()
        try:
            with torch.no_grad():
                return self._evaluate(device)
        finally:
            self.settle()
            self.model.train()
            restore_rng(rng, device)

    def _evaluate(self, device: torch.device) -> Evaluation:
        total, targets = 0.0, 0.0
        for number in range(len(self.batches)):
            batch = self.batches[number].to(device)
            with self.precision():
                logits, _ = self.forward(batch.input_ids, batch.attention_mask, batch.segments)
            own = float(next_token_loss(logits, batch.labels))
            loss, count, stop = self.context.sum([own, batch.targets, float(self.stop_requested())])
            total, targets = total + loss, targets + count
            if stop > 0:
                return Evaluation(None, stop=True)
        return Evaluation(total / targets, stop=False)
