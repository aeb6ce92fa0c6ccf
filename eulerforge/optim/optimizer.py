"""The optimiser of a run, with decay only where it belongs, and the global gradient norm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from eulerforge.errors import ModelError
from eulerforge.models.build import embedding_tables
from eulerforge.models.units import find_wrap_units
from eulerforge.optim.adamw import LeanAdamW
from eulerforge.optim.layout import local_part
from eulerforge.optim.muon import MuonWithAdamW

Kind = Literal["adamw", "adamw8bit", "muon"]


def build_optimizer(
    model: nn.Module,
    *,
    kind: Kind,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    seed: int,
) -> torch.optim.Optimizer:
    """The optimiser over all trainable parameters, each float32 or bfloat16. The memory is in `LeanAdamW`'s table.

    No decay on parameters with fewer than two dimensions (norms, biases, gates) and on parameters that the model
    marks with `_no_weight_decay = True` (the convention of Mamba's code, for example for `A_log`).

    Args:
        model: as it will be trained, sharded if it is going to be.
        kind: `adamw`: moments in the parameter's dtype (torch's own AdamW if all parameters are float32);
            `adamw8bit`: moments in 8 bits; `muon`: Muon on `muon_matrices`, `adamw` on the rest.
        seed: of the random numbers that round to bfloat16.

    Raises:
        ModelError: muon, and the model has no blocks or no matrices in them.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps}
    if kind == "muon":
        chosen = {id(parameter) for parameter in muon_matrices(model)}
        matrices = [parameter for parameter in trained if id(parameter) in chosen]
        rest = [parameter for parameter in trained if id(parameter) not in chosen]
        groups = [group | {"algorithm": "muon"} for group in _decay_groups(matrices, weight_decay)]
        groups += [group | {"algorithm": "adamw"} for group in _decay_groups(rest, weight_decay)]
        return MuonWithAdamW(groups, **settings, weight_decay=weight_decay, seed=seed)
    groups = _decay_groups(trained, weight_decay)
    if kind == "adamw" and all(parameter.dtype == torch.float32 for parameter in trained):
        return torch.optim.AdamW(_unmixed(groups), **settings, fused=True)
    bits: Literal[8] | None = 8 if kind == "adamw8bit" else None
    return LeanAdamW(groups, **settings, weight_decay=weight_decay, seed=seed, bits=bits)


def _decay_groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameters that decay and those that do not; no empty groups."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for parameter in parameters:
        (free if parameter.ndim < 2 or _is_marked(parameter) else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _unmixed(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups in which all parameters are sharded or none is: torch's fused AdamW refuses a mixture.

    `LeanAdamW` does not, and must not be given these: its random numbers depend on the order of parameters, which has
    to be the same for a whole and a sharded model.
    """
    return [
        group | {"params": alike}
        for group in groups
        for kind in (True, False)
        if (alike := [parameter for parameter in group["params"] if isinstance(parameter, DTensor) is kind])
    ]


def _is_marked(parameter: nn.Parameter) -> bool:
    return bool(getattr(parameter, "_no_weight_decay", False))


def muon_matrices(model: Any) -> list[nn.Parameter]:
    """Weights of linear layers in the model's repeated blocks: 2-dimensional, neither embedding nor head, not marked.

    Muon is for matrices that map one hidden space to another. Embeddings and heads are tables of vectors and do worse
    with it (Keller Jordan 2024); experts that are stacked in one 3-dimensional parameter are left to AdamW too.

    Raises:
        ModelError: there are none.
    """
    tables = {id(table.weight) for table in embedding_tables(model) if table is not None}
    found: dict[int, Any] = {
        id(layer.weight): layer.weight
        for block in _blocks(model)
        for layer in block.modules()
        if isinstance(layer, nn.Linear | Conv1D) and layer.weight.ndim == 2 and layer.weight.requires_grad
    }
    matrices = [weight for key, weight in found.items() if key not in tables and not _is_marked(weight)]
    if not matrices:
        raise ModelError(
            f"{type(model).__name__}: the optimiser muon found no linear layers in its blocks", "use adamw instead"
        )
    return matrices


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The wrap units. `fully_shard` renames their classes, but then they are what it was applied to."""
    sharded: list[nn.Module] = [
        module for module in model.modules() if isinstance(module, FSDPModule) and module is not model
    ]
    if sharded:
        return sharded
    try:
        return find_wrap_units(model)
    except ModelError as error:
        raise ModelError(
            f"{type(model).__name__}: the optimiser muon found no repeated blocks",
            "name the block class in the model's `_no_split_modules`, or use adamw instead",
        ) from error


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` for the next step, in all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> torch.Tensor:
    """Scale all gradients down to a global L2 norm of `max_norm`; the norm before clipping, as a float32 scalar.

    Every process of a sharded run must call this; all get the same norm, and clip with it.

    Args:
        max_norm: None measures only.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    norm = global_norm([parameter.grad for parameter in with_gradient if parameter.grad is not None])
    if max_norm is not None:
        # One call for each kind: torch refuses plain and sharded tensors in one.
        for kind in (True, False):
            alike = [parameter for parameter in with_gradient if isinstance(parameter.grad, DTensor) is kind]
            torch.nn.utils.clip_grads_with_norm_(alike, max_norm, norm)
    return norm


def global_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """L2 norm over all elements of all gradients, whole or sharded or some of each, as a float32 scalar.

    Summed in float64: a float32 sum over half a million elements is off by some 1e-5, another amount for each way of
    cutting them into shards.
    """
    by_groups: dict[tuple[dist.ProcessGroup, ...], list[torch.Tensor]] = {}
    for gradient in gradients:
        by_groups.setdefault(_shard_groups(gradient), []).append(_squares(gradient))
    totals = []
    for groups, squares in by_groups.items():
        total = torch.stack(squares).sum()
        for group in groups:
            dist.all_reduce(total, group=group)
        totals.append(total)
    return torch.stack(totals).sum().sqrt().float()


def _shard_groups(gradient: torch.Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The processes among which its elements are divided, by mesh dimension; none for a whole gradient."""
    if not isinstance(gradient, DTensor):
        return ()
    return tuple(
        gradient.device_mesh.get_group(dimension)
        for dimension, placement in enumerate(gradient.placements)
        if placement.is_shard()
    )


def _squares(gradient: torch.Tensor) -> torch.Tensor:
    """Sum of squares of the elements that this process holds, in float64."""
    return torch.linalg.vector_norm(local_part(gradient), dtype=torch.float64).square()
