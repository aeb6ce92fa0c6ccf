"""Settings that would make a training fit into memory, tried on forecasts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

import torch

from eulerforge.memory.forecast import Workload, forecast
from eulerforge.memory.trace import Tracer

_SHOWN = 3
_SHORTEST = 256
"""Tokens of the shortest row that is proposed."""


@dataclass(frozen=True)
class Advice:
    """Settings to change together.

    Attributes:
        settings: lines of a preset, `training.batch_size: 1`.
        workload: what they make of the training.
        total: forecast bytes of a process.
        fits: whether that is no more than what is free.
    """

    settings: tuple[str, ...]
    workload: Workload
    total: int
    fits: bool


@dataclass(frozen=True)
class _Change:
    """A setting with another value.

    Attributes:
        setting: its line of the preset.
        fields: what it makes of a workload.
    """

    setting: str
    fields: dict[str, Any]


def fitting_settings(
    model: Any, workload: Workload, free_bytes: int, tracer: Tracer | None = None
) -> tuple[Advice, ...]:
    """Three ways to need less memory: those that fit first, of them those that change least.

    Args:
        tracer: of the same model; the one that the forecast of `workload` was made with saves time.
    """
    tracer = tracer or Tracer(model)

    def advice(changes: Sequence[_Change]) -> Advice:
        changed = workload
        for change in changes:
            changed = replace(changed, **change.fields)
        total = forecast(model, changed, tracer).total
        return Advice(tuple(change.setting for change in changes), changed, total, total <= free_bytes)

    choices = _choices(workload)
    found: list[Advice] = []
    rejected: list[Advice] = []
    for count in range(1, len(choices) + 1):
        for chosen in combinations(choices, count):
            tried = []
            for changes in product(*chosen):
                tried.append(advice(changes))
                if tried[-1].fits:
                    break
            (found if tried[-1].fits else rejected).append(tried[-1])
        # Combinations of more are looked at only where fewer do not help.
        if len(found) >= _SHOWN:
            break
    return tuple([*found, *sorted(rejected, key=lambda advice: advice.total)][:_SHOWN])


def _choices(workload: Workload) -> list[tuple[_Change, ...]]:
    """For each setting that can save memory, its values; what changes the training least comes first."""
    choices: list[tuple[_Change, ...]] = []
    if workload.world_size > 1 and workload.strategy != "fsdp":
        choices.append((_Change("distributed.strategy: fsdp", {"strategy": "fsdp"}),))
    if workload.checkpoint_every != 1:
        choices.append((_Change("training.activation_checkpointing: true", {"checkpoint_every": 1}),))
    choices.append(
        tuple(_Change(f"training.batch_size: {rows}", {"rows": rows}) for rows in _halves(workload.rows, 1))
    )
    if workload.optimizer == "adamw":
        choices.append((_Change("training.optimizer: adamw8bit", {"optimizer": "adamw8bit"}),))
    if workload.stored == torch.float32 and workload.compute == torch.bfloat16:
        choices.append((_Change("training.master_weights: false", {"stored": torch.bfloat16}),))
    lengths = _halves(workload.length, _SHORTEST)
    choices.append(tuple(_Change(f"data.max_length: {length}", {"length": length}) for length in lengths))
    return [choice for choice in choices if choice]


def _halves(value: int, least: int) -> Iterator[int]:
    while (value := value // 2) >= least:
        yield value
