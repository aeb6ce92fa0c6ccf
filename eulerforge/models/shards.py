"""Tensors that may be sharded in dimension 0, as FSDP2 cuts them."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be sharded. Every process must call it, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_rows(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last + 1 row of what this process holds; `torch.chunk` cuts, so a shard may have no rows."""
    start, rows = 0, tensor.shape[0] if tensor.ndim else 1
    if not isinstance(tensor, DTensor):
        return start, rows
    for dimension, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            continue
        assert type(placement) is Shard, f"{placement}: only dimension 0 may be sharded"
        assert placement.dim == 0, f"{placement}: only dimension 0 may be sharded"
        chunk = -(-rows // tensor.device_mesh.size(dimension))
        offset = min(tensor.device_mesh.get_local_rank(dimension) * chunk, rows)
        start, rows = start + offset, min(chunk, rows - offset)
    return start, start + rows
