"""A model without its parameters' memory: real buffers, parameters on the meta device.

Sharded ranks build this skeleton, shard it, and read only their own rows from a weight file, so that no rank ever
holds the whole model. `torch.device("meta")` would not do: it would leave the buffers without values too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Within this context every parameter that a module registers is moved to the meta device at once.

    A module's constructor makes a parameter for real and this drops it right after, so the peak is one parameter.
    Marks on the parameter object (`_no_weight_decay`) are kept, and so is sharing (tied weights).
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            marks = dict(vars(parameter))
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
            vars(parameter).update(marks)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def store_parameters(model: nn.Module, dtype: torch.dtype, in_float32: Collection[str]) -> None:
    """Hold floating-point parameters in `dtype`, those named in float32; buffers stay as they are."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if name in in_float32 else dtype)


def parameter_marks(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Attributes that the model's code put on parameter objects, by parameter name; sharding makes new objects."""
    return {name: dict(vars(parameter)) for name, parameter in model.named_parameters() if vars(parameter)}


def restore_marks(model: nn.Module, marks: dict[str, dict[str, Any]]) -> None:
    """Put the marks back after sharding."""
    for name, parameter in model.named_parameters():
        for key, value in marks.get(name, {}).items():
            setattr(parameter, key, value)


def materialise(model: nn.Module, device: torch.device) -> None:
    """Give parameters memory (without values) and move buffers, on `device`."""
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))
