"""Activation checkpointing: blocks whose activations are computed again in the backward pass instead of being kept.

Chen et al. 2016. Only `forward` of a block is replaced, so that names in the state dict stay what they are.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_blocks(units: Sequence[nn.Module], every: int) -> int:
    """Recompute every N-th block; how many those are.

    Args:
        units: the blocks in the order of the model.
        every: 1 for each of them.
    """
    chosen = units[:: max(every, 1)]
    for unit in chosen:
        _recompute(unit)
    return len(chosen)


def _recompute(unit: nn.Module) -> None:
    forward: Callable[..., Any] = unit.forward
    buffers = _Buffers(unit)

    @functools.wraps(forward)
    def recomputed(*arguments: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **options)
        return checkpoint(forward, *arguments, use_reentrant=False, context_fn=buffers.contexts, **options)

    unit.forward = recomputed


class _Buffers:
    """Buffers that a block changes in its forward pass (running statistics, load balancing of experts).

    The second pass must see them as the first one did, or it computes another thing, and must not change them again.
    """

    def __init__(self, unit: nn.Module) -> None:
        self._unit = unit
        self._changing: set[str] | None = None
        """Names; None before the first pass, in which all are watched."""

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of the first and of the second pass of one call."""
        before: dict[str, torch.Tensor] = {}
        return self._first(before), self._second(before)

    @contextlib.contextmanager
    def _first(self, before: dict[str, torch.Tensor]) -> Iterator[None]:
        watched = {
            name: buffer
            for name, buffer in self._unit.named_buffers()
            if self._changing is None or name in self._changing
        }
        before |= {name: buffer.detach().clone() for name, buffer in watched.items()}
        versions = {name: (id(buffer), buffer._version) for name, buffer in watched.items()}
        yield
        after = dict(self._unit.named_buffers())
        changed = {
            name
            for name, version in versions.items()
            if name not in after or (id(after[name]), after[name]._version) != version
        }
        self._changing = changed | (self._changing or set())
        for name in before.keys() - self._changing:
            del before[name]

    @contextlib.contextmanager
    def _second(self, before: dict[str, torch.Tensor]) -> Iterator[None]:
        kept = {name: self._unit.get_buffer(name) for name in before}
        for name, value in before.items():
            self._put(name, value)
        try:
            yield
        finally:
            for name, buffer in kept.items():
                self._put(name, buffer)

    def _put(self, name: str, buffer: torch.Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        self._unit.get_submodule(owner)._buffers[leaf] = buffer
