"""The course of a step: what is alive at each of its moments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from eulerforge.memory.blocks import BlockCost, Segment
from eulerforge.memory.trace import Trace

_REDUCED = torch.float32.itemsize
"""Gradients are reduced in float32, whatever they are computed in (`distributed/parallelize.py`)."""


@dataclass(frozen=True)
class Sharding:
    """FSDP's part.

    Attributes:
        gathered: bytes of unsharded parameters at a time.
        units: elements of each block.
        rest: elements outside of blocks.
        shards: processes that share a parameter.
        width: bytes of an element of a gradient's shard.
    """

    gathered: int
    units: tuple[int, ...]
    rest: int
    shards: int
    width: int


@dataclass
class Course:
    """Forward and backward pass of a micro-batch.

    Attributes:
        recomputed: whether each call's block is recomputed.
        fixed: bytes of what stays: parameters, optimiser state, buffers.
        gradients: bytes of gradients that earlier micro-batches left; 0 if this is the first.
        logits_before: bytes of logits of the micro-batch before, which live until the new ones are there.
        sharding: FSDP's part, None without it.
    """

    trace: Trace
    recomputed: Sequence[bool]
    fixed: int
    gradients: int
    logits_before: int
    sharding: Sharding | None

    def moments(self) -> Iterator[tuple[int, str]]:
        """(bytes, moment in words) of all moments that may be the peak."""
        held, backward = _Held(), False
        base = self.fixed + self.gradients + (0 if self.sharding is None else self.sharding.gathered)
        for segment in self.trace.segments:
            beside = base + held.kept + held.copies + held.gradients + (0 if backward else self.logits_before)
            yield beside + self._peak(segment), "in the backward pass" if backward else "around the loss"
            if segment.event == "forward":
                cost = self.trace.costs[segment.call]
                yield beside + segment.live + cost.forward, f"in the forward pass of block {self._unit(segment)}"
                held.go_forward(cost, self.recomputed[segment.call])
            elif segment.event == "loss":
                held.copies, backward = held.needed, True
            elif segment.event == "backward":
                yield from self._block_backward(segment, base, held)
        if self.sharding is not None:
            last = self.trace.segments[-1].gradients if self.trace.segments else 0
            yield base + held.gradients + last + _REDUCED * self.sharding.rest, "in the reduction of gradients"

    def _block_backward(self, segment: Segment, base: int, held: _Held) -> Iterator[tuple[int, str]]:
        cost, again = self.trace.costs[segment.call], self.recomputed[segment.call]
        held.go_back(cost, again)
        there = base + held.kept + held.copies + held.gradients + segment.live
        there += 0 if self.gradients else segment.gradients
        need = cost.backward if self.gradients else cost.backward_in_all
        if again:  # beside the gradient of its result
            need = max(need, cost.forward + cost.output)
        yield there + need, f"in the backward pass of block {self._unit(segment)}"
        if self.sharding is None:
            held.gradients += 0 if self.gradients else cost.gradients
            return
        elements = self.sharding.units[self._unit(segment)]
        shard = -(-elements // self.sharding.shards)
        yield there + cost.gradients + (elements + shard) * _REDUCED, "in the reduction of gradients"
        held.gradients += 0 if self.gradients else shard * self.sharding.width

    def _peak(self, segment: Segment) -> int:
        return segment.peak if self.gradients else segment.peak_in_all

    def _unit(self, segment: Segment) -> int:
        return self.trace.units[segment.call]


@dataclass
class _Held:
    """Bytes that blocks hold.

    Attributes:
        kept: activations.
        copies: weights in autocast's dtype.
        needed: those of them that the backward pass needs.
        gradients: of the parameters of blocks that are through.
    """

    kept: int = 0
    copies: int = 0
    needed: int = 0
    gradients: int = 0

    def go_forward(self, cost: BlockCost, recomputed: bool) -> None:
        self.kept += cost.output if recomputed else cost.kept
        # Autocast's copies live to the end of the forward pass, also where the backward pass makes them anew.
        self.copies += cost.cached
        self.needed += 0 if recomputed else cost.copies

    def go_back(self, cost: BlockCost, recomputed: bool) -> None:
        self.kept -= cost.output if recomputed else cost.kept
        self.copies -= 0 if recomputed else cost.copies
