"""Learning rates as pure functions of the optimiser step: nothing to save, nothing to get out of step.

Step k counts from 1 to max_steps, and its learning rate is the one *used* by step k. All schedules share the warm-up
(`k / warmup_steps`, so step `warmup_steps` runs at the peak); after it each maps the progress p in (0, 1] of the
remaining steps to a factor, with p = 1 at the last step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

DECAY_FRACTION = 0.2
"""Share of the steps after warm-up in which `wsd` decays (Hägele et al. 2024, "Scaling laws and compute-optimal
training beyond fixed training durations", find 10 to 20 % enough)."""


def _cosine(progress: float, floor: float) -> float:
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def _linear(progress: float, floor: float) -> float:
    return floor + (1 - floor) * (1 - progress)


def _constant(progress: float, floor: float) -> float:
    return 1.0


def _warmup_stable_decay(progress: float, floor: float) -> float:
    return _linear(max(0.0, progress - (1 - DECAY_FRACTION)) / DECAY_FRACTION, floor)


SCHEDULES: Mapping[str, Callable[[float, float], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "wsd": _warmup_stable_decay,
}


def learning_rate(
    step: int, *, peak: float, schedule: str, warmup_steps: int, max_steps: int, min_lr_ratio: float
) -> float:
    """The learning rate of one step.

    Args:
        step: 1 to max_steps.
        peak: `training.lr`.
        schedule: a key of `SCHEDULES`.
        min_lr_ratio: factor at the last step (ignored by `constant`).
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / (max_steps - warmup_steps)
    return peak * SCHEDULES[schedule](progress, min_lr_ratio)
