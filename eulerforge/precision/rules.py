"""One precision rule per block family.

`torch.fft` has no bfloat16, and on CUDA autocast does not protect it (its float32 list names no FFT op), while on CPU
autocast does: a test on CPU alone proves nothing, so the rule is bound to the block, not to what happens to run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PrecisionRule:
    """What a family needs.

    Attributes:
        needs_float32: the block's compute must be float32; anything else is refused.
        advice: a warning when the block runs below float32, None if that is fine.
    """

    needs_float32: bool
    advice: str | None = None


_FREE = PrecisionRule(needs_float32=False)
_FFT = PrecisionRule(needs_float32=True)

RULES: Mapping[str, PrecisionRule] = {
    "attention": _FREE,
    "moe": _FREE,
    "mamba": PrecisionRule(False, "Mamba blocks are more stable in float32 (dtype: float32, amp: false)"),
    "hyena": _FFT,
    "retnet": _FFT,
    "fft": _FFT,
}
