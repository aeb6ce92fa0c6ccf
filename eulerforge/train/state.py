"""How far a run has come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TrainState:
    """Progress of a run, the only thing the loop changes besides weights and optimiser.

    Attributes:
        step: finished optimiser steps.
        tokens: tokens trained on (padding not counted), over all ranks.
        stopped: the run ended early because a process was asked to stop.
    """

    step: int = 0
    tokens: int = 0
    stopped: bool = False

    def advance(self, tokens: int) -> None:
        """One more step is done."""
        self.step += 1
        self.tokens += tokens
