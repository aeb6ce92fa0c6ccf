"""torch.compile of each repeated block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from eulerforge.errors import reason_of


def compile_blocks(units: Sequence[nn.Module], warn: Callable[[str], None]) -> None:
    """Compile the `forward` of each block; one that cannot be compiled runs as it is, and says so once.

    A block, not the model: blocks of one class share their code, so that compilation takes seconds instead of
    minutes, and whatever cannot be compiled costs one block.

    Args:
        warn: told which class of block could not be compiled and why.
    """
    told: set[str] = set()
    for unit in units:
        _compile(unit, warn, told)


def _compile(unit: nn.Module, warn: Callable[[str], None], told: set[str]) -> None:
    plain: Callable[..., Any] = unit.forward
    chosen: Callable[..., Any] = torch.compile(plain)
    name = type(unit).__name__

    @functools.wraps(plain)
    def compiled(*arguments: Any, **options: Any) -> Any:
        nonlocal chosen
        if chosen is plain:
            return plain(*arguments, **options)
        try:
            return chosen(*arguments, **options)
        except TorchDynamoException as error:  # a model's own errors come through it unchanged
            chosen = plain
            if name not in told:
                told.add(name)
                warn(f"training.compile: {name} cannot be compiled and runs as it is ({reason_of(error)})")
            return plain(*arguments, **options)

    unit.forward = compiled
