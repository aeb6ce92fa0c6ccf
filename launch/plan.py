"""`LaunchPlan`: where and with how many processes a run works, decided once, each decision with its reason.

`resolve_plan` is pure; what is visible and the environment come in as arguments. SLURM_* variables are not looked
at: a process that torchrun started inside a SLURM job belongs to torchrun's world, not to the job's task count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from launch.devices import DeviceChoice, LaunchError, choose_device, listed

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""A process that has all of them is one of torchrun's workers."""


@dataclass(frozen=True)
class LaunchRequest:
    """What the user asked for.

    Attributes:
        device: the preset's `cuda`, `cuda:N` or `cpu`.
        nproc: processes on this machine; None for as many as the device suggests.
        nnodes: machines.
        node_rank: which of them this is.
        rdzv_endpoint: `HOST:PORT` where they meet; HOST is the machine with node rank 0.
    """

    device: str
    nproc: int | None = None
    nnodes: int = 1
    node_rank: int | None = None
    rdzv_endpoint: str | None = None


@dataclass(frozen=True)
class LaunchPlan:
    """How to start a run.

    Attributes:
        mode: train in this process, start torchrun, or train in this process as one of torchrun's workers.
        device: `cpu` or `cuda:N` of this process; `cpu` or `cuda` where torchrun is to be started.
        shown: what the log calls the device.
        world_size: processes on all machines together.
        nproc: processes on this machine.
        nnodes: machines.
        node_rank: which of them this is; None with one.
        rdzv_endpoint: where they meet; None with one.
        backend: gloo or nccl; None for one process.
        reasons: one line per decision.
        warnings: lines to print.
    """

    mode: Literal["here", "torchrun", "worker"]
    device: str
    shown: str
    world_size: int
    nproc: int
    nnodes: int
    node_rank: int | None
    rdzv_endpoint: str | None
    backend: str | None
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]


def resolve_plan(request: LaunchRequest, gpus: Sequence[str], environment: Mapping[str, str]) -> LaunchPlan:
    """Decide mode, device and world size.

    Args:
        request: what the user asked for.
        gpus: names of the visible GPUs.
        environment: variables of this process; only torchrun's are looked at.

    Raises:
        LaunchError: the request contradicts itself or what is there.
    """
    if all(name in environment for name in TORCHRUN_VARIABLES):
        return _worker_plan(request, gpus, environment)
    _check_counts(request)
    _check_nodes(request)
    nproc, device, size_reason = _processes(request, gpus)
    world_size = nproc * request.nnodes
    if world_size == 1:
        reasons = (f"device {device.device}: {device.reason}", "world size 1: one process")
        return LaunchPlan("here", device.device, device.shown, 1, 1, 1, None, None, None, reasons, device.warnings)
    kind = device.device.partition(":")[0]
    backend = _backend(kind, world_size)
    device_reason = device.reason
    if kind == "cuda":
        device_reason = f"one GPU per process, of {listed(gpus)}"
    lines = [f"device {kind}: {device_reason}", f"world size {world_size}: {size_reason}, backend {backend}"]
    if request.nnodes > 1:
        role = "hosts" if request.node_rank == 0 else "joins"
        lines.append(f"node rank {request.node_rank}: {role} the rendezvous at {request.rdzv_endpoint}")
    return LaunchPlan(
        mode="torchrun",
        device=kind,
        shown=kind,
        world_size=world_size,
        nproc=nproc,
        nnodes=request.nnodes,
        node_rank=request.node_rank,
        rdzv_endpoint=request.rdzv_endpoint,
        backend=backend,
        reasons=tuple(lines),
        warnings=device.warnings,
    )


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """`HOST:PORT` (`[::1]:29500` too).

    Raises:
        LaunchError: it is something else.
    """
    host, _, port = endpoint.rpartition(":")
    if host and port.isascii() and port.isdigit() and 1 <= int(port) <= 65535 and "/" not in host:
        return host.strip("[]"), int(port)
    raise LaunchError(
        f"--rdzv-endpoint {endpoint} is not HOST:PORT",
        "give the name or address of the machine with --node-rank 0 and a free port there (1 to 65535), "
        "for example node0:29500",
    )


def _backend(kind: str, world_size: int) -> str | None:
    if world_size == 1:
        return None
    return "nccl" if kind == "cuda" else "gloo"


def _check_counts(request: LaunchRequest) -> None:
    if request.nproc is not None and request.nproc < 1:
        raise LaunchError(f"--nproc {request.nproc} is not a number of processes", "give 1 or more")
    if request.nnodes < 1:
        raise LaunchError(f"--nnodes {request.nnodes} is not a number of machines", "give 1 or more")


