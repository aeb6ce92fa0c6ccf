"""Whether this processor computes in bfloat16, or only imitates it (slower than float32)."""

from __future__ import annotations

import os
import re
from pathlib import Path

ALLOW_VARIABLE = "EULERFORGE_ALLOW_SLOW_BF16"
"""Set to 1 to run bfloat16 on any processor, for example to look at its numbers."""

_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Flags of x86 and ARM processors in /proc/cpuinfo."""


def computes_in_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor has bfloat16 instructions; True where that cannot be told."""
    if os.environ.get(ALLOW_VARIABLE) == "1":
        return True
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        return True
    found = re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.M)
    return not found or bool(_INSTRUCTIONS & set(found[0].split()))
