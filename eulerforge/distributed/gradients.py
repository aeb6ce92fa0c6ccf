"""Every trainable parameter gets a gradient on every process, zero where the loss does not depend on it.

Models of unknown code leave parameters out: a norm that no layer calls, an expert that no token of this rank chose.
Reductions of gradients then disagree between ranks. DDP stops; FSDP2 goes on with *wrong gradients and no error*,
because the ranks reduce different sets of parameters (one expert's gradient is added to another's).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor


def anchor_parameters(module: nn.Module, *, within: nn.Module, without: Iterable[nn.Module]) -> None:
    """Tie parameters to the output of `module` with weight zero, so that the backward pass reaches all of them.

    Adds `0 * p[0]` of each to the first floating-point tensor of the output: exact (gradients get + 0), and cheaper
    than a sum over the parameter.

    Args:
        module: whose forward output carries the zeros.
        within: parameters of this module and its children are anchored ...
        without: ... except those of these modules.
    """
    left_out = {id(child) for excluded in without for child in excluded.modules()}
    owners = [
        (child, name)
        for child in within.modules()
        if id(child) not in left_out
        for name, parameter in child.named_parameters(recurse=False)
        if parameter.requires_grad and parameter.numel()
    ]

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if not torch.is_grad_enabled():
            return output
        # Looked up at each call: FSDP puts other tensors into these attributes while a unit is gathered.
        parameters = [getattr(owner, name) for owner, name in owners]
        if not parameters:
            return output
        zero = torch.stack([parameter.reshape(-1)[0].float() for parameter in parameters]).sum() * 0.0
        return _add_to_first_tensor(output, lambda tensor: tensor + zero.to(tensor.dtype))

    # First of all hooks: FSDP's own, which frees the gathered parameters, must come after it.
    module.register_forward_hook(hook, prepend=True)


def _add_to_first_tensor(output: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(output, torch.Tensor):
        return change(output) if output.is_floating_point() else output
    if isinstance(output, dict):  # also transformers' ModelOutput, whose attributes follow its items
        # The logits first: what else a model returns may take no part in the loss.
        for key, value in sorted(output.items(), key=lambda item: item[0] != "logits"):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                output[key] = change(value)
                return output
        raise TypeError("no floating-point tensor in a module's output")
    if isinstance(output, tuple | list):
        for index, value in enumerate(output):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                changed = [*output[:index], change(value), *output[index + 1 :]]
                if hasattr(output, "_fields"):
                    return type(output)(*changed)
                return type(output)(changed)
    raise TypeError(f"cannot add to the output of type {type(output).__name__}")


def multiply_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply all gradients in place, whole or sharded."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], factor)


def average_replicated_gradients(parameters: Sequence[nn.Parameter], world_size: int) -> None:
    """Average gradients of parameters that no parallel strategy takes care of, over all processes, in float32.

    All processes must call it. Where the backward pass did not reach a parameter on one of them, its part is zero.
    """
    fill_missing_gradients(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.float().reshape(-1) for gradient in gradients]) / world_size
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def fill_missing_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Zero gradients for parameters that the backward pass did not reach, so that the optimiser has state for all."""
    for parameter in parameters:
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
