"""What a resume needs beyond the saved model, in the folder `trainer_state` of a checkpoint.

    state.json              step, tokens, seconds, world size, fingerprint: see `state.Progress`
    shards/*.safetensors    optimiser state, and float32 masters where the model is saved in less, by
                            torch.distributed.checkpoint: each process writes its part, any number can read it
    rank-00000.safetensors  random number generators of that process, and buffers that its model changed

JSON and safetensors only: nothing here is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from eulerforge.errors import PeerFailedError, ResumeError
from eulerforge.train.manifest import STATE_FOLDER

# One process needs no process group; torch says so each time.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

MASTERS = "model."
_SHARDS = "shards"
_FILE_BYTES = 2**30
"""Shard files are cut at this size, because a file is serialised in memory."""

Tensors = dict[str, torch.Tensor]


def shared_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, masters: bool) -> Tensors:
    """Optimiser state (and masters) by parameter name, whole or sharded as the model is. Not copies.

    An optimiser that has not stepped yet gets its state first, so that there is something to load into.
    """
    states: Any = get_optimizer_state_dict(model, optimizer)["state"]
    tensors = {
        f"optimizer.{name}.{key}": value
        for name, state in states.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }
    return tensors | (master_tensors(model) if masters else {})


def master_tensors(model: nn.Module) -> Tensors:
    """Parameters under their names in the shards. Not copies."""
    return {f"{MASTERS}{name}": parameter.detach() for name, parameter in model.named_parameters()}


def write_shared(checkpoint: Path, tensors: Tensors, group: dist.ProcessGroup | None) -> None:
    """Write this process's part of the shards. All processes of `group` must call it.

    Raises:
        PeerFailedError: another process failed; where this one did, its own error is raised.
    """
    folder = checkpoint / STATE_FOLDER / _SHARDS
    writer = HuggingFaceStorageWriter(str(folder), _files_by_size(tensors), save_distributed=True)
    with _own_failure(group):
        save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)


def read_shared(checkpoint: Path, tensors: Tensors, group: dist.ProcessGroup | None, kind: str = "") -> None:
    """Fill tensors from the shards, whatever number of processes wrote them. All processes must call it.

    Args:
        tensors: all that the shards hold ...
        kind: ... under names that begin so.

    Raises:
        ResumeError: names or shapes are not those of the checkpoint.
    """
    reader = HuggingFaceStorageReader(str(checkpoint / STATE_FOLDER / _SHARDS))
    entries = reader.read_metadata().state_dict_metadata
    stored = {
        name: tuple(entry.size)
        for name, entry in entries.items()
        if name.startswith(kind) and isinstance(entry, TensorStorageMetadata)
    }
    needed = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if stored != needed:
        odd = sorted(name for name in {*stored, *needed} if stored.get(name) != needed.get(name))
        shown = ", ".join(f"{name} {stored.get(name, 'missing')} -> {needed.get(name, 'gone')}" for name in odd[:3])
        raise ResumeError(
            f"{checkpoint}: the optimiser state does not fit the model: {len(odd)} entries differ: {shown}",
            "resume with the model that the run began with",
        )
    with _own_failure(group):
        load(dict(tensors), storage_reader=reader, process_group=group, no_dist=group is None)


@contextlib.contextmanager
def _own_failure(group: dist.ProcessGroup | None) -> Iterator[None]:
    """torch.distributed.checkpoint raises the failures of all processes together, and not as an `Exception`."""
    try:
        yield
    except CheckpointException as error:
        failure = error.failures.get(0 if group is None else dist.get_rank(group))
        if failure is None:
            raise PeerFailedError(
                "another process could not do its part of a checkpoint", "see its message"
            ) from error
        raise failure[0] from error


def _files_by_size(tensors: Tensors) -> dict[str, int]:
    """Tensor -> number of its file, from 1."""
    numbers, number, size = {}, 1, 0
    for name, tensor in tensors.items():
        size += tensor.numel() * tensor.element_size()
        if size > _FILE_BYTES:
            number, size = number + 1, tensor.numel() * tensor.element_size()
        numbers[name] = number
    return numbers


def rank_file(checkpoint: Path, rank: int) -> Path:
    """Where a process keeps what is its own."""
    return checkpoint / STATE_FOLDER / f"rank-{rank:05d}.safetensors"


def write_own(checkpoint: Path, rank: int, rng: Tensors, buffers: Tensors) -> Path:
    """Write this process's own file."""
    path = rank_file(checkpoint, rank)
    tensors = {f"rng.{name}": value for name, value in rng.items()}
    tensors |= {f"buffer.{name}": value for name, value in buffers.items()}
    save_file(tensors, path)
    return path


def read_own(checkpoint: Path, rank: int) -> tuple[Tensors, Tensors]:
    """Random number generators and buffers of a process."""
    rng: Tensors = {}
    buffers: Tensors = {}
    with safe_open(rank_file(checkpoint, rank), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
            kind, _, rest = name.partition(".")
            (rng if kind == "rng" else buffers)[rest] = file.get_tensor(name)
    return rng, buffers


class BufferWatch:
    """Which buffers training has changed (running statistics, load balancing, counters).

    Those are not computed anew from the config, and each process has its own; persistent ones are in the saved model
    too, but as rank 0 has them.

    Args:
        model: as built, before training.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._digests = {name: _digest(buffer) for name, buffer in model.named_buffers()}
        self._restored: set[str] = set()

    def changed(self) -> Tensors:
        """Copies of the buffers that differ from when the watch began, or that were restored."""
        return {
            name: buffer.detach().to("cpu", copy=True).contiguous()
            for name, buffer in self._model.named_buffers()
            if name in self._restored or _digest(buffer) != self._digests.get(name)
        }

    def restore(self, buffers: Tensors) -> None:
        """Put values back: in place, or as new buffers where a forward pass had made or enlarged them."""
        own = dict(self._model.named_buffers())
        for name, value in buffers.items():
            if name in own and own[name].shape == value.shape:
                own[name].copy_(value)
            else:
                owner, _, leaf = name.rpartition(".")
                module = self._model.get_submodule(owner)
                persistent = name in own and leaf not in module._non_persistent_buffers_set
                device = next(self._model.parameters(), value).device
                module.register_buffer(leaf, value.to(device), persistent=persistent)
        self._restored |= buffers.keys()


def _digest(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if not flat.numel():
        return b""
    return hashlib.sha256(memoryview(flat.view(torch.uint8).numpy())).digest()  # type: ignore[arg-type]
