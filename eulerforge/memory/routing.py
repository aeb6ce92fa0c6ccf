"""Answers to questions that fake tensors cannot answer: how many elements of a mask are true, what a number is.

A mixture of experts asks them in every forward pass (`torch.where(chosen == expert)`, `if mask.any()`). The answer is
that of balanced routing: what was chosen among n entries is each of them equally often. A mask of which nothing is
known counts as all true, which is the most memory that it can lead to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils.weak import WeakTensorKeyDictionary

_aten = torch.ops.aten
_CHOOSING = {_aten.topk.default: 1, _aten.argmax.default: None, _aten.sort.default: 1, _aten.sort.stable: 1}
"""Operations that choose entries of a dimension, with the place of the indices in the result (None: the result)."""
_EQUAL = {_aten.eq.Scalar, _aten.eq.Tensor}
_COUNTING = {
    _aten.sum.default,
    _aten.sum.dim_IntList,
    _aten.nonzero.default,
    *(getattr(operation, name) for operation in (_aten.any, _aten.all) for name in operation.overloads()),
}
"""Operations whose results say something else of their elements than their arguments did."""
_SCATTERING = {_aten.scatter.value, _aten.scatter_.value, _aten.scatter.src, _aten.scatter_.src}
_PUTTING = {_aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}


@dataclass(frozen=True)
class _Fact:
    """What is known of a tensor of integers or truth values.

    Attributes:
        classes: its elements are indices of so many entries, each equally often.
        share: of its elements that are not zero.
        among: it tells for each choice whether it is this or that one of so many entries (one-hot).
        value: of each element, for counts.
    """

    classes: int | None = None
    share: float = 1.0
    among: int | None = None
    value: int = 0
    is_comparison: bool = False


class Routing:
    """Calls operations of fake tensors, and answers for those that need values."""

    def __init__(self) -> None:
        self._facts: Any = WeakTensorKeyDictionary()

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation's result.

        Raises:
            DynamicOutputShapeException, DataDependentOutputException: a question without an answer here.
        """
        if func is _aten._grouped_mm.default and args[0].dtype == torch.float32:
            return _grouped_product(*args, **kwargs)
        try:
            result = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            result = self._answer(func, args, kwargs)
        self._learn(func, args, result)
        return result

    def _answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is _aten._local_scalar_dense.default:
            return self._number(args[0])
        if func is _aten.nonzero.default:
            return args[0].new_empty((self._true(args[0]), args[0].dim()), dtype=torch.int64)
        if func is _aten.masked_select.default:
            return args[0].new_empty(self._true(args[1]))
        if func is _aten.index.Tensor:
            return func(args[0], self._as_numbers(args[1]))
        if func in _PUTTING:
            return func(args[0], self._as_numbers(args[1]), *args[2:], **kwargs)
        if func is _aten.bincount.default:
            classes = self._fact(args[0]).classes or 1
            return args[0].new_empty(max(classes, kwargs.get("minlength", args[2] if len(args) > 2 else 0)))
        if func is _aten.equal.default:
            return True
        return func(*args, **kwargs)  # raises again

    def _number(self, tensor: torch.Tensor) -> bool | int | float:
        """Yes to `mask.any()`, no to `number == n`; 1.0, and 0 for integers that are no counts."""
        if tensor.dtype == torch.bool:
            return not self._fact(tensor).is_comparison
        return 1.0 if tensor.is_floating_point() else self._fact(tensor).value

    def _true(self, mask: torch.Tensor) -> int:
        return min(mask.numel(), math.ceil(mask.numel() * self._fact(mask).share))

    def _as_numbers(self, indices: Any) -> list[Any]:
        """Masks as one vector of indices for each of their dimensions."""
        numbers: list[Any] = []
        for index in indices:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                count = self._true(index)
                numbers += [index.new_empty(count, dtype=torch.int64) for _ in range(index.dim())]
            else:
                numbers.append(index)
        return numbers

    def _fact(self, tensor: torch.Tensor) -> _Fact:
        return self._facts.get(tensor, _Fact())

    def _learn(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        if func in _CHOOSING:
            place = _CHOOSING[func]
            # topk(x, k, dim), sort(x, dim), argmax(x, dim): the last dimension in all that routers do.
            self._facts[result if place is None else result[place]] = _Fact(classes=args[0].shape[-1])
            return
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and (func in _SCATTERING or not tensor.is_floating_point()):
                self._pass_on(func, args, tensor)

    def _pass_on(self, func: Any, args: tuple[Any, ...], result: torch.Tensor) -> None:
        """What is known of the arguments, made into what is known of the result."""
        facts = [self._facts[value] for value in args if isinstance(value, torch.Tensor) and value in self._facts]
        if func in _EQUAL:
            classes = next((fact.classes for fact in facts if fact.classes), None)
            self._facts[result] = _Fact(share=1 / classes if classes else 1.0, among=classes, is_comparison=True)
        elif func in _SCATTERING and facts and facts[-1].classes:  # the indices come after the target
            share = args[2].numel() / max(1, result.numel())
            self._facts[result] = _Fact(share=min(1.0, share), among=facts[-1].classes)
        elif func is _aten.bincount.default:
            self._facts[result] = _Fact(value=args[0].numel() // max(1, result.numel()))
        elif facts and func not in _COUNTING:
            self._facts[result] = facts[0] if result.dtype != torch.bool else replace(facts[0], value=0)
        elif facts and facts[0].among and result.dim() <= 1:
            # How often each entry was chosen. Some code has one entry more than there are, which never is.
            entries = min(facts[0].among, max(1, result.numel()))
            count = round(args[0].numel() * facts[0].share / entries)
            self._facts[result] = _Fact(share=entries / max(1, result.numel()), value=count)


def _grouped_product(
    a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor | None = None, *_: Any, **__: Any
) -> torch.Tensor:
    """Products of experts in float32, which CPUs have and torch's description for fake tensors denies.

    Args:
        a: (tokens, in), or (in, tokens) where each expert's tokens give a matrix, or (experts, rows, in).
        b: (experts, in, out), or (tokens, out), or (in, tokens).
        offs: where each expert's tokens end.
    """
    if a.dim() == b.dim() == 2:
        assert offs is not None
        return a.new_empty(offs.shape[0], a.shape[0], b.shape[1])
    if a.dim() == b.dim() == 3:
        return a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return a.new_empty(a.shape[-2], b.shape[-1])