def _check_nodes(request: LaunchRequest) -> None:
    if request.nnodes == 1:
        given = [
            f"{flag} {value}"
            for flag, value in (("--node-rank", request.node_rank), ("--rdzv-endpoint", request.rdzv_endpoint))
            if value is not None
        ]
        if given:
            raise LaunchError(
                f"{' and '.join(given)} without --nnodes: one machine needs no meeting point",
                "add --nnodes N for several machines, or leave it out",
            )
        return
    last = request.nnodes - 1
    if request.node_rank is None or not 0 <= request.node_rank <= last:
        shown = "no --node-rank" if request.node_rank is None else f"--node-rank {request.node_rank}"
        raise LaunchError(
            f"--nnodes {request.nnodes} with {shown}",
            f"give each machine its own --node-rank, from 0 to {last}",
        )
    if request.rdzv_endpoint is None:
        raise LaunchError(
            f"--nnodes {request.nnodes} without --rdzv-endpoint",
            "give all machines the same --rdzv-endpoint HOST:PORT, with the machine of --node-rank 0 as HOST",
        )
    split_endpoint(request.rdzv_endpoint)


def _processes(request: LaunchRequest, gpus: Sequence[str]) -> tuple[int, DeviceChoice, str]:
    """Processes on this machine, the device of the first one, and why so many."""
    choice = choose_device(request.device, gpus)
    on_gpu = choice.device != "cpu"
    if on_gpu and request.device != "cuda":
        if request.nproc is not None and request.nproc > 1:
            raise LaunchError(
                f"--nproc {request.nproc} with device: {request.device}, which is one GPU",
                f"use device: cuda for {request.nproc} GPUs, or --nproc 1",
            )
        if request.nnodes > 1:
            # torchrun's workers take the GPU of their local rank.
            raise LaunchError(
                f"--nnodes {request.nnodes} with device: {request.device}, which is one GPU of this machine",
                f"use device: cuda and --nproc 1, with CUDA_VISIBLE_DEVICES={choice.device.removeprefix('cuda:')}",
            )
    nproc = request.nproc
    if nproc is None:
        nproc = len(gpus) if on_gpu and request.device == "cuda" else 1
        why = f"all {nproc} visible GPUs" if nproc > 1 else "one process"
    else:
        if on_gpu and request.device == "cuda" and nproc > len(gpus):
            raise LaunchError(
                f"--nproc {nproc} with device: cuda, but {len(gpus)} visible: {listed(gpus)}",
                f"use --nproc {len(gpus)} or fewer, or make more GPUs visible (CUDA_VISIBLE_DEVICES)",
            )
        why = f"--nproc {nproc} on {choice.device.partition(':')[0]}"
    if request.nnodes > 1:
        why = f"{request.nnodes} nodes, each {why}"
    return nproc, choice, why


def _worker_plan(request: LaunchRequest, gpus: Sequence[str], environment: Mapping[str, str]) -> LaunchPlan:
    """torchrun has decided already; what the request says about sizes was for whoever started torchrun."""
    rank, world_size = _integer(environment, "RANK"), _integer(environment, "WORLD_SIZE")
    local_rank = _integer(environment, "LOCAL_RANK")
    nproc = _integer(environment, "LOCAL_WORLD_SIZE", world_size)
    nnodes = _integer(environment, "GROUP_WORLD_SIZE", max(1, world_size // max(1, nproc)))
    warnings: tuple[str, ...] = ()
    if request.device == "cpu" or not gpus:
        choice = choose_device(request.device, gpus)
        device, shown, reason, warnings = choice.device, choice.shown, choice.reason, choice.warnings
    else:
        if local_rank >= len(gpus):
            raise LaunchError(
                f"torchrun's local rank {local_rank} has no GPU; visible are {listed(gpus)}",
                f"start torchrun with --nproc-per-node {len(gpus)} or fewer, or use device: cpu",
            )
        device, shown = f"cuda:{local_rank}", "cuda"
        reason = f"the GPU of local rank {local_rank} ({gpus[local_rank]})"
        if request.device not in ("cuda", device):
            warnings = (f"device: {request.device} is not used: torchrun's local rank {local_rank} gets {device}.",)
    backend = _backend(device.partition(":")[0], world_size)
    return LaunchPlan(
        mode="worker",
        device=device,
        shown=shown,
        world_size=world_size,
        nproc=nproc,
        nnodes=nnodes,
        node_rank=_integer(environment, "GROUP_RANK", 0) if nnodes > 1 else None,
        rdzv_endpoint=None,
        backend=backend,
        reasons=(
            f"device {device}: {reason}",
            f"world size {world_size}: started by torchrun (RANK={rank}, WORLD_SIZE={world_size}), which decides"
            + (f", backend {backend}" if backend else ""),
        ),
        warnings=warnings,
    )


def _integer(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environment.get(name, "" if default is None else str(default))
    if value.isascii() and value.isdigit():
        return int(value)
    raise LaunchError(
        f"the environment variable {name} is {value!r}, which is not a number",
        f"start with torchrun, or unset {' '.join(TORCHRUN_VARIABLES)}",
    )
