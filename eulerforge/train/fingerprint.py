"""What a run is made of, so that a resume can say what has changed.

`fixed` must stay: with another tokenizer, corpus, model, seed or global batch the run would be a different one, and
its loss curve would lie. `settings` are the preset's values; they may change, and each change is said.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from eulerforge.config.schema import PretrainPreset
from eulerforge.data.manifest import TokenCache
from eulerforge.errors import Problem, ResumeError
from eulerforge.models.directory import ModelDirectory
from eulerforge.models.tokenizer import Tokenizer
from eulerforge.train.state import Progress

_CONFIG = "model config."
_CODE = "model code "
_NOT_THE_MODEL = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Keys of config.json that do not change what is computed."""

_FIXED_SETTINGS = ("training.seed", "data.max_length", "data.packing", "data.shuffle", "data.document_mask")
_SHAPING_SETTINGS = (
    "training.lr",
    "training.scheduler",
    "training.warmup_steps",
    "training.min_lr_ratio",
    "training.max_steps",
    "training.weight_decay",
    "training.betas",
    "training.eps",
    "training.max_grad_norm",
    "training.dtype",
    "training.amp",
)
"""Settings that change the course of training from here on: a warning."""

_PLACES = ("model_dir", "tokenizer", "output_dir", "data.path", "data.cache_dir")
"""Paths say nothing by themselves: contents are compared."""


def preset_settings(preset: PretrainPreset) -> dict[str, Any]:
    """The preset's values by dotted key, without paths."""
    values = dict(_flatten(preset.model_dump(mode="json"), ""))
    return {key: value for key, value in values.items() if not key.startswith(_PLACES)}


def _flatten(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def fixed_by_input(
    directory: ModelDirectory, tokenizer: Tokenizer, preset: PretrainPreset, rows_per_step: int
) -> dict[str, Any]:
    """What must not change and is known before the model is loaded."""
    settings = preset_settings(preset)
    config = {
        f"{_CONFIG}{key}": _finite(value) for key, value in directory.config.items() if key not in _NOT_THE_MODEL
    }
    code = {f"{_CODE}{name}": _hash((directory.path / name).read_bytes()) for name in sorted(directory.code)}
    return {
        **config,
        **code,
        "tokenizer": f"{tokenizer.vocab_size} ids, content {tokenizer.fingerprint[:16]}",
        **{key: settings[key] for key in _FIXED_SETTINGS},
        "rows per step": rows_per_step,
    }


def fixed_by_data(
    caches: Sequence[TokenCache], weights: Sequence[Fraction], held_out: Sequence[int]
) -> dict[str, Any]:
    """What must not change about the corpus: its tokens, wherever its files lie now, and those not trained on.

    Args:
        caches: of each source of a mixture, one for any other corpus.
        weights: of the sources.
        held_out: documents of each source that are kept for validation.
    """
    contents = [
        f"{cache.stream.tokens:,} tokens in {cache.stream.documents:,} documents, content {cache.digest[:16]}"
        for cache in caches
    ]
    if len(contents) > 1:
        total = sum(weights)
        shares = [f"{weight / total} of {content}" for weight, content in zip(weights, contents, strict=True)]
        contents = ["; ".join(shares)]
    return {"data": contents[0], "held-out documents of the data": ", ".join(map(str, held_out))}


def require_unchanged(progress: Progress, current: Mapping[str, Any], checkpoint: str) -> list[str]:
    """Compare the names of `current` with the checkpoint.

    Returns:
        warnings about changes that are allowed (the model's code).

    Raises:
        ResumeError: with each difference named.
    """
    problems, warnings = [], []
    for name in sorted({*current, *_names_like(progress.fixed, current)}):
        if progress.fixed.get(name) == current.get(name):
            continue
        before, now = _shown(progress.fixed, name), _shown(current, name)
        if name.startswith(_CODE):
            warnings.append(f"{name.removeprefix(_CODE)} of the model's code is not as it was at {checkpoint}")
        else:
            problems.append(
                Problem(f"--resume: {name} is {now}, but {before} in {checkpoint}", _advice(name, before))
            )
    if problems:
        raise ResumeError.of(problems)
    return warnings


def _names_like(stored: Mapping[str, Any], current: Mapping[str, Any]) -> Iterator[str]:
    """Stored names of the groups that `current` covers: a key that has gone is a difference too."""
    if any(name.startswith(_CONFIG) for name in current):
        yield from (name for name in stored if name.startswith((_CONFIG, _CODE)))


def _shown(values: Mapping[str, Any], name: str) -> str:
    """A value as the preset or config.json would have it: `true`, `null`, not Python's words."""
    if name not in values:
        return "not set"
    value = values[name]
    return value if isinstance(value, str) else json.dumps(value)


def _advice(name: str, before: str) -> str:
    if name == "rows per step":
        return (
            f"keep batch_size x grad_accum_steps x processes = {before}; "
            f"training.global_batch_size: {before} keeps it on any number of processes"
        )
    if name in _FIXED_SETTINGS:
        return f"set {name} back to {before}, or start a new run"
    if name == "held-out documents of the data":
        return f"set data.validation so that {before} documents are held out again, or start a new run"
    if name == "data":
        return "give the corpus that the run began with, or start a new run with model_dir: <the checkpoint>"
    if name == "tokenizer":
        return "give the tokenizer that the run began with"
    return "give the model that the run began with, or start a new run with model_dir: <the checkpoint>"


def setting_changes(progress: Progress, preset: PretrainPreset) -> tuple[list[str], list[str]]:
    """Settings that are not as in the checkpoint, as `key old -> new`: those that only matter to the run's
    keeping, and those that change the course of training."""
    now = preset_settings(preset)
    changed = {
        key: f"{key} {_shown(progress.settings, key)} -> {_shown(now, key)}"
        for key in sorted({*progress.settings, *now})
        if progress.settings.get(key) != now.get(key)
    }
    plain = [text for key, text in changed.items() if key not in _SHAPING_SETTINGS]
    return plain, [text for key, text in changed.items() if key in _SHAPING_SETTINGS]


def _finite(value: Any) -> Any:
    """A value of config.json as strict JSON can hold it (transformers writes Infinity), and equal to itself."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list):
        return [_finite(element) for element in value]
    if isinstance(value, dict):
        return {key: _finite(element) for key, element in value.items()}
    return value


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
