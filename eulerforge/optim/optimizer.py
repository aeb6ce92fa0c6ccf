"""AdamW with decay only where it belongs, and the global gradient norm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor


def build_adamw(
    model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) over all trainable parameters.

    No decay on parameters with fewer than two dimensions (norms, biases, gates) and on parameters that the model
    marks with `_no_weight_decay = True` (the convention of Mamba's code, for example for `A_log`).
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or getattr(parameter, "_no_weight_decay", False)
            (free if exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas, eps=eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` for the next step, in all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> torch.Tensor:
    """Scale all gradients down to a global L2 norm of `max_norm`; the norm before clipping, as a float32 scalar.

    Every process of a sharded run must call this; all get the same norm, and clip with it.

    Args:
        max_norm: None measures only.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    norm = global_norm([parameter.grad for parameter in with_gradient if parameter.grad is not None])
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(with_gradient, max_norm, norm)
    return norm


def global_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """L2 norm over all elements of all gradients, whole or sharded, as a float32 scalar.

    Summed in float64: a float32 sum over half a million elements is off by some 1e-5, another amount for each way of
    cutting them into shards.
    """
    total = torch.stack([_squares(gradient) for gradient in gradients]).sum()
    for sharded in gradients:
        if isinstance(sharded, DTensor):
            for dimension, placement in enumerate(sharded.placements):
                if placement.is_shard():
                    dist.all_reduce(total, group=sharded.device_mesh.get_group(dimension))
            break  # one mesh for all parameters
    return total.sqrt().float()


def _squares(gradient: torch.Tensor) -> torch.Tensor:
    """Sum of squares of the elements that this process holds, in float64."""
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return torch.linalg.vector_norm(local, dtype=torch.float64).square()
