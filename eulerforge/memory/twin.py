"""A copy of a model without memory: the same modules and code, with fake parameters and buffers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def fake_twin(model: nn.Module, held: torch.dtype) -> Any:
    """A model that can be run and changed in place of `model`. Call it within a `FakeTensorMode`.

    Args:
        model: parameters and buffers on any device, meta too; it stays as it is.
        held: dtype of floating-point parameters in forward and backward passes.
    """
    fakes: dict[int, Any] = {}
    for parameter in model.parameters():
        dtype = held if parameter.is_floating_point() else parameter.dtype
        fake = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=parameter.requires_grad)
        vars(fake).update(vars(parameter))
        fakes[id(parameter)] = fake
    for module in model.modules():
        for value in (*module._buffers.values(), *vars(module).values()):
            if isinstance(value, torch.Tensor) and id(value) not in fakes:
                fakes[id(value)] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    # deepcopy takes what the memo holds for a copy that was made already.
    twin = copy.deepcopy(model, fakes)
    return twin.train()
