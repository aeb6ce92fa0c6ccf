"""Which modules of a built model belong to which block family: by class, by parameter, by code and by running it.

`models/blocks.py` looks at a directory without importing anything. Here the model exists (its parameters may be on
the meta device), so that blocks of installed packages and FFT calls in helpers are found too.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from eulerforge.errors import reason_of
from eulerforge.models.blocks import Family, FoundBlock
from eulerforge.models.fft_code import calls_fft
from eulerforge.models.forward import CausalForward

PROBE_LENGTH = 16
"""Tokens of the probe row."""

_CLASS_NAMES: Sequence[tuple[re.Pattern[str], Family]] = (
    (re.compile(r"Hyena|LongConv", re.I), "hyena"),
    (re.compile(r"RetNet|Retention", re.I), "retnet"),
    (re.compile(r"Mamba|StateSpace|SSM|S4D|S6", re.I), "mamba"),
    (re.compile(r"MoE(?![a-z])|MixtureOfExperts|SparseM[oO][eE]|Experts"), "moe"),
    (re.compile(r"Attention|Attn"), "attention"),
)
"""The first that matches decides."""

_SSM_PARAMETERS = ("A_log", "D", "dt_bias")
"""Names of a state-space model's decay rates, skip weights and step sizes (Gu and Dao, 2023)."""


@dataclass(frozen=True)
class BlockModule:
    """A module that belongs to a family.

    Attributes:
        name: its path in the model, empty for the model itself.
        evidence: why, in words for the user.
    """

    family: Family
    name: str
    module: nn.Module
    evidence: str

    @property
    def shown(self) -> str:
        """Path and class."""
        return f"{self.name or 'the model itself'} ({type(self.module).__name__})"


def find_block_modules(model: Any, warn: Callable[[str], None] = lambda line: None) -> list[BlockModule]:
    """The modules of each family, in the order of the model; where one holds another of its family, the outer one.

    Repeated blocks (layers) are looked into: of `RetNetBlock(norm, retention, mlp)` it is the retention that counts.

    Args:
        warn: told where the model could not be run without weights, and only its code was read.
    """
    fft = fft_calls(model, warn)
    found: list[BlockModule] = []
    for name, module in model.named_modules():
        block = _classify(name, module, fft)
        if block is None or any(_is_inside(name, other.name) for other in found if other.family == block.family):
            continue
        if name not in fft and (_holds_caller(block, fft) or _is_shell(block)):
            continue
        found.append(block)
    return found


def float32_modules(modules: Sequence[BlockModule], families: Collection[str]) -> dict[str, nn.Module]:
    """The modules of some families by path; where one lies inside another, the outer one."""
    chosen = {block.name: block.module for block in modules if block.family in families}
    return {
        name: module
        for name, module in chosen.items()
        if not any(name != other and _is_inside(name, other) for other in chosen)
    }


def families_of(modules: Sequence[BlockModule]) -> tuple[FoundBlock, ...]:
    """Each family once, with its modules as evidence."""
    found: dict[Family, list[BlockModule]] = {}
    for block in modules:
        found.setdefault(block.family, []).append(block)
    return tuple(FoundBlock(family, _evidence(blocks)) for family, blocks in found.items())


def _evidence(blocks: Sequence[BlockModule]) -> str:
    first = blocks[0]
    more = f" and {len(blocks) - 1} more" if len(blocks) > 1 else ""
    return f"{first.shown}{more} {first.evidence}"


def _classify(name: str, module: nn.Module, fft: dict[str, str]) -> BlockModule | None:
    family = _family_of(module)
    if name in fft:
        # A class that says what it is keeps its name; the rule is the same.
        return BlockModule(family if family in ("hyena", "retnet") else "fft", name, module, fft[name])
    if not name or family is None:  # `MambaForCausalLM` holds blocks, it is none
        return None
    return BlockModule(family, name, module, "has A_log" if hasattr(module, "A_log") else "by its class name")


def _is_inside(name: str, outer: str) -> bool:
    return outer == "" or name.startswith(f"{outer}.")


def _holds_caller(block: BlockModule, fft: dict[str, str]) -> bool:
    """Whether a module that is named after an FFT family leaves the FFT to a child, which then is the block."""
    return block.family in ("hyena", "retnet") and any(_is_inside(name, block.name) for name in fft)


