"""How much memory one training process will need, before anything of it is allocated.

    what stays: parameters, optimiser, buffers, gradients ─┐
    `trace.py`: one micro-batch on fake tensors ───────────┴─► course of a step ─► its peak, with the moment

On CUDA the total is what torch's allocator has handed out at the peak (`torch.cuda.max_memory_allocated`); the
context and what the allocator keeps in reserve come on top. On CPU it is resident memory, see `_overhead`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from eulerforge.errors import ModelError
from eulerforge.memory.blocks import BlockCost
from eulerforge.memory.course import Course, Sharding
from eulerforge.memory.trace import Pass, Tracer
from eulerforge.models.units import find_wrap_units
from eulerforge.optim.adamw import SMALLEST_IN_8_BITS
from eulerforge.optim.blockwise import BLOCK
from eulerforge.optim.layout import TILE
from eulerforge.optim.optimizer import muon_matrices

RUNTIME = 20 * 2**20
"""Threads, kernels and their scratch memory, in a process that has imported torch but not yet used it."""
HEAP_SHARE = 0.2
HEAP_SHARE_OF_CHANGING = 1.5
_TILE_TENSORS = 7
"""Float32 tensors of a tile that an optimiser of those has at a time."""


@dataclass(frozen=True)
class Workload:
    """What is trained, and how.

    Attributes:
        rows: of a micro-batch.
        length: tokens of a row.
        stored: dtype of parameters, gradients and optimiser state: float32, or bfloat16 (no master weights).
        compute: float32, or bfloat16 or float16 under autocast.
        optimizer: adamw: two moments in `stored`; adamw8bit: two of a byte, with float32 scales; muon: one moment in
            `stored` for the matrices of blocks, two for the rest.
        checkpoint_every: blocks are recomputed: 0 none, 1 each, N every N-th.
        world_size: processes.
        replicate: HSDP replicas, each sharded over world_size / replicate processes.
        accumulation: micro-batches of a step. From the second on, gradients are there from the beginning.
        device: whose memory.
    """

    rows: int
    length: int
    stored: torch.dtype = torch.float32
    compute: torch.dtype = torch.float32
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    checkpoint_every: int = 0
    strategy: Literal["single", "ddp", "fsdp"] = "single"
    world_size: int = 1
    replicate: int = 1
    accumulation: int = 1
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def shards(self) -> int:
        """Processes that hold a parameter together."""
        return self.world_size // self.replicate if self.strategy == "fsdp" else 1

    @property
    def held(self) -> torch.dtype:
        """Dtype of parameters in forward and backward passes: FSDP gathers them in `compute`."""
        mixed = self.strategy == "fsdp" and self.compute != torch.float32
        return self.compute if mixed else self.stored


@dataclass(frozen=True)
class Forecast:
    """Bytes of one process (the one with the largest shard).

    Not all of them are there at the same time: gradients come while activations go. `total` is the peak of a step.

    Attributes:
        gradients: of all micro-batches; FSDP keeps them unsharded in float32 between micro-batches.
        compute_copies: weights in autocast's dtype, and DDP's buckets, which are a second copy of all gradients.
        activations: kept for the backward pass, with those of one block that is being recomputed.
        logits: the logits, their gradient and the loss's float32 chunk.
        gathered: fsdp: two blocks (the next one is gathered ahead) and what is outside of blocks, in `compute`.
        temporaries: the most that a block needs while it runs, above what it keeps.
        overhead: of the allocator and of libraries.
        total: the most at one time.
        moment: when that is.
        notes: what is not in the numbers.
    """

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    compute_copies: int
    activations: int
    logits: int
    gathered: int
    temporaries: int
    overhead: int
    total: int
    moment: str
    notes: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """A small table."""
        parts = {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimiser state": self.optimizer,
            "buffers": self.buffers,
            "copies of weights and gradients": self.compute_copies,
            "gathered from other processes": self.gathered,
            "activations": self.activations,
            "logits and loss": self.logits,
            "temporaries of a block": self.temporaries,
            "allocator and libraries": self.overhead,
        }
        for what, size in parts.items():
            if size:
                yield f"{what:<34}{size / 2**20:>10,.1f} MiB"
        yield f"{'not there at the same time':<34}{(self.total - sum(parts.values())) / 2**20:>10,.1f} MiB"
        yield f"{'peak ' + self.moment:<34}{self.total / 2**20:>10,.1f} MiB"
        yield from (f"  not counted: {note}" for note in self.notes)


def forecast(model: Any, workload: Workload, tracer: Tracer | None = None) -> Forecast:
    """The memory of one process that trains `model`.

    Args:
        model: a causal LM of transformers, whose parameters may be on meta. It stays as it is.
        tracer: of the same model, to trace once what several forecasts have in common.
    """
    what = Pass(workload.rows, workload.length, workload.held, workload.compute)
    traced = (tracer or Tracer(model)).trace(what)
    units, notes = _units(model)
    state = _State.of(model, units, workload)
    checkpointed = [
        bool(workload.checkpoint_every) and unit % workload.checkpoint_every == 0 for unit in traced.units
    ]
    several = workload.accumulation > 1
    course = Course(
        traced,
        checkpointed,
        fixed=state.parameters + state.optimizer + state.buffers + state.buckets,
        gradients=state.gradients if several else 0,
        logits_before=traced.logits if several else 0,
        sharding=state.sharding,
    )
    update = course.fixed + state.gradients + state.update_scratch
    peak = max([*course.moments(), (update, "in the optimiser's update")])
    recomputed = [cost.kept for cost, again in zip(traced.costs, checkpointed, strict=True) if again]
    gathered = 0 if state.sharding is None else state.sharding.gathered
    overhead = _overhead(workload, peak[0], max(recomputed, default=0), gathered)
    kept = [cost.output if again else cost.kept for cost, again in zip(traced.costs, checkpointed, strict=True)]
    return Forecast(
        parameters=state.parameters,
        gradients=state.gradients,
        optimizer=state.optimizer,
        buffers=state.buffers,
        compute_copies=sum(cost.cached for cost in traced.costs) + traced.rest_copies + state.buckets,
        activations=sum(kept) + max(recomputed, default=0) + traced.rest,
        logits=2 * traced.logits + traced.loss,
        gathered=gathered,
        temporaries=max(map(_temporaries, traced.costs), default=0),
        overhead=overhead,
        total=peak[0] + overhead,
        moment=peak[1],
        notes=(*notes, *traced.notes),
    )


def _overhead(workload: Workload, peak: int, recomputed: int, gathered: int) -> int:
    """Bytes beside tensors that count as resident.

    On CPU, glibc gives memory back to the system only from the end of its heap, where tensors of up to 32 MiB lie.
    What comes and goes many times in a step (recomputed blocks, gathered parameters) does not fit into the gaps that
    others left, and leaves gaps itself. Shares are fitted to the Llama models of `benchmarks/memory_forecast.py`.
    With MALLOC_MMAP_THRESHOLD_=1048576 in the environment, which makes a step slower by a third, measured peaks are
    30 to 90 MiB above the tensors.

    Args:
        peak: bytes of tensors at the peak.
        recomputed: bytes that the largest recomputed block keeps.
        gathered: bytes of other processes' parameters.
    """
    if workload.device == "cuda":
        return 0
    return RUNTIME + round(HEAP_SHARE * peak + HEAP_SHARE_OF_CHANGING * (recomputed + gathered))


def _temporaries(cost: BlockCost) -> int:
    return max(cost.forward, cost.backward) - cost.kept - cost.copies


def _units(model: Any) -> tuple[list[nn.Module], tuple[str, ...]]:
    try:
        return find_wrap_units(model), ()
    except ModelError:
        return [], ("no blocks were found: activation checkpointing and sharding by blocks",)


def rows_of(rows: int, shards: int, rank: int) -> int:
    """Rows of dimension 0 that a process holds: FSDP2 cuts as `torch.chunk` does."""
    chunk = -(-rows // shards)
    return max(0, min(chunk, rows - rank * chunk))


def local_elements(shape: Sequence[int], shards: int, rank: int = 0) -> int:
    """Elements of a parameter that a process holds; rank 0 has no fewer than any other."""
    rows = shape[0] if shape else 1
    return rows_of(rows, shards, rank) * math.prod(shape[1:])


@dataclass(frozen=True)
class _State:
    """Bytes of what is there in all of a step."""

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    buckets: int
    update_scratch: int
    sharding: Sharding | None

    @classmethod
    def of(cls, model: Any, units: Sequence[nn.Module], workload: Workload) -> _State:
        parameters = list(model.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        shards, width = workload.shards, workload.stored.itemsize

        def size(chosen: Sequence[nn.Parameter]) -> int:
            return sum(local_elements(p.shape, shards) * _width(p, workload.stored) for p in chosen)

        gradients = size(trained)
        if workload.strategy == "fsdp" and workload.accumulation > 1:
            gradients += sum(parameter.numel() for parameter in trained) * torch.float32.itemsize
        matrices = set(map(id, muon_matrices(model))) if workload.optimizer == "muon" else set()
        return cls(
            parameters=size(parameters),
            gradients=gradients,
            optimizer=sum(_moments(p, shards, width, workload.optimizer, id(p) in matrices) for p in trained),
            buffers=_buffers(model),
            buckets=size(trained) if workload.strategy == "ddp" else 0,
            update_scratch=_update_scratch(trained, workload, matrices),
            sharding=_sharding(parameters, units, workload) if workload.strategy == "fsdp" else None,
        )


def _width(parameter: torch.Tensor, dtype: torch.dtype) -> int:
    return dtype.itemsize if parameter.is_floating_point() else parameter.element_size()


def _buffers(model: Any) -> int:
    storages = {buffer.untyped_storage()._cdata: buffer.untyped_storage().nbytes() for buffer in model.buffers()}
    return sum(storages.values())


def _moments(parameter: nn.Parameter, shards: int, width: int, optimizer: str, is_matrix: bool) -> int:
    """Bytes of a parameter's optimiser state; step counters are left out."""
    elements = local_elements(parameter.shape, shards)
    if is_matrix:
        return elements * width
    if optimizer != "adamw8bit" or parameter.ndim < 2 or parameter.numel() < SMALLEST_IN_8_BITS:
        return 2 * elements * width
    scales = rows_of(parameter.shape[0], shards, 0) * -(-math.prod(parameter.shape[1:]) // BLOCK)
    return 2 * (elements + scales * torch.float32.itemsize)


def _update_scratch(trained: Sequence[nn.Parameter], workload: Workload, matrices: set[int]) -> int:
    """The most that the optimiser needs for a while. torch's fused AdamW needs nothing."""
    if workload.optimizer == "adamw" and workload.stored == torch.float32:
        return 0
    largest = max((parameter.numel() for parameter in trained), default=0)
    tile = _TILE_TENSORS * torch.float32.itemsize * min(TILE, largest)
    # Muon's iterations: the direction, two matrices of its shape, and two products with itself.
    turns = [3 * p.numel() + 2 * min(p.shape) ** 2 for p in trained if id(p) in matrices]
    return max([tile, *(elements * torch.float32.itemsize for elements in turns)])


def _sharding(parameters: Sequence[nn.Parameter], units: Sequence[nn.Module], workload: Workload) -> Sharding:
    width = workload.held.itemsize
    in_units = [sum(parameter.numel() for parameter in unit.parameters()) for unit in units]
    inside = {id(parameter) for unit in units for parameter in unit.parameters()}
    rest = sum(parameter.numel() for parameter in parameters if id(parameter) not in inside)
    return Sharding(
        gathered=width * (rest + sum(sorted(in_units)[-2:])),
        units=tuple(in_units),
        rest=rest,
        shards=workload.shards,
        width=workload.stored.itemsize,
    )
