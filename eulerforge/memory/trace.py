"""One micro-batch of a model on fake tensors: what each block and the rest of the model hold, and when.

    twin ──► forward (blocks of a kind are measured once, by themselves, and stood in for) ──► loss ──► backward

The result is a course of events without the blocks' memory (`Segment`) and the memory of each block (`BlockCost`);
`forecast.py` puts them together for a strategy and for activation checkpointing.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.utils import import_utils

from eulerforge.errors import ModelError
from eulerforge.memory.blocks import BlockCost, Recorder, Segment, first_line
from eulerforge.memory.ledger import Ledger
from eulerforge.memory.twin import fake_twin
from eulerforge.models.forward import CausalForward
from eulerforge.models.units import find_wrap_units

LOSS_CHUNK = 2**24
"""Logits that `train/loss.py` takes to float32 at a time; a test compares it with its `CHUNK_ELEMENTS`."""


@dataclass(frozen=True)
class Pass:
    """What is run.

    Attributes:
        held: dtype of parameters in forward and backward passes.
        compute: dtype of autocast; float32 for none.
    """

    rows: int
    length: int
    held: torch.dtype
    compute: torch.dtype


@dataclass(frozen=True)
class Trace:
    """A micro-batch.

    Attributes:
        units: number of the block of each call.
        costs: of each call.
        logits: bytes of the logits.
        loss: bytes of the loss's chunks in float32.
        rest: bytes kept outside of blocks when the backward pass begins, logits and weights not.
        rest_copies: weights outside of blocks in autocast's dtype.
        notes: what could not be found out.
    """

    units: tuple[int, ...] = ()
    costs: tuple[BlockCost, ...] = ()
    segments: tuple[Segment, ...] = ()
    logits: int = 0
    loss: int = 0
    rest: int = 0
    rest_copies: int = 0
    notes: tuple[str, ...] = ()


class Tracer:
    """Traces of one model, each made once."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._traces: dict[Pass, Trace] = {}

    def trace(self, what: Pass) -> Trace:
        """The trace of a pass."""
        if what not in self._traces:
            self._traces[what] = trace(self._model, what)
        return self._traces[what]


def trace(model: Any, what: Pass) -> Trace:
    """Trace a micro-batch. Never fails: what cannot be traced is in the notes. Random numbers stay as they are."""
    problem = ""
    with _quietly():
        # A block that cannot be traced hides whether its result is a tensor or a tuple.
        for unknown_as_tuple in (False, True):
            try:
                return _trace(model, what, unknown_as_tuple)
            except Exception as error:
                problem = problem or f"{type(error).__name__}: {first_line(error)}"
    return Trace(notes=(f"activations of {type(model).__name__} are unknown ({problem})",))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """No log of operations that fail (it is in the notes), no advice on fake tensors, random numbers put back.

    transformers is not told that tensors are fake either: it would make masks that a training does without, because
    it cannot look into positions.
    """
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level, state = log.level, torch.get_rng_state()
    log.setLevel(logging.CRITICAL + 1)
    try:
        with (
            warnings.catch_warnings(),
            mock.patch.object(import_utils, "is_fake_tensor", lambda tensor: False, create=True),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
        torch.set_rng_state(state)


def _trace(model: Any, what: Pass, unknown_as_tuple: bool) -> Trace:
    with FakeTensorMode(allow_non_fake_inputs=True):
        twin = fake_twin(model, what.held)
        ledger = Ledger([*twin.parameters(), *twin.buffers()])
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda leaf: ledger.settle(leaf.grad))
        recorder = Recorder(ledger, unknown_as_tuple)
        try:
            units = find_wrap_units(twin)
        except ModelError:
            units = []
        for number, unit in enumerate(units):
            recorder.stand_in_for(unit, number)
        with ledger:
            return _run(twin, what, recorder)


def _run(twin: Any, what: Pass, recorder: Recorder) -> Trace:
    # The auxiliary loss is left out: it is a few numbers a token, and transformers collects what it is made of by
    # hooks within blocks, which are not called for blocks that are stood in for.
    for setting, off in (("router_aux_loss_coef", 0.0), ("output_router_logits", False)):
        if hasattr(twin.config, setting):
            setattr(twin.config, setting, off)
    ids = torch.empty((what.rows, what.length), dtype=torch.int64)
    with torch.autocast("cpu", what.compute, enabled=what.compute != torch.float32):
        logits, _ = CausalForward(twin)(ids, None)
    recorder.note("loss", 0)
    account = recorder.account
    size = logits.untyped_storage().nbytes()
    rest, copies = account.live - size - account.copies, account.copies
    _Loss.apply(logits).backward()
    recorder.note("end", 0)
    return Trace(
        units=tuple(recorder.units),
        costs=tuple(recorder.costs),
        segments=tuple(recorder.segments),
        logits=size,
        loss=4 * min(LOSS_CHUNK, logits.numel()) * _chunks_at_a_time(logits),
        rest=rest,
        rest_copies=copies,
        notes=tuple(dict.fromkeys(recorder.notes)),
    )


class _Loss(torch.autograd.Function):
    """The memory of `train/loss.py`: logits kept, chunks in float32 in both passes, a gradient of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits)
        _allocate_chunks(logits)
        return logits.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> torch.Tensor:
        (logits,) = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        _allocate_chunks(logits)
        return gradient


def _allocate_chunks(logits: torch.Tensor) -> None:
    shape = (_chunks_at_a_time(logits), min(LOSS_CHUNK, logits.numel()))
    torch.empty(shape, dtype=torch.float32)


def _chunks_at_a_time(logits: torch.Tensor) -> int:
    """The logits less their maxima, and before it the logits in float32, if they are not."""
    return 1 if logits.dtype == torch.float32 else 2
