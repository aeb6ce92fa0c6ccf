"""The loss of pretraining: next-token cross entropy from logits. The one place where labels are shifted."""

from __future__ import annotations

from typing import Any

import torch

from eulerforge.data.rows import IGNORE_INDEX

CHUNK_ELEMENTS = 2**24
"""Logits taken to float32 at a time: 16 M elements, 64 MB."""


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropies of all targets, in float32.

    The logits at position t predict `labels[:, t + 1]`; `IGNORE_INDEX` is not a target. The sum, not the mean,
    because a step divides by the number of targets of all its micro-batches and ranks.

    Args:
        logits: (rows, length, vocabulary), any floating dtype.
        labels: (rows, length), int64, not shifted.
    """
    # Labels move, logits stay: cutting off the last position would copy all logits.
    targets = torch.full_like(labels, IGNORE_INDEX)
    targets[:, :-1] = labels[:, 1:]
    return _ChunkedCrossEntropy.apply(logits.flatten(0, 1), targets.flatten())


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(x)[target] over rows, in chunks of rows.

    Only the logits themselves and two numbers per row are kept for the backward pass, and each chunk is taken to
    float32 by itself, so that no second float copy of the logits exists. With m = max(x) and s = log sum exp(x - m):
    loss = s - (x[target] - m), and d/dx = exp(x - m - s) - onehot(target).
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        maxima = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
        log_sums = torch.empty_like(maxima)
        for rows in _chunks(logits):
            target = targets[rows]
            maxima[rows] = logits[rows].amax(dim=-1).float()
            shifted = logits[rows].float() - maxima[rows].unsqueeze(-1)
            picked = shifted.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            log_sums[rows] = shifted.exp_().sum(dim=-1).log_()
            # where(), not a product with the mask: an ignored row with infinite logits must not become NaN.
            total += torch.where(target == IGNORE_INDEX, 0.0, log_sums[rows] - picked).sum()
        ctx.save_for_backward(logits, targets, maxima, log_sums)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets, maxima, log_sums = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows in _chunks(logits):
            target = targets[rows]
            shifted = logits[rows].float() - maxima[rows].unsqueeze(-1)
            chunk = shifted.sub_(log_sums[rows].unsqueeze(-1)).exp_()
            chunk.scatter_add_(-1, target.clamp(min=0).unsqueeze(-1), chunk.new_full((len(target), 1), -1.0))
            chunk.mul_(grad_outputs[0])
            gradient[rows] = chunk.masked_fill_((target == IGNORE_INDEX).unsqueeze(-1), 0.0)
        return gradient, None


def _chunks(logits: torch.Tensor) -> list[slice]:
    rows = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    return [slice(start, start + rows) for start in range(0, logits.shape[0], rows)]
