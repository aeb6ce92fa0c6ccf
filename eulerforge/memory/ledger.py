"""Bytes that are alive at a time, counted on fake tensors: every storage from its first operation to its end.

Fake tensors (`torch._subclasses.fake_tensor`) have shapes and storages but no memory. What autograd keeps for the
backward pass, what a block needs while it runs and what is left after it are then found as they are in training: by
running forward and backward, and looking at which storages live.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eulerforge.memory.routing import Routing


@dataclass
class Account:
    """Bytes of the storages that were made on one account.

    Attributes:
        live: alive now, gradients of parameters not counted.
        copies: those of `live` that are parameters in another dtype (autocast's).
        gradients: gradients of parameters.
        peak: the most of `live` since `mark()`.
        peak_in_all: the most of `live` and `gradients` together since `mark()`.
    """

    live: int = 0
    copies: int = 0
    gradients: int = 0
    peak: int = 0
    peak_in_all: int = 0

    def mark(self) -> None:
        """Begin to look for peaks anew."""
        self.peak, self.peak_in_all = self.live, self.live + self.gradients

    def change(self, live: int = 0, copies: int = 0, gradients: int = 0) -> None:
        """Add to the numbers."""
        self.live += live
        self.copies += copies
        self.gradients += gradients
        self.peak = max(self.peak, self.live)
        self.peak_in_all = max(self.peak_in_all, self.live + self.gradients)


@dataclass
class _Entry:
    account: Account
    bytes: int
    is_copy: bool
    is_gradient: bool
    reference: Any


class Ledger(TorchDispatchMode):
    """Enter it within a `FakeTensorMode`.

    Args:
        known: tensors whose memory is counted elsewhere: parameters and buffers.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._routing = Routing()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._entries: dict[int, _Entry] = {}
        self.account = Account()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self._routing.call(func, args, kwargs or {})
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self._note(value, func, args)
        return result

    @contextlib.contextmanager
    def charging(self, account: Account) -> Iterator[Account]:
        """Storages that are made in this context go on `account`."""
        before, self.account = self.account, account
        try:
            yield account
        finally:
            self.account = before

    def settle(self, gradient: torch.Tensor) -> None:
        """This tensor has become the gradient of a parameter."""
        entry = self._entries.get(gradient.untyped_storage()._cdata)
        if entry is not None and not entry.is_gradient:
            entry.is_gradient = True
            entry.account.change(live=-entry.bytes, gradients=entry.bytes)

    def _note(self, tensor: torch.Tensor, func: Any, args: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._entries or key in self._known:
            return
        is_copy = (
            func is torch.ops.aten._to_copy.default
            and isinstance(args[0], torch.Tensor)
            and args[0].untyped_storage()._cdata in self._known
        )
        reference = weakref.ref(storage, lambda _: self._forget(key))
        size = storage.nbytes()
        self._entries[key] = _Entry(self.account, size, is_copy, False, reference)
        self.account.change(live=size, copies=size * is_copy)

    def _forget(self, key: int) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        if entry.is_gradient:
            entry.account.change(gradients=-entry.bytes)
        else:
            entry.account.change(live=-entry.bytes, copies=-entry.bytes * entry.is_copy)
