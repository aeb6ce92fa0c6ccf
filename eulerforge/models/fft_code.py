"""Whether the code of a module's class can reach `torch.fft`, read from its compiled functions without running them.

A source scan of the model directory sees only the directory. Custom models often import their blocks from an
installed package (EulerStack exports do), and call the FFT in a helper function of another file; names in a
function's code object, looked up where the function would look them up, lead there.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.fft
from torch import nn

_FFT_FUNCTIONS = {id(value) for value in vars(torch.fft).values() if callable(value)}
_FFT_FUNCTIONS |= {id(torch.stft), id(torch.istft)}
_NOT_FOLLOWED = {"torch", "numpy", "transformers", "triton", *sys.stdlib_module_names}
"""Packages whose own functions are not read: torch is known, and the others do not hide transforms in helpers."""


@functools.cache
def calls_fft(module_class: Any) -> bool:
    """Whether a method of the class, or a function that it calls by name, uses torch's Fourier transforms.

    Methods of children do not count, a child is a module of its own. Conservative: a path that is never taken counts.
    """
    bases = [base for base in module_class.__mro__ if not _is_left_out(base.__module__)]
    queue = [function for base in bases for function in _functions(base)]
    seen: set[int] = set()
    while queue:
        function = queue.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        names = set(_names(function.__code__))
        if "torch.fft" in names:  # imported in the function itself
            return True
        for value in _used_by(function, names):
            if _is_fft(value, names):
                return True
            queue += _functions_of(value)
    return False


def _is_left_out(package: str | None) -> bool:
    return package is None or package.partition(".")[0] in _NOT_FOLLOWED


def _functions(owner: type) -> Iterator[types.FunctionType]:
    for value in vars(owner).values():
        function = _unwrapped(value)
        if function is not None:
            yield function


def _unwrapped(value: Any) -> types.FunctionType | None:
    """The Python function inside a static method, property, partial or decorator; None if there is none."""
    while not isinstance(value, types.FunctionType):
        inside = (getattr(value, name, None) for name in ("__func__", "fget", "func", "__wrapped__"))
        inner = next((inner for inner in inside if callable(inner)), None)
        if inner is None or inner is value:
            return None
        value = inner
    return value


def _names(code: types.CodeType) -> Iterator[str]:
    """Names that a function and the functions inside it look up."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _used_by(function: types.FunctionType, names: set[str]) -> Iterator[Any]:
    """What a function's names stand for, and members of modules among those."""
    queue = [function.__globals__[name] for name in names if name in function.__globals__]
    queue += [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    seen: set[int] = set()
    while queue:
        value = queue.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, types.ModuleType) and not _is_left_out(value.__name__):
            queue += [vars(value)[name] for name in names if name in vars(value)]


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _is_fft(value: Any, names: set[str]) -> bool:
    """Whether this is a Fourier transform, for a function that mentions `names`."""
    if value is torch:
        return bool(names & {"fft", "stft", "istft"})
    return value is torch.fft or id(value) in _FFT_FUNCTIONS


def _functions_of(value: Any) -> Iterator[types.FunctionType]:
    """Functions that run when this is called; a module's class is a module of its own when it runs."""
    if isinstance(value, type):
        if not issubclass(value, nn.Module) and not _is_left_out(value.__module__):
            yield from _functions(value)
        return
    function = _unwrapped(value)
    if function is not None and not _is_left_out(function.__module__):
        yield function
