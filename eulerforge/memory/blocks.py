"""Blocks on fake tensors: each kind is measured once, by itself, and all are stood in for in the model's passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from eulerforge.memory.ledger import Account, Ledger


@dataclass(frozen=True)
class BlockCost:
    """Bytes of one block. All are above what was there when its forward pass began.

    Attributes:
        output: its result, which the next block keeps as its input.
        kept: alive from its forward to its backward pass, its result too, weights in autocast's dtype not.
        copies: weights in autocast's dtype that the backward pass needs.
        cached: weights in autocast's dtype that live to the end of the model's forward pass in any case.
        forward: the most during its forward pass.
        backward: the most during its backward pass, its kept activations too, gradients of parameters not.
        backward_in_all: the most during its backward pass, with gradients of parameters.
        gradients: of its parameters.
    """

    output: int
    kept: int
    copies: int
    cached: int
    forward: int
    backward: int
    backward_in_all: int
    gradients: int


@dataclass(frozen=True)
class Segment:
    """The course of events outside of blocks, up to an event.

    Attributes:
        event: what ends it: a block's forward or backward pass, the end of the model's forward pass, or of all.
        call: number of the block's call.
        peak: the most alive in it, gradients of parameters not counted.
        peak_in_all: the most alive in it, with gradients.
        live, gradients: alive at its end.
    """

    event: Literal["forward", "loss", "backward", "end"]
    call: int
    peak: int
    peak_in_all: int
    live: int
    gradients: int


@dataclass
class _Measured:
    cost: BlockCost
    output: _Template


@dataclass
class _Template:
    """A block's result: its structure, and its tensors' shapes."""

    leaves: list[Any]
    spec: Any

    @classmethod
    def of(cls, output: Any) -> _Template:
        leaves, spec = tree_flatten(output)
        shapes = [_Shape.of(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        return cls(shapes, spec)

    def with_tensors(self, attached: Sequence[torch.Tensor]) -> Any:
        """The result with `attached` in place of the tensors that need a gradient, and new ones for the others."""
        remaining = iter(attached)
        leaves = [
            (next(remaining) if leaf.requires_grad else leaf.new()) if isinstance(leaf, _Shape) else leaf
            for leaf in self.leaves
        ]
        return tree_unflatten(leaves, self.spec)

    def attached(self) -> list[_Shape]:
        return [leaf for leaf in self.leaves if isinstance(leaf, _Shape) and leaf.requires_grad]


@dataclass(frozen=True)
class _Shape:
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Shape:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad)

    def new(self) -> torch.Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype)


@dataclass
class Recorder:
    """Measures blocks as they are called, and notes what the rest holds at those moments."""

    ledger: Ledger
    unknown_as_tuple: bool
    units: list[int] = field(default_factory=list)
    costs: list[BlockCost] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _measured: dict[Any, _Measured] = field(default_factory=dict)

    @property
    def account(self) -> Account:
        """Of all that is outside of blocks."""
        return self.ledger.account

    def note(self, event: Literal["forward", "loss", "backward", "end"], call: int) -> None:
        """End a segment."""
        account = self.account
        self.segments.append(Segment(event, call, account.peak, account.peak_in_all, account.live, account.gradients))
        account.mark()

    def stand_in_for(self, unit: nn.Module, number: int) -> None:
        """Let calls of a block cost nothing but what is noted."""
        forward, kind = unit.forward, _kind(unit)

        def stand_in(*arguments: Any, **options: Any) -> Any:
            inputs = tree_flatten((arguments, options))[0]
            shapes = tuple(_Shape.of(leaf) for leaf in inputs if isinstance(leaf, torch.Tensor))
            hidden = _hidden(inputs)
            key = (kind, shapes)
            if key not in self._measured:
                self._measured[key] = self._measure(unit, forward, arguments, options, hidden)
            measured, call = self._measured[key], len(self.units)
            self.units.append(number)
            self.costs.append(measured.cost)
            self.note("forward", call)
            if not hidden.requires_grad:
                hidden = hidden.detach().requires_grad_()
            with self.ledger.charging(Account()):
                attached = _StandIn.apply(hidden, measured.output.attached(), lambda: self._backward(call))
                return measured.output.with_tensors(attached)

        unit.forward = stand_in

    def _backward(self, call: int) -> Any:
        self.note("backward", call)
        return self.ledger.charging(Account())

    def _measure(
        self, unit: nn.Module, forward: Callable[..., Any], arguments: Any, options: Any, hidden: torch.Tensor
    ) -> _Measured:
        leaves, spec = tree_flatten((arguments, options))
        arguments, options = tree_unflatten([_detached(leaf) for leaf in leaves], spec)
        account = Account()
        try:
            with self.ledger.charging(account), torch.enable_grad():
                return _measured(account, lambda: forward(*arguments, **options))
        except Exception as error:
            self.notes.append(
                f"activations of {type(unit).__name__} are unknown ({type(error).__name__}: {first_line(error)})"
            )
            result = _Shape(tuple(hidden.shape), hidden.stride(), hidden.dtype, True)
            _, spec = tree_flatten((0,) if self.unknown_as_tuple else 0)
            return _Measured(_unknown(unit), _Template([result], spec))
        finally:
            for parameter in unit.parameters():
                parameter.grad = None


def _measured(account: Account, forward: Callable[[], Any]) -> _Measured:
    """Run a block forward and backward; what is new goes on `account`."""
    output = forward()
    forward_peak, cached = account.peak, account.copies
    torch.clear_autocast_cache()
    template = _Template.of(output)
    tensors = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    result = tensors[0].untyped_storage().nbytes()
    kept, copies = account.live - account.copies, account.copies
    # A result belongs to whoever uses it, and is gone before this block's backward pass: only its place in the
    # graph is needed.
    edges = [torch.autograd.graph.get_gradient_edge(tensor) for tensor in tensors]
    del output, tensors
    account.mark()
    with torch.autocast("cpu", enabled=False):
        torch.autograd.backward(edges, [shape.new() for shape in template.attached()])
    cost = BlockCost(
        output=result,
        kept=kept,
        copies=copies,
        cached=cached,
        forward=forward_peak,
        backward=account.peak,
        backward_in_all=account.peak_in_all,
        gradients=account.gradients,
    )
    return _Measured(cost, template)


def _unknown(unit: nn.Module) -> BlockCost:
    """The cost of a block of which nothing is known but its parameters."""
    gradients = sum(p.numel() * p.element_size() for p in unit.parameters() if p.requires_grad)
    return BlockCost(0, 0, 0, 0, 0, 0, backward_in_all=gradients, gradients=gradients)


class _StandIn(torch.autograd.Function):
    """In place of a block: keeps its input, as blocks do, and nothing else."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, results: list[_Shape], backward: Callable[[], Any]) -> Any:
        ctx.save_for_backward(hidden)
        ctx.going_back = backward
        return tuple(shape.new() for shape in results)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        (hidden,) = ctx.saved_tensors
        with ctx.going_back():
            return torch.empty_like(hidden), None, None


def _hidden(inputs: Sequence[Any]) -> torch.Tensor:
    """The hidden states among a block's inputs: the first tensor that is differentiated."""
    floating = [leaf for leaf in inputs if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    return next((leaf for leaf in floating if leaf.requires_grad), floating[0])


def _detached(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.detach().requires_grad_(leaf.requires_grad)


def _kind(unit: nn.Module) -> tuple[Any, ...]:
    """The same for blocks that hold the same: class, parameters, and what else tells them apart."""
    tensors = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in unit.named_parameters())
    # Numbers are left out, because a block's own number is among them.
    marks = tuple(
        (name, key, value)
        for name, module in unit.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, str | bool) and not key.startswith("_")
    )
    return (type(unit), repr(unit), tensors, marks)


def first_line(error: Exception) -> str:
    """What an error says, short enough for a note."""
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else "no message"
