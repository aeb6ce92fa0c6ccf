"""Weight files -> (name, tensor) pairs, one tensor in memory at a time.

Reads `model.safetensors` and its sharded form, and the older `pytorch_model.bin` (with `weights_only`, so that no
pickled code runs).
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from eulerforge.errors import ModelError


def read_weights(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of a weight file or of all shards of an index.

    Args:
        path: one of `models.directory.WEIGHT_FILES`.

    Raises:
        ModelError: a shard is missing or a file is damaged.
    """
    for shard in _shards(path):
        try:
            if shard.suffix == ".safetensors":
                with safe_open(shard, framework="pt") as handle:
                    for name in handle.keys():  # noqa: SIM118 (safe_open is not a mapping)
                        yield name, handle.get_tensor(name)
            else:
                yield from _read_pickled(shard)
        except FileNotFoundError:
            raise ModelError(
                f"{path.name} names {shard}, which does not exist", "copy the missing shard into model_dir"
            ) from None
        except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelError(f"{shard}: cannot be read: {reason}", "copy or download the file again") from None


def _read_pickled(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a `.bin` file; anything else that a pickle may hold is refused."""
    advice = "convert the weights to model.safetensors, or copy the file again if it is damaged"
    mapped = zipfile.is_zipfile(path)  # files from before torch 1.6 cannot be mapped
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        raise ModelError(
            f"{path}: cannot be read: it is damaged, or holds pickled Python objects, which could run code",
            advice,
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"{path}: cannot be read: it holds no state dict (tensors by name)", advice)
    yield from state.items()


def _shards(path: Path) -> list[Path]:
    if not path.name.endswith(".index.json"):
        return [path]
    try:
        index = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelError(f"{path}: not a valid weight index: {error}", "copy or download the file again") from None
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(
            f"{path}: not a valid weight index: `weight_map` must give a file name for each weight",
            "copy or download the file again",
        )
    return [path.parent / name for name in sorted(set(names.values()))]
