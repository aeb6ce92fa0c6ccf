"""`LaunchPlan`: where and with how many processes a run works, decided once, each decision with its reason.

This version runs one process. `resolve_plan` is pure; what is visible and the environment come in as arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.devices import DeviceChoice, LaunchError, choose_device


@dataclass(frozen=True)
class LaunchPlan:
    """How to start a run."""

    device: DeviceChoice
    world_size: int
    reasons: tuple[str, ...]


def resolve_plan(device: str, gpus: Sequence[str], environment: Mapping[str, str]) -> LaunchPlan:
    """Decide device and world size.

    Args:
        device: the preset's `device`.
        gpus: names of the visible GPUs.
        environment: variables of this process; only torchrun's are looked at.

    Raises:
        LaunchError: the device is not there, or torchrun started several workers.
    """
    world_size = environment.get("WORLD_SIZE", "1")
    if world_size != "1":
        raise LaunchError(
            f"this process is one of {world_size} started by torchrun, but this version trains in one process",
            "start `eulerforge pretrain` without torchrun, or with --nproc_per_node 1",
        )
    choice = choose_device(device, gpus)
    return LaunchPlan(choice, 1, (f"device {choice.device}: {choice.reason}", "world size 1: one process"))
