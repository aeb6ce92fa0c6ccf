"""dtype + amp + master weights + block families -> one `PrecisionPlan`, decided once, with the reason for each part.

| dtype    | amp             | stored parameters, optimiser     | compute                                      |
|----------|-----------------|----------------------------------|----------------------------------------------|
| bfloat16 | true (default)  | float32 (masters), else bfloat16 | bfloat16 autocast                            |
| bfloat16 | false           | bfloat16                         | bfloat16                                     |
| float16  | true (default)  | float32                          | float16 autocast, scaled loss                |
| float32  | false (default) | float32                          | float32                                      |
| float32  | true            | float32                          | bfloat16 autocast                            |
| float32  | selective       | float32                          | bfloat16 autocast, but FFT blocks in float32 |

dtype unset: bfloat16, or float32 when the model holds blocks that need it (or amp is false or selective). Names of
dtypes are text here, so that `--validate-only` can plan without importing torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from eulerforge.errors import PresetError
from eulerforge.precision.rules import RULES

DType = Literal["bfloat16", "float16", "float32"]
Amp = bool | Literal["selective"]
Masters = bool | Literal["auto"]


class Block(Protocol):
    """A block family found in the model and the evidence for it (`models.blocks.FoundBlock`)."""

    @property
    def family(self) -> str: ...

    @property
    def evidence(self) -> str: ...


@dataclass(frozen=True)
class PrecisionRequest:
    """What the preset says; None is unset.

    Attributes:
        on_conflict: `training.precision_check`.
    """

    dtype: DType | None
    amp: Amp | None
    masters: Masters
    on_conflict: Literal["error", "warn"]


@dataclass(frozen=True)
class PrecisionPlan:
    """How numbers are held.

    Attributes:
        stored: dtype of parameters, gradients and optimiser state.
        compute: dtype of matrix products in the forward and backward pass.
        autocast: whether the forward pass runs under autocast.
        selective: blocks that need float32 run outside of autocast.
        saved: dtype of the weights in checkpoints and `final/`.
        masters: whether `stored` keeps more than `saved`; None until memory is known (`master_weights: auto`).
        reason: why this dtype.
        stored_reason, compute_reason: why these.
        strict: `hyena (evidence)` of each family that needs float32.
        warnings: lines to print before training.
        reduce, loss: dtype in which gradients are summed over processes, and of the cross entropy.
    """

    stored: DType
    compute: DType
    autocast: bool
    selective: bool
    saved: DType
    masters: bool | None
    reason: str
    stored_reason: str
    compute_reason: str
    strict: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    reduce: Literal["float32"] = "float32"
    loss: Literal["float32"] = "float32"

    @property
    def scales_loss(self) -> bool:
        """Whether gradients would underflow in `compute` without a scaled loss."""
        return self.compute == "float16"

    def with_masters(self, masters: bool, why: str) -> PrecisionPlan:
        """The plan with `master_weights: auto` decided.

        Args:
            why: in words, with the arithmetic.
        """
        if self.masters is not None:
            return self
        return _store(self, masters, why)

    def lines(self) -> Iterator[str]:
        """The plan as a small table."""
        rows = [
            ("stored", self.stored, self.stored_reason),
            ("compute", self.compute, self.compute_reason),
            *(("blocks", "float32", text) for text in self.strict if self.selective),
            ("reduce", self.reduce, "gradients are summed over processes in it"),
            ("loss", self.loss, "cross entropy, in chunks of tokens"),
            ("saved", self.saved, "weights in checkpoints and final/"),
        ]
        yield f"Precision: {self.reason}"
        for what, dtype, why in rows:
            yield f"  {what:<8}{dtype:<9} {why}"


def plan_precision(request: PrecisionRequest, blocks: Sequence[Block]) -> PrecisionPlan:
    """Resolve the precision of a run.

    Args:
        blocks: families found in the model.

    Raises:
        PresetError: the choice would run a block that needs float32 below it.
    """
    strict = [block for block in blocks if RULES[block.family].needs_float32]
    named = tuple(f"{block.family} ({block.evidence})" for block in strict)
    dtype, reason = _choose_dtype(request, named)
    if request.masters is False and dtype != "bfloat16":
        raise PresetError(
            f"training.master_weights: false stores weights in bfloat16, but dtype is {dtype} ({reason})",
            "leave master_weights unset",
            see="docs/precision.md",
        )
    autocast = bool(request.amp) if request.amp is not None else dtype != "float32"
    selective = request.amp == "selective"
    compute: DType = dtype
    if autocast:
        compute = "float16" if dtype == "float16" else "bfloat16"
    plan = PrecisionPlan(
        stored="float32",
        compute=compute,
        autocast=autocast,
        selective=selective and bool(strict),
        saved=dtype,
        masters=dtype == "float16",
        reason=reason,
        stored_reason=f"parameters, gradients and optimiser state (dtype: {dtype})",
        compute_reason=_compute_reason(compute, autocast, selective, named),
        strict=named,
        warnings=tuple(
            f"{advice} ({block.evidence})"
            for block in blocks
            if compute != "float32" and (advice := RULES[block.family].advice) is not None
        ),
    )
    if dtype == "bfloat16":
        plan = _plan_masters(plan, request)
    if strict and compute != "float32" and not selective:
        plan = _conflict(plan, request, named)
    return plan


def _choose_dtype(request: PrecisionRequest, named: Sequence[str]) -> tuple[DType, str]:
    if request.dtype is not None:
        return request.dtype, f"training.dtype: {request.dtype}"
    if request.amp == "selective":
        return "float32", "dtype unset and amp: selective"
    if named:
        return "float32", f"dtype unset and the model holds FFT blocks: {'; '.join(named)}"
    if request.amp is False:
        return "float32", "dtype unset and amp: false"
    return "bfloat16", "dtype unset and no block needs float32"


def _compute_reason(compute: DType, autocast: bool, selective: bool, named: Sequence[str]) -> str:
    if not autocast:
        return "no autocast"
    if compute == "float16":
        return "autocast with a scaled loss; steps that overflow are skipped"
    if selective:
        return "autocast, except in the blocks below" if named else "autocast (selective: no block needs float32)"
    return "autocast"


def _plan_masters(plan: PrecisionPlan, request: PrecisionRequest) -> PrecisionPlan:
    if not plan.autocast:
        return _store(plan, False, "amp: false computes in what is stored")
    if request.masters == "auto":
        return replace(plan, masters=None, stored_reason="master weights, if they fit (master_weights: auto)")
    return _store(plan, request.masters, f"master_weights: {str(request.masters).lower()}")


def _store(plan: PrecisionPlan, masters: bool, why: str) -> PrecisionPlan:
    """A plan with dtype bfloat16, with or without master weights."""
    if masters:
        reason = f"master weights and optimiser state ({why})"
        return replace(plan, masters=True, stored="float32", stored_reason=reason)
    reason = f"no master weights: updates with stochastic rounding ({why})"
    return replace(plan, masters=False, stored="bfloat16", stored_reason=reason)


def _conflict(plan: PrecisionPlan, request: PrecisionRequest, named: Sequence[str]) -> PrecisionPlan:
    amp = "selective" if plan.selective else str(plan.autocast).lower()
    what = f"dtype {plan.saved} with amp {amp} runs blocks below float32 that need it: {'; '.join(named)}"
    if request.on_conflict == "error":
        raise PresetError(
            f"training.dtype: {what}",
            "set training.dtype: float32 and training.amp: false, or amp: selective for bfloat16 in all other blocks "
            "(or training.precision_check: warn if the blocks cast by themselves)",
            see="docs/precision.md",
        )
    return replace(plan, warnings=(f"{what} (precision_check: warn)", *plan.warnings))
