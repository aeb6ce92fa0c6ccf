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
                mapped = zipfile.is_zipfile(shard)  # files from before torch 1.6 cannot be mapped
                yield from torch.load(shard, map_location="cpu", weights_only=True, mmap=mapped).items()
        except FileNotFoundError:
            raise ModelError(
                f"{path.name} names {shard}, which does not exist", "copy the missing shard into model_dir"
            ) from None
        except (SafetensorError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelError(f"{shard}: cannot be read: {reason}", "copy or download the file again") from None


def _shards(path: Path) -> list[Path]:
    if not path.name.endswith(".index.json"):
        return [path]
    try:
        names = set(json.loads(path.read_bytes())["weight_map"].values())
        return [path.parent / name for name in sorted(names)]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{path}: not a valid weight index: {error}", "copy or download the file again") from None
