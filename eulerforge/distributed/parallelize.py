"""How several processes share one model: the `STRATEGIES` table.

| strategy | parameters on each process         | gradients                                     |
|----------|------------------------------------|-----------------------------------------------|
| single   | all                                | its own                                       |
| ddp      | all (DistributedDataParallel)      | averaged after the last micro-batch           |
| fsdp     | its shard (FSDP2 `fully_shard`)    | reduced to the shard after the last one       |

ddp and fsdp average gradients over processes; `train/step.py` scales its loss so that this average is the gradient of
the whole step's token-weighted loss. Adding a strategy is one function and one entry here; the strategy test is
parametrised over the table.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from eulerforge.distributed.context import ProcessContext
from eulerforge.distributed.gradients import anchor_parameters, average_replicated_gradients
from eulerforge.models.lean import materialise, parameter_marks, restore_marks
from eulerforge.models.shards import local_rows
from eulerforge.models.units import find_wrap_units
from eulerforge.precision.plan import PrecisionPlan

COMFORTABLE = 0.6
"""`auto` takes ddp when parameters, gradients and AdamW need at most this share of a device's free memory; the rest
is left to activations."""


@dataclass(frozen=True)
class ParallelModel:
    """A model ready to be trained by several processes.

    Attributes:
        strategy: a key of `STRATEGIES`.
        reason: why it was chosen.
        call: the module to call in the forward pass.
        synchronise: `synchronise(last)` is the context of a micro-batch; gradients meet only in the last one's.
        settle: puts parameters back to where the optimiser finds them, after a forward pass without a backward pass.
    """

    strategy: str
    reason: str
    call: nn.Module
    synchronise: Callable[[bool], AbstractContextManager[Any]]
    settle: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class ParallelOptions:
    """What a strategy needs to know.

    Attributes:
        reason: why it was chosen, for the log.
        replicate: fsdp only: number of replicas, each sharded over world_size / replicate processes (HSDP).
        float32_parameters: names of parameters that stay in float32 whatever the plan computes in.
        float32_modules: paths of modules whose parameters are used in float32 (`amp: selective`).
    """

    context: ProcessContext
    precision: PrecisionPlan
    reason: str
    replicate: int = 1
    float32_parameters: frozenset[str] = frozenset()
    float32_modules: tuple[str, ...] = ()


def choose_strategy(requested: str, world_size: int, state_bytes: int, free_bytes: int | None) -> tuple[str, str]:
    """Resolve `distributed.strategy`.

    Args:
        requested: `auto`, `ddp` or `fsdp`.
        state_bytes: parameters + gradients + optimiser of the whole model.
        free_bytes: free memory of one process's device; None where that cannot be known.

    Returns:
        a key of `STRATEGIES` and the reason, with the arithmetic where it decided.
    """
    if world_size == 1:
        return "single", "one process needs no strategy"
    if requested != "auto":
        return requested, f"distributed.strategy: {requested}"
    if free_bytes is None:
        return "fsdp", "auto: or ddp where the state fits comfortably; memory is not known here"
    need, free = state_bytes / 2**30, free_bytes / 2**30
    fits = state_bytes <= COMFORTABLE * free_bytes
    arithmetic = (
        f"auto: parameters, gradients and AdamW need {need:.3g} GiB, "
        f"{COMFORTABLE:.0%} of the {free:.3g} GiB free per process is {COMFORTABLE * free:.3g} GiB"
    )
    return ("ddp", f"{arithmetic}: it fits") if fits else ("fsdp", f"{arithmetic}: it does not fit")


def _single(model: nn.Module, options: ParallelOptions) -> ParallelModel:
    model.to(options.context.device)
    return ParallelModel("single", options.reason, model, lambda last: contextlib.nullcontext())


def _ddp(model: nn.Module, options: ParallelOptions) -> ParallelModel:
    device = options.context.device
    model.to(device)
    # DDP stops with an error at the second step when a parameter got no gradient on some rank. With every parameter
    # anchored to the output, none is left without one.
    anchor_parameters(model, within=model, without=())
    # The search for unused parameters is not needed then, but with it DDP keeps its first layout of buckets. Without,
    # it makes another after the first step, and with three ranks or more the order of an element's sum depends on the
    # layout: a resumed run, whose first step is a later one, would differ in the last bits.
    wrapped = DistributedDataParallel(
        _Spare(model).to(device),
        device_ids=[device] if device.type == "cuda" else None,
        find_unused_parameters=True,
    )
    return ParallelModel(
        "ddp", options.reason, wrapped, lambda last: contextlib.nullcontext() if last else wrapped.no_sync()
    )


class _Spare(nn.Module):
    """A model and a parameter that is never used: DDP warns at length when its search finds none."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.spare = nn.Parameter(torch.zeros(1))

    def forward(self, *arguments: Any, **values: Any) -> Any:
        return self.model(*arguments, **values)


