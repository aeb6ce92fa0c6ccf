"""Blocks that stay in float32 while the rest of the model runs under autocast (`amp: selective`)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


class Float32Region:
    """Runs a module's `forward` outside of autocast: float32 goes in, and what comes out is as from a linear layer.

    The module keeps its place, its name and its parameters; only its `forward` is another. Outside of autocast (a
    saved model has none of this, and evaluation by others may not use it) it is the module's own.

    Attributes:
        observer: sees the operators inside, for the audit of the first step.
    """

    def __init__(self, module: nn.Module, device_type: str, compute: torch.dtype) -> None:
        self._forward: Callable[..., Any] = module.forward
        self._device_type = device_type
        self._compute = compute
        self.observer: TorchDispatchMode | None = None

        @functools.wraps(self._forward)
        def forward(*arguments: Any, **options: Any) -> Any:
            return self(*arguments, **options)

        # A compiled block calls it as it is: inductor has no code for complex numbers.
        module.forward = torch.compiler.disable(forward)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """The module's output, from float32 inputs, in the dtype of the computation around."""
        if not torch.is_autocast_enabled(self._device_type):
            return self._forward(*arguments, **options)
        arguments, options = _cast((arguments, options), (torch.bfloat16, torch.float16), torch.float32)
        observer = contextlib.nullcontext() if self.observer is None else self.observer
        with torch.autocast(self._device_type, enabled=False), observer:
            output = self._forward(*arguments, **options)
        return _cast(output, (torch.float32,), self._compute)


def _cast(tree: Any, dtypes: tuple[torch.dtype, ...], target: torch.dtype) -> Any:
    def cast(value: Any) -> Any:
        return value.to(target) if isinstance(value, torch.Tensor) and value.dtype in dtypes else value

    return tree_map(cast, tree)
