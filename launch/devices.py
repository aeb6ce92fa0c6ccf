"""What `device: cuda | cuda:N | cpu` means on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class LaunchError(Exception):
    """The run cannot be started as asked.

    Attributes:
        fix: what the user should change.
    """

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.fix = fix


@dataclass(frozen=True)
class DeviceChoice:
    """A resolved device of one process.

    Attributes:
        device: `cpu` or `cuda:N`.
        shown: what the log calls it.
        reason: why.
        warnings: lines to print.
    """

    device: str
    shown: str
    reason: str
    warnings: tuple[str, ...] = ()


def visible_gpus() -> tuple[str, ...]:
    """Names of the CUDA devices that this process sees, by index. Imports torch."""
    import torch

    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def listed(gpus: Sequence[str]) -> str:
    """`cuda:0 (A100), cuda:1 (H100)`."""
    return ", ".join(f"cuda:{number} ({name})" for number, name in enumerate(gpus))


def choose_device(request: str, gpus: Sequence[str]) -> DeviceChoice:
    """Resolve the preset's `device` for one process. `cuda` is the first GPU.

    Args:
        request: `cuda`, `cuda:N` or `cpu`.
        gpus: names of the visible GPUs.

    Raises:
        LaunchError: `cuda:N` names a GPU that is not there although others are.
    """
    if request == "cpu":
        return DeviceChoice("cpu", "cpu", "device: cpu")
    if not gpus:
        warning = f"device: {request} asked for, but no GPU is visible. Training on CPU."
        return DeviceChoice("cpu", "cpu", "no GPU visible", (warning,))
    if request == "cuda":
        return DeviceChoice("cuda:0", "cuda", f"cuda:0 ({gpus[0]})")
    index = int(request.removeprefix("cuda:"))
    if index >= len(gpus):
        raise LaunchError(
            f"device: {request} is not visible; visible are {listed(gpus)}", "choose one of those, or cpu"
        )
    return DeviceChoice(f"cuda:{index}", f"cuda:{index}", f"device: {request} ({gpus[index]})")
