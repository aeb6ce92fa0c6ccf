"""Training hints that EulerStack writes into config.json (`lr_peak`, `betas`, ...).

They are always shown beside the preset's values and used only under `training.use_model_hints: true`, and then only
for keys that the preset leaves unset.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from eulerforge.config.load import LoadedPreset
from eulerforge.config.schema import PretrainPreset
from eulerforge.errors import PresetError

_HINTS: Mapping[str, str] = {
    "lr_peak": "lr",
    "betas": "betas",
    "grad_clip": "max_grad_norm",
    "lr_floor_ratio": "min_lr_ratio",
    "weight_decay": "weight_decay",
}
"""config.json key -> key below `training`."""

_MARKERS = ("lr_peak", "grad_clip", "lr_floor_ratio")
"""Keys that only a config with training hints has; `betas` or `weight_decay` alone may mean something else."""


@dataclass(frozen=True)
class Hint:
    """One hint: `model_key` in config.json says `value`; the preset's `training.<key>` says `current`."""

    model_key: str
    key: str
    value: Any
    current: Any
    applied: bool

    def line(self) -> str:
        """The hint for the log."""
        verdict = f"applied to training.{self.key}" if self.applied else f"training.{self.key} is {self.current}"
        return f"Model hint {self.model_key}={self.value}: {verdict}"


def apply_hints(loaded: LoadedPreset, config: Mapping[str, Any]) -> tuple[PretrainPreset, tuple[Hint, ...]]:
    """The preset with hints applied (if asked for), and all hints found.

    Raises:
        PresetError: `use_model_hints` is on and a hint cannot be honoured.
    """
    preset = loaded.preset
    if not any(key in config for key in _MARKERS):
        return preset, ()
    wanted = preset.training.use_model_hints
    hints = tuple(
        Hint(
            model_key,
            key,
            config[model_key],
            getattr(preset.training, key),
            applied=wanted and f"training.{key}" not in loaded.given,
        )
        for model_key, key in _HINTS.items()
        if config.get(model_key) is not None
    )
    if not wanted:
        return preset, hints
    _refuse_unsupported(config)
    values = preset.model_dump()
    values["training"] |= {hint.key: hint.value for hint in hints if hint.applied}
    try:
        return PretrainPreset.model_validate(values), hints
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][:2])
        reason = first.get("ctx", {}).get("error", first["msg"])
        raise PresetError(
            f"training.use_model_hints: config.json gives a bad value for {place}: {reason}",
            f"set {place} in the preset, or use_model_hints: false",
        ) from None


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    optimizer = config.get("optimizer")
    if optimizer not in (None, "adamw"):
        raise PresetError(
            f"training.use_model_hints: config.json asks for optimizer {optimizer!r}; this version has adamw only",
            "set training.use_model_hints: false and choose the values in the preset",
        )
    multiplier = config.get("router_lr_multiplier")
    if multiplier not in (None, 1, 1.0):
        raise PresetError(
            f"training.use_model_hints: config.json asks for router_lr_multiplier {multiplier}, "
            "which this version cannot honour",
            "set training.use_model_hints: false",
        )
