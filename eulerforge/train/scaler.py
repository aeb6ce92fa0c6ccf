"""The factor that keeps small gradients from underflowing in float16 (Micikevicius et al. 2018).

torch's GradScaler decides on each process by itself whether a step overflowed; here the decision is the global
gradient norm, which all processes have anyway, whole or sharded.
"""

from __future__ import annotations

from dataclasses import dataclass

from eulerforge.errors import TrainingError

START, GROWTH_STEPS, SMALLEST = 2.0**16, 2000, 1.0
"""As torch's GradScaler begins and grows; below the smallest, scaling does not help."""


@dataclass
class LossScale:
    """State of the scaling, kept in checkpoints.

    Attributes:
        value: what the loss is multiplied with, a power of two, so that scaling rounds nothing.
        good_steps: steps without overflow since the value last changed.
    """

    value: float = START
    good_steps: int = 0

    def grow(self) -> None:
        """A step was good; after many of them try a larger factor."""
        self.good_steps += 1
        if self.good_steps == GROWTH_STEPS:
            self.value, self.good_steps = self.value * 2, 0

    def shrink(self, step: int) -> None:
        """A step overflowed.

        Raises:
            TrainingError: the value was at its smallest.
        """
        self.value, self.good_steps = self.value / 2, 0
        if self.value < SMALLEST:
            raise TrainingError(
                f"step {step}: loss or gradients overflow in float16 whatever the loss scale; earlier checkpoints "
                "are kept",
                "lower training.lr or lengthen training.warmup_steps, or use dtype: bfloat16 or float32",
                see="docs/precision.md",
            )
