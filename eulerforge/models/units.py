"""Wrap units: the modules that are sharded, gathered and recomputed as one.

A unit is a repeated block of the model. It is never a single expert: experts are used by some ranks and not by
others, and a unit that one rank gathers and another does not pairs up wrong collectives (gradients of one expert land
in another, without an error).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from eulerforge.errors import ModelError

_MIN_SHARE = 0.2
"""A list of blocks counts if it holds this share of the parameters of the largest one."""


def find_wrap_units(model: Any) -> list[nn.Module]:
    """The wrap units of any model: `_no_split_modules` if it names some, else its repeated blocks.

    Repeated blocks are the elements of outermost `ModuleList`s (several classes are fine). Lists of experts and lists
    inside a block are not looked at.

    Raises:
        ModelError: nothing found. One giant unit would keep the whole model gathered and defeat sharding.
    """
    named = _no_split_names(model)
    units = list(_outermost(model, lambda module, _: type(module).__name__ in named)) if named else []
    if not units:
        lists = list(_outermost(model, lambda module, name: _is_block_list(module, name)))
        sizes = [sum(parameter.numel() for parameter in blocks.parameters()) for blocks in lists]
        units = [
            block
            for blocks, size in zip(lists, sizes, strict=True)
            if size and size >= _MIN_SHARE * max(sizes)
            for block in blocks.children()
        ]
    if not units:
        raise ModelError(
            f"{type(model).__name__}: no repeated blocks found to shard",
            "name the block class in the model's `_no_split_modules`, or use distributed.strategy: ddp",
        )
    return units


def _no_split_names(model: Any) -> set[str]:
    """Names from the model and all its parts: a head model often leaves them to its base model."""
    names: set[str] = set()
    for module in model.modules():
        value: Iterable[str] = getattr(module, "_no_split_modules", None) or ()
        names.update(value)
    return names


def _is_block_list(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) > 0 and "expert" not in name.lower()


def _outermost(model: nn.Module, wanted: Any, name: str = "") -> Iterator[nn.Module]:
    """Modules below `model` that satisfy `wanted(module, name)`, without looking inside those."""
    for child_name, child in model.named_children():
        path = f"{name}.{child_name}" if name else child_name
        if "expert" in child_name.lower():
            continue
        if wanted(child, path):
            yield child
        else:
            yield from _outermost(child, wanted, path)
