"""Whether the code of a module's class can reach `torch.fft`, read from its compiled functions without running them.

A source scan of the model directory sees only the directory. Custom models often import their blocks from an
installed package (EulerStack exports do), and call the FFT in a helper function of another file; names in a
function's code object, looked up where the function would look them up, lead there.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.fft
from torch import nn

_FFT_FUNCTIONS = {id(value) for value in vars(torch.fft).values() if callable(value)}
_FFT_FUNCTIONS |= {id(torch.stft), id(torch.istft)}
_NOT_FOLLOWED = ("torch", "numpy", "transformers", "builtins", "typing", "math", "functools", "einops", "triton")
"""Packages whose own functions are not read: torch is known, and the others do not hide transforms in helpers."""


@functools.cache
def calls_fft(module_class: Any) -> bool:
    """Whether a method of the class, or a function that it calls by name, uses torch's Fourier transforms.

    Methods of children do not count, a child is a module of its own. Conservative: a path that is never taken counts.
    """
    seen: set[int] = set()
    own = (base for base in module_class.__mro__ if not _is_left_out(base.__module__))
    return any(_reaches(function, seen) for base in own for function in _functions(base))


def _is_left_out(package: str | None) -> bool:
    return package is None or package.partition(".")[0] in _NOT_FOLLOWED


def _functions(owner: type) -> Iterator[types.FunctionType]:
    for value in vars(owner).values():
        function = _unwrapped(value)
        if function is not None:
            yield function


def _unwrapped(value: Any) -> types.FunctionType | None:
    """The Python function inside a static method, property, partial or decorator; None if there is none."""
    for name in ("__func__", "fget", "func", "__wrapped__"):
        inner = getattr(value, name, None)
        if inner is not None and inner is not value:
            return _unwrapped(inner)
    return value if isinstance(value, types.FunctionType) else None


def _reaches(function: types.FunctionType, seen: set[int]) -> bool:
    if id(function) in seen:
        return False
    seen.add(id(function))
    names = set(_names(function.__code__))
    if "torch.fft" in names:  # imported in the function itself
        return True
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    used = [function.__globals__[name] for name in names if name in function.__globals__]
    return any(_leads_to_fft(value, names, seen) for value in (*used, *cells))


def _names(code: types.CodeType) -> Iterator[str]:
    """Names that a function and the functions inside it look up."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _leads_to_fft(value: Any, names: set[str], seen: set[int]) -> bool:
    """Whether a global of a function (which mentions `names`) is, or leads to, a Fourier transform."""
    if value is torch.fft or id(value) in _FFT_FUNCTIONS:
        return True
    if value is torch:
        return bool(names & {"fft", "stft", "istft"})
    if isinstance(value, types.ModuleType):
        if _is_left_out(value.__name__):
            return False
        members = [vars(value)[name] for name in names if name in vars(value)]
        return any(_leads_to_fft(member, names, seen) for member in members)
    if isinstance(value, type):
        # A module class that is named here is a module of its own when it runs; an autograd function runs here.
        if issubclass(value, nn.Module) or _is_left_out(value.__module__):
            return False
        return any(_reaches(function, seen) for function in _functions(value))
    inner = _unwrapped(value)
    return inner is not None and not _is_left_out(inner.__module__) and _reaches(inner, seen)
