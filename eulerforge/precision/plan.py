"""dtype + amp + block families -> one `PrecisionPlan`, decided once, with the reason for it.

| dtype    | amp             | stored parameters, optimiser | compute            |
|----------|-----------------|------------------------------|--------------------|
| bfloat16 | true (default)  | float32 master weights       | bfloat16 autocast  |
| float32  | false (default) | float32                      | float32            |
| float32  | true            | float32                      | bfloat16 autocast  |

dtype unset: bfloat16, or float32 when the model holds blocks that need it. Names of dtypes are text here, so that
`--validate-only` can plan without importing torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from eulerforge.errors import PresetError
from eulerforge.precision.rules import RULES

DType = Literal["bfloat16", "float32"]


class Block(Protocol):
    """A block family found in the model and the evidence for it (`models.blocks.FoundBlock`)."""

    @property
    def family(self) -> str: ...

    @property
    def evidence(self) -> str: ...


@dataclass(frozen=True)
class PrecisionPlan:
    """How numbers are held.

    Attributes:
        stored: dtype of parameters, gradients and optimiser state.
        compute: dtype of matrix products in the forward and backward pass.
        saved: dtype of the weights in checkpoints and `final/`.
        reason: why, for the log.
        warnings: lines to print before training.
    """

    stored: DType
    compute: DType
    saved: DType
    reason: str
    warnings: tuple[str, ...] = ()

    @property
    def autocast(self) -> bool:
        """Whether the forward pass runs under autocast."""
        return self.compute != self.stored


def plan_precision(
    dtype: str | None, amp: bool | str | None, on_conflict: Literal["error", "warn"], blocks: Sequence[Block]
) -> PrecisionPlan:
    """Resolve the precision of a run.

    Args:
        dtype: `training.dtype`, None if unset.
        amp: `training.amp`, None if unset.
        on_conflict: `training.precision_check`.
        blocks: families found in the model.

    Raises:
        PresetError: the choice would run a block that needs float32 below it.
    """
    strict = [block for block in blocks if RULES[block.family].needs_float32]
    named = "; ".join(f"{block.family} ({block.evidence})" for block in strict)
    if dtype is None and strict:
        chosen: DType = "float32"
        reason = f"dtype unset and the model holds FFT blocks: {named}"
    elif dtype is None and amp is False:
        chosen, reason = "float32", "dtype unset and amp: false"
    elif dtype is None:
        chosen, reason = "bfloat16", "dtype unset and no block needs float32"
    else:
        chosen, reason = ("float32" if dtype == "float32" else "bfloat16"), f"training.dtype: {dtype}"
    autocast = amp is True if amp is not None else chosen == "bfloat16"
    compute: DType = "bfloat16" if autocast else "float32"
    warnings = tuple(
        f"{advice} ({block.evidence})"
        for block in blocks
        if autocast and (advice := RULES[block.family].advice) is not None
    )
    if autocast and strict:
        what = f"dtype {chosen} with amp true runs blocks below float32 that need it: {named}"
        if on_conflict == "error":
            raise PresetError(
                f"training.dtype: {what}",
                "set training.dtype: float32 and training.amp: false "
                "(or training.precision_check: warn if the blocks cast by themselves)",
            )
        warnings = (f"{what} (precision_check: warn)", *warnings)
    if autocast:
        reason += "; float32 master weights, bfloat16 autocast"
    return PrecisionPlan("float32", compute, chosen, reason, warnings)
