"""Does a training fit into memory? Asked before the model is loaded, and looked at again after the second step."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch

from eulerforge.config.schema import PretrainPreset
from eulerforge.errors import InputError, PresetError, reason_of
from eulerforge.memory.advice import fitting_settings
from eulerforge.memory.forecast import Forecast, Workload, forecast
from eulerforge.memory.peak import PeakMemory
from eulerforge.memory.trace import Tracer
from eulerforge.metrics.console import Console
from eulerforge.metrics.meters import binary_size
from eulerforge.precision.plan import PrecisionPlan


@dataclass(frozen=True)
class Settled:
    """What rank 0 decides for all.

    Attributes:
        masters: of `master_weights: auto`.
        why: in words.
        forecast: bytes, 0 if unknown.
    """

    masters: bool
    why: str
    forecast: int

    def text(self) -> str:
        """For the other processes."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Settled:
        """From rank 0."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Budget:
    """A model on its devices.

    Attributes:
        model: a skeleton will do.
        strategy: as chosen.
        accumulation: micro-batches of a step.
        free: bytes that one process may use; None where that cannot be known.
    """

    model: Any
    preset: PretrainPreset
    strategy: str
    world_size: int
    accumulation: int
    device: torch.device
    free: int | None

    def settle(self, plan: PrecisionPlan, console: Console) -> Settled:
        """Decide `master_weights: auto`, and refuse what cannot fit.

        Raises:
            PresetError: it does not fit, with three settings that would.
        """
        try:
            tracer = Tracer(self.model)
            fits, why = True, ""
            if plan.masters is None and self.free is None:
                why = "auto: if they fit, which cannot be known here"
            elif plan.masters is None and self.free is not None:
                needed = forecast(self.model, self._workload(plan), tracer).total
                fits = needed <= self.free
                numbers = f"auto: with them {binary_size(needed)} of {binary_size(self.free)} free per process"
                why = f"{numbers}: it {'fits' if fits else 'does not fit'}"
            workload = self._workload(plan.with_masters(fits, why))
            estimate = forecast(self.model, workload, tracer)
        except InputError:  # muon, and nothing for it to do
            raise
        except Exception as error:  # a model that training can run, and fake tensors cannot
            console.warn(f"no memory forecast for this model: {type(error).__name__}: {reason_of(error)}")
            return Settled(True, "auto: memory is not known", 0)
        console.say(_summary(estimate, self.free))
        if self.free is not None and estimate.total > self.free:
            self._refuse(workload, estimate.total, self.free, tracer, console)
        return Settled(fits, why, estimate.total)

    def _workload(self, plan: PrecisionPlan) -> Workload:
        training, distributed = self.preset.training, self.preset.distributed
        return Workload(
            rows=training.batch_size,
            length=self.preset.data.max_length,
            stored=getattr(torch, plan.stored),
            compute=getattr(torch, plan.compute),
            optimizer=training.optimizer,
            checkpoint_every=int(training.activation_checkpointing),
            strategy=self.strategy,  # type: ignore[arg-type]
            world_size=self.world_size,
            replicate=distributed.replicate,
            accumulation=self.accumulation,
            device=self.device.type,  # type: ignore[arg-type]
        )

    def _refuse(self, workload: Workload, needed: int, free: int, tracer: Tracer, console: Console) -> None:
        what = f"this training needs about {binary_size(needed)} per process, and {binary_size(free)} is free"
        advice = fitting_settings(self.model, workload, free, tracer)
        ways = "; or ".join(
            f"{' and '.join(way.settings)} ({binary_size(way.total)}{'' if way.fits else ', still too much'})"
            for way in advice
        )
        if self.preset.training.memory_check == "warn":
            console.warn(f"{what} (memory_check: warn); smaller: {ways}")
            return
        raise PresetError(
            f"training: {what}",
            f"set {ways} (or training.memory_check: warn to try it all the same)",
            see="docs/precision.md",
        )


def _summary(estimate: Forecast, free: int | None) -> str:
    parts = {
        "parameters": estimate.parameters,
        "gradients": estimate.gradients,
        "optimiser": estimate.optimizer,
        "activations": estimate.activations,
        "logits": estimate.logits,
        "copies": estimate.compute_copies,
        "gathered": estimate.gathered,
    }
    listed = ", ".join(f"{what} {binary_size(size)}" for what, size in parts.items() if size)
    notes = "".join(f"; not counted: {note}" for note in estimate.notes)
    return (
        f"Memory forecast: {binary_size(estimate.total)} per process at the peak {estimate.moment}, "
        f"{'memory here not known' if free is None else f'{binary_size(free)} free'} ({listed}{notes})"
    )


@dataclass(frozen=True)
class MemoryWatch:
    """The forecast and the truth.

    Attributes:
        forecast: bytes.
        peak: marked before the model was loaded.
    """

    forecast: int
    peak: PeakMemory

    def line(self) -> str:
        """The comparison, for the log."""
        measured = self.peak.bytes()
        if not self.forecast:
            return f"Memory after two steps: {binary_size(measured or 0)} at the peak"
        if measured is None:
            return f"Memory after two steps: this system does not tell (forecast {binary_size(self.forecast)})"
        return (
            f"Memory after two steps: {binary_size(measured)} at the peak, forecast {binary_size(self.forecast)} "
            f"(x {self.forecast / max(measured, 1):.2f})"
        )
