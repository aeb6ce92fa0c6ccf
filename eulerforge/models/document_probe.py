"""Proof that a model keeps the documents of a row apart, on the model itself.

Two documents A and B are packed in a row. Kept apart, B's logits must not change when A changes, and must equal those
of B alone, read from position 0. What changes when A changes in a plain causal row is the measure: a model whose
tokens do not depend on each other at all (output projections of zero, say) would pass without proving anything.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn

from eulerforge.errors import ModelError
from eulerforge.models.document_mask import Way
from eulerforge.models.forward import CausalForward

LENGTH = 24
BORDERS = (9, 14)
"""Where B begins in each of the two rows."""

_LEAK = 1e-3
"""A change of B's logits counts as a leak from this share of the plain model's change on. A mask that holds gives
zero or rounding (1e-7 of the logits); a mask that does not gives about 1."""

_POSITIONS = "its positions cannot begin anew"

_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a forward pass raises that cannot take what it is given."""


@dataclass(frozen=True)
class ProbedModel:
    """A model, and how the run calls it.

    Attributes:
        vocabulary: ids are below this.
        precision: makes the context of a forward pass.
        settle: puts sharded parameters back after forward passes without a backward pass.
        device: where the model is.
    """

    model: Any
    vocabulary: int
    precision: Callable[[], AbstractContextManager[Any]]
    settle: Callable[[], None]
    device: torch.device


def find_way(probed: ProbedModel) -> Way:
    """The first way in which the model keeps documents apart. All processes of a run must call it.

    Raises:
        ModelError: there is none; names the first module that leaks.
    """
    model = probed.model
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _find_way(probed)
    finally:
        probed.settle()
        model.train(training)


def _find_way(probed: ProbedModel) -> Way:
    rows = _Rows(probed.vocabulary, probed.device)
    plain = CausalForward(probed.model)
    with probed.precision():
        logits, _ = plain(rows.ids, None)
        changed, _ = plain(rows.changed, None)
        reference = _size(rows.second(changed - logits))
        if reference == 0:
            raise ModelError(
                "data.document_mask: no token's prediction depends on those before it yet (output projections of "
                "zero?), so that nothing can be proven",
                "set data.document_mask: false, or start from weights that are not zero",
                see="docs/data.md",
            )
        # Kept apart, each document reads as if it were alone in its row.
        alone = [plain(rows.ids[row : row + 1, border:], None)[0][0] for row, border in enumerate(BORDERS)]
        noise = 2 * torch.finfo(logits.dtype).eps * _size(logits.flatten(0, 1))
        reasons: dict[Way, str] = {}
        for way in get_args(Way):
            apart = CausalForward(probed.model, document_way=way)
            try:
                separate, _ = apart(rows.ids, None, rows.segments)
                other, _ = apart(rows.changed, None, rows.segments)
            except _FAILURES as error:
                reasons[way] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                continue
            if _size(rows.second(other - separate)) > _LEAK * reference:
                reasons[way] = ""
            elif _size(rows.second(separate) - torch.cat(alone)) > _LEAK * reference + noise:
                reasons[way] = _POSITIONS
            else:
                return way
        raise _refusal(probed, rows, reasons)


class _Rows:
    """Two rows of two documents each, and the same with every token of A changed."""

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        draw = torch.Generator().manual_seed(0)  # not the run's random numbers
        ids = torch.randint(0, vocabulary, (len(BORDERS), LENGTH), generator=draw)
        steps = torch.randint(1, max(vocabulary, 2), ids.shape, generator=draw)
        segments = torch.zeros(ids.shape, dtype=torch.int32)
        for row, border in enumerate(BORDERS):
            segments[row, border:] = 1
        self.ids = ids.to(device)
        self.changed = torch.where(segments == 0, (ids + steps) % vocabulary, ids).to(device)
        self.segments = segments.to(device)

    def second(self, values: torch.Tensor) -> torch.Tensor:
        """B's part of (rows, length, ...), one row after the other."""
        return torch.cat([values[row, border:] for row, border in enumerate(BORDERS)])


def _size(values: torch.Tensor) -> float:
    """Root mean square, in which rounding does not stand out as it does in a maximum."""
    return float(values.float().square().mean().sqrt())


def _refusal(probed: ProbedModel, rows: _Rows, reasons: dict[Way, str]) -> ModelError:
    name = type(probed.model).__name__
    leaking = [way for way, reason in reasons.items() if not reason]
    why = "; ".join(dict.fromkeys(filter(None, reasons.values())))
    if _POSITIONS in reasons.values():
        what = f"{name} cannot keep documents apart: {why}"
    else:
        module = _first_leak(probed, rows, leaking[0] if leaking else None) or name
        what = f"{module} carries information from one document to the next" + (f" ({why})" if why else "")
    return ModelError(f"data.document_mask: {what}", "set data.document_mask: false", see="docs/data.md")


def _first_leak(probed: ProbedModel, rows: _Rows, way: Way | None) -> str | None:
    """The first module, in the order of computing, whose output for B depends on A while its input does not.

    Args:
        way: how the model is called; None for plain rows, if it cannot be called in any way.
    """
    seen: list[dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]]] = []
    names = {module: name for name, module in probed.model.named_modules() if name}

    def note(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        inputs = [*arguments, *options.values()]
        seen[-1].setdefault(names[module], (_second_parts(rows, inputs), _second_parts(rows, _parts(output))))

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in names]
    try:
        forward = CausalForward(probed.model, document_way=way)
        for ids in (rows.ids, rows.changed):
            seen.append({})
            forward(ids, None, None if way is None else rows.segments)
    finally:
        for hook in hooks:
            hook.remove()
    before, after = seen
    for name, (inputs, outputs) in before.items():
        other_inputs, other_outputs = after.get(name, ([], []))
        if not _differ(inputs, other_inputs) and _differ(outputs, other_outputs):
            return f"{name} ({type(probed.model.get_submodule(name)).__name__})"
    return None


def _parts(output: Any) -> list[Any]:
    if isinstance(output, dict):
        return list(output.values())
    return list(output) if isinstance(output, tuple | list) else [output]


def _second_parts(rows: _Rows, values: list[Any]) -> list[torch.Tensor]:
    """B's part of what is a tensor over tokens."""
    shape = rows.ids.shape
    tensors = [value for value in values if isinstance(value, torch.Tensor) and value.shape[:2] == shape]
    return [rows.second(tensor).float() for tensor in tensors]


def _differ(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    pairs = [(a, b) for a, b in zip(first, second, strict=False) if a.shape == b.shape]
    return any(_size(a - b) > 1e-5 * _size(a) for a, b in pairs)
