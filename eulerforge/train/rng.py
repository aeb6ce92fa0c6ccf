"""The random number generators of this process: seeded, and their state as tensors, stored without pickle."""

from __future__ import annotations

import math
import random

import numpy as np
import torch


def seed_rng(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (also of its GPUs)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture_rng(device: torch.device) -> dict[str, torch.Tensor]:
    """State of Python's, NumPy's and torch's global generators, and of the GPU's where `device` is one."""
    version, internal, gauss = random.getstate()
    assert version == 3  # of Python's Mersenne Twister since 3.2
    legacy = np.random.get_state(legacy=False)
    assert isinstance(legacy, dict)
    states = {
        "python": torch.tensor(internal, dtype=torch.int64),
        "python_gauss": torch.tensor([math.nan if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor([*legacy["state"]["key"], legacy["state"]["pos"]], dtype=torch.int64),
        "numpy_gauss": torch.tensor([legacy["has_gauss"], legacy["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_rng(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what `capture_rng` took. A checkpoint of a CPU run has no state for a GPU: that one stays as it is."""
    gauss = float(states["python_gauss"])
    random.setstate((3, tuple(states["python"].tolist()), None if math.isnan(gauss) else gauss))
    *key, position = states["numpy"].tolist()
    has_gauss, cached = states["numpy_gauss"].tolist()
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": np.array(key, dtype=np.uint32), "pos": position},
            "has_gauss": int(has_gauss),
            "gauss": cached,
        }
    )
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
