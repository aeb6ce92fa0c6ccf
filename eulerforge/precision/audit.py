"""What really happened in the first step, held against the plan.

A plan is words; a custom model may cast by itself, and autocast protects an FFT on CPU and not on CUDA. So the
operators of the first step are watched, and parameters, gradients and optimiser state looked at once.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from eulerforge.errors import TrainingError
from eulerforge.precision.plan import PrecisionPlan
from eulerforge.precision.regions import Float32Region

_PRODUCTS = ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten.baddbmm.", "aten.convolution.", "aten.linear.")
_FFT = "aten._fft_"
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AuditedModel:
    """What is watched, and what is expected.

    Attributes:
        strict: modules that must compute in float32, by path.
        regions: those of them that do so inside of autocast.
        float32_parameters: names of parameters that are float32 whatever the plan stores.
        compiled: blocks are compiled, so that operators can be seen in the regions only.
        lenient: `precision_check: warn`.
    """

    model: nn.Module
    plan: PrecisionPlan
    strict: Mapping[str, nn.Module]
    regions: Sequence[Float32Region]
    float32_parameters: frozenset[str]
    compiled: bool
    lenient: bool


@dataclass
class _Seen(TorchDispatchMode):
    """Dtypes of FFTs and matrix products, by place."""

    fft: Counter[tuple[str, torch.dtype]] = field(default_factory=Counter)
    products: Counter[tuple[str, torch.dtype]] = field(default_factory=Counter)
    inside: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith((*_PRODUCTS, _FFT)):
            dtype = next((value.dtype for value in args if isinstance(value, torch.Tensor)), None)
            if dtype is not None:
                counter = self.fft if name.startswith(_FFT) else self.products
                counter[self.inside[-1] if self.inside else "", dtype] += 1
        return func(*args, **(kwargs or {}))


class PrecisionAudit:
    """Watches one step.

    Args:
        subject: what is watched.
    """

    def __init__(self, subject: AuditedModel) -> None:
        self._subject = subject
        self._seen = _Seen()
        self.pending = True

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Around the forward and backward passes of the step."""
        subject = self._subject
        with contextlib.ExitStack() as stack:
            if subject.compiled:
                self._seen.inside.append("a float32 block")
                for region in subject.regions:
                    region.observer = self._seen
                    stack.callback(setattr, region, "observer", None)
            else:
                stack.enter_context(self._seen)
                for name, module in subject.strict.items():
                    for handle in self._follow(name, module):
                        stack.callback(handle.remove)
            yield

    def _follow(self, name: str, module: nn.Module) -> Iterator[Any]:
        inside = self._seen.inside

        def begin(*_: Any) -> None:
            inside.append(name)

        def end(*_: Any) -> None:
            inside.pop()

        yield module.register_forward_pre_hook(begin)
        # Also when it is left early: a recomputation stops once it has all that it needs.
        yield module.register_forward_hook(end, always_call=True)

    def finish(self, optimizer: torch.optim.Optimizer) -> Iterator[str]:
        """After the update of the step: the audit as lines for the log.

        Raises:
            TrainingError: what happened is not what the plan says.
        """
        self.pending = False
        faults = [*self._operator_faults(), *self._storage_faults(optimizer)]
        if faults and not self._subject.lenient:
            raise TrainingError(
                f"precision audit of the first step: {'; '.join(faults)}",
                "the model casts by itself: correct its code, or set training.precision_check: warn if it may",
                see="docs/precision.md",
            )
        yield f"Precision audit: {self._summary()}"
        yield from (f"Precision audit: {fault} (precision_check: warn)" for fault in faults)

    def _operator_faults(self) -> Iterator[str]:
        for (name, dtype), count in self._seen.fft.items():
            if dtype in _HALVES:
                yield f"{count} FFTs in {name or 'the model'} see {_shown(dtype)}, for which torch.fft is not made"
        for (name, dtype), count in self._seen.products.items():
            if name and dtype in _HALVES:
                yield f"{count} matrix products in {name} see {_shown(dtype)} where the plan has float32"
        products = {dtype for name, dtype in self._seen.products if not name}
        compute = getattr(torch, self._subject.plan.compute)
        if products and compute not in products:
            found = ", ".join(sorted(map(_shown, products)))
            yield f"no matrix product saw {_shown(compute)}, which the plan computes in, only {found}"

    def _storage_faults(self, optimizer: torch.optim.Optimizer) -> Iterator[str]:
        subject = self._subject
        stored = getattr(torch, subject.plan.stored)
        for name, parameter in subject.model.named_parameters():
            if not parameter.is_floating_point():
                continue
            expected = torch.float32 if name in subject.float32_parameters else stored
            held: dict[str, torch.Tensor | None] = {"parameter": parameter, "gradient": parameter.grad}
            state = optimizer.state.get(parameter, {})
            # Codes of 8 bits and their scales are the optimiser's own affair.
            moments = {key: state[key] for key in ("exp_avg", "exp_avg_sq", "momentum_buffer") if key in state}
            for what, tensor in {**held, **moments}.items():
                if tensor is not None and tensor.is_floating_point() and tensor.dtype != expected:
                    yield f"{what} of {name} is {_shown(tensor.dtype)}, not {_shown(expected)}"

    def _summary(self) -> str:
        inside = _counted((dtype, n) for (name, dtype), n in self._seen.products.items() if name)
        outside = _counted((dtype, n) for (name, dtype), n in self._seen.products.items() if not name)
        fft = _counted((dtype, n) for (_, dtype), n in self._seen.fft.items())
        parts = [f"matrix products in {outside}" if outside else ""]
        if self._subject.compiled:
            parts.append("operators of compiled blocks are not seen")
        parts.append(f"in float32 blocks {inside}" if inside else "")
        parts.append(f"FFTs in {fft}" if fft else "")
        parts.append(f"parameters, gradients and moments in {self._subject.plan.stored}")
        return "; ".join(filter(None, parts))


def _counted(values: Iterable[tuple[torch.dtype, int]]) -> str:
    total: Counter[str] = Counter()
    for dtype, count in values:
        total[_shown(dtype)] += count
    return ", ".join(f"{dtype} ({count})" for dtype, count in sorted(total.items()))


def _shown(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