def _fsdp(model: nn.Module, options: ParallelOptions) -> ParallelModel:
    """Shard a skeleton (parameters on meta, see `models/lean.py`). Values are read by `load_shards`."""
    context, plan = options.context, options.precision
    mesh = _mesh(context, options.replicate)
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, plan.compute) if plan.autocast else None, reduce_dtype=torch.float32
    )
    marks = parameter_marks(model)
    units = find_wrap_units(model)
    # A group of shards has one dtype. Parameters that need another are few and small: each process has them whole.
    whole = {p for name, p in model.named_parameters() if name in options.float32_parameters}
    in_float32 = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    nested = [model.get_submodule(name) for name in options.float32_modules]
    for module in nested:
        fully_shard(module, mesh=mesh, mp_policy=in_float32, ignored_params=whole)
    for unit in units:
        if not any(unit is module for module in nested):
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=whole)
    # The rest (embedding, final norm, head) is one group of the root: tied weights stay one parameter.
    root = fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=whole)
    materialise(model, context.device)
    restore_marks(model, marks)
    replicated = [p for name, p in model.named_parameters() if name in options.float32_parameters and p.requires_grad]
    if _may_skip_parameters(model, units):
        for module in nested:
            anchor_parameters(module, within=module, without=())
        for unit in units:
            anchor_parameters(unit, within=unit, without=nested)
        anchor_parameters(model, within=model, without=units)

    @contextlib.contextmanager
    def synchronise(last: bool) -> Any:
        root.set_requires_gradient_sync(last)
        yield
        if last:
            average_replicated_gradients(replicated, context.world_size)

    # The root stays gathered after a forward pass, because the backward pass would gather it again.
    return ParallelModel("fsdp", options.reason, model, synchronise, root.reshard)


STRATEGIES: Mapping[str, Callable[[nn.Module, ParallelOptions], ParallelModel]] = {
    "single": _single,
    "ddp": _ddp,
    "fsdp": _fsdp,
}


def _mesh(context: ProcessContext, replicate: int) -> DeviceMesh:
    # The mesh names the device: on a machine with GPUs fully_shard would otherwise take those for a CPU run.
    kind = context.device.type
    if replicate == 1:
        return init_device_mesh(kind, (context.world_size,), mesh_dim_names=("shard",))
    shape = (replicate, context.world_size // replicate)
    return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))


def _may_skip_parameters(model: nn.Module, units: Sequence[nn.Module]) -> bool:
    """Whether a rank's forward pass may leave out a parameter that another rank's uses.

    transformers' own dense models use all of theirs each time. Anchoring costs little, but it is a pass over small
    tensors in every unit, so they are spared.
    """
    own_code = any(not type(module).__module__.startswith(("transformers.", "torch.")) for module in model.modules())
    return own_code or any(isinstance(module, nn.ModuleList) for unit in units for module in unit.modules())


def load_shards(model: nn.Module, weights: Path) -> None:
    """Fill a sharded model from a safetensors file: each process reads only its own rows of each tensor.

    Args:
        model: after `fsdp`; its parameters are DTensors, sharded in dimension 0 as `torch.chunk` cuts.
        weights: names are those of the model's `state_dict()`, tied weights under one of their names.
    """
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
    with safe_open(weights, framework="pt") as file:
        names = list(file.keys())
    filled: set[int] = set()
    for name in names:
        target = tensors[name]
        filled.add(id(target))
        # Opened anew for each tensor: the file is memory-mapped, and pages that were read count as this process's
        # memory until it is closed. Kept open, a shard would be there twice.
        with safe_open(weights, framework="pt") as file, torch.no_grad():
            if not isinstance(target, DTensor):
                target.copy_(file.get_tensor(name))
            elif target.to_local().numel():
                start, stop = local_rows(target)
                target.to_local().copy_(file.get_slice(name)[start:stop])
    empty = [name for name, parameter in model.named_parameters() if id(parameter) not in filled]
    assert not empty, f"no values for {empty[:4]}"


def free_memory(device: torch.device, local_processes: int) -> int:
    """Free bytes for one process: of its GPU, or its share of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // local_processes