def _is_shell(block: BlockModule) -> bool:
    """Whether this is a whole layer, of which a child does what the family is known for."""
    if not re.search(r"(Block|Layer)$", type(block.module).__name__):
        return False
    children = [child for child in block.module.modules() if child is not block.module]
    return any(_family_of(child) == block.family and any(True for _ in child.parameters()) for child in children)


def _family_of(module: nn.Module) -> Family | None:
    """By parameter or class name."""
    if hasattr(module, "A_log"):
        return "mamba"
    name = type(module).__name__
    return next((family for pattern, family in _CLASS_NAMES if pattern.search(name)), None)


def float32_parameters(model: nn.Module) -> set[str]:
    """Names of parameters that must be stored and used in float32 whatever the rest is in.

    Those of state-space models by name, beside an `A_log`; and any that the model marks: `_keep_float32 = True` on
    the parameter, or the name of a module in transformers' `_keep_in_fp32_modules_strict`.
    """
    patterns = [
        re.compile(rf"(^|\.){pattern}(\.|$)")
        for module in model.modules()
        for pattern in getattr(module, "_keep_in_fp32_modules_strict", None) or ()
    ]
    kept = set()
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}" if prefix else leaf
            is_ssm = leaf in _SSM_PARAMETERS and hasattr(module, "A_log")
            is_marked = getattr(parameter, "_keep_float32", False)
            if is_ssm or is_marked or any(pattern.search(name) for pattern in patterns):
                kept.add(name)
    return kept


def fft_calls(model: Any, warn: Callable[[str], None]) -> dict[str, str]:
    """Paths of the modules that call a Fourier transform, and how that is known.

    Seen in a probe forward, or reachable from the module's code.
    """
    classes: dict[str, Any] = {name: type(module) for name, module in model.named_modules()}
    calls = {name: "has code that calls torch.fft" for name, owner in classes.items() if calls_fft(owner)}
    for name in _probe(model, warn):
        calls[name] = "calls torch.fft"
    return calls


def _probe(model: Any, warn: Callable[[str], None]) -> set[str]:
    """Modules that call an FFT in a forward pass of a twin of the model without real weights.

    First with fake tensors, which cost nothing. Models that route by value (mixtures of experts) refuse those; they
    run on real zeros, each parameter one number seen many times. Where neither runs (kernels for GPUs only) the
    code has been read all the same, and the audit of the first step sees the truth.
    """
    # torch's own failures inside fake tensors and a model's failures on an unusual input are of any kind.
    for fake in (FakeTensorMode(allow_non_fake_inputs=True), None):
        try:
            with _without_logs():
                return _run_twin(model, fake)
        except Exception as error:
            reason = f"{type(error).__name__}: {reason_of(error)}"
    warn(f"the model cannot be run without its weights ({reason}); FFTs are looked for in its code only")
    return set()


def _run_twin(model: Any, fake: FakeTensorMode | None) -> set[str]:
    def stand_in(parameter: torch.Tensor) -> nn.Parameter:
        shape, dtype = parameter.shape, parameter.dtype
        if fake is None:
            return nn.Parameter(torch.zeros((), dtype=dtype).expand(shape), requires_grad=False)
        with fake:
            return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)

    # A twin, so that counters and buffers of the model stay as they are.
    memo: dict[int, Any] = {id(parameter): stand_in(parameter) for parameter in model.parameters()}
    twin = copy.deepcopy(model, memo).eval()
    recorder = _FftRecorder()
    for name, module in twin.named_modules():
        recorder.follow(name, module)
    with torch.random.fork_rng(devices=[]), fake or contextlib.nullcontext(), torch.no_grad(), recorder:
        CausalForward(twin)(torch.zeros((1, PROBE_LENGTH), dtype=torch.long), None)
    return recorder.callers


@contextlib.contextmanager
def _without_logs() -> Iterator[None]:
    """torch logs at length what fake tensors cannot do, and then raises it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


class _FftRecorder(TorchDispatchMode):
    """Notes which module is running when an FFT is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.callers: set[str] = set()
        self._running: list[str] = []

    def follow(self, name: str, module: nn.Module) -> None:
        """Keep track of when a module is running."""

        def begin(*_: Any) -> None:
            self._running.append(name)

        def end(*_: Any) -> None:
            self._running.pop()

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith("aten._fft_") and self._running:
            self.callers.add(self._running[-1])
        return func(*args, **(kwargs or {}))
