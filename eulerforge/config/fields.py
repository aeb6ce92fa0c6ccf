"""Field types of the preset: what text and numbers a key accepts, with messages in the user's words.

YAML and `--set` give the same plain values, and both pass through these validators, so `3e-4`, `"3e-4"` and
`0.0003` are one learning rate wherever they are written.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)([eE][-+]?\d+)?")
_LEADING_ZERO = re.compile(r"[-+]?0\d")


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"must be a number, not {describe(value)}")
    if isinstance(value, str):
        if not _NUMBER.fullmatch(value.strip()):
            raise ValueError(f"must be a finite number, not {describe(value)}")
        value = value.strip().replace("_", "")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"must be a finite number, not {number}")
    return number


def _to_int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"must be a whole number, not {describe(value)}")
    if isinstance(value, int):
        return value
    text = str(value).strip()
    if not _NUMBER.fullmatch(text) or _LEADING_ZERO.match(text):
        raise ValueError(f"must be a whole number, not {describe(value)}")
    try:
        number = Decimal(text.replace("_", ""))
    except InvalidOperation:
        raise ValueError(f"must be a whole number, not {describe(value)}") from None
    if number != number.to_integral_value() or abs(number) > 2**63:
        raise ValueError(f"must be a whole number, not {describe(value)}")
    return int(number)


def _to_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, not {describe(value)}")
    return value


def _to_text(value: Any) -> str:
    if isinstance(value, bool | int | float):
        raise ValueError(f'must be text, not {describe(value)}; if text is meant, quote it: "{value}"')
    if not isinstance(value, str):
        raise ValueError(f"must be text, not {describe(value)}")
    if not value.strip():
        raise ValueError("must not be empty")
    if "\0" in value:
        raise ValueError("must not contain a NUL character")
    return value


def describe(value: Any) -> str:
    """A value as a user would name it: `the text 'abc'`, `true`, `a list`, `nothing`."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return repr(value)


Float = Annotated[float, BeforeValidator(_to_float)]
NonNegativeFloat = Annotated[float, BeforeValidator(_to_float), Field(ge=0)]
PositiveFloat = Annotated[float, BeforeValidator(_to_float), Field(gt=0)]
Fraction = Annotated[float, BeforeValidator(_to_float), Field(ge=0, le=1)]
Beta = Annotated[float, BeforeValidator(_to_float), Field(ge=0, lt=1)]
NonNegativeInt = Annotated[int, BeforeValidator(_to_int), Field(ge=0)]
PositiveInt = Annotated[int, BeforeValidator(_to_int), Field(ge=1)]
Seed = Annotated[int, BeforeValidator(_to_int), Field(ge=0, lt=2**63)]
ChunkLength = Annotated[int, BeforeValidator(_to_int), Field(ge=2)]
Bool = Annotated[bool, BeforeValidator(_to_bool)]
Text = Annotated[str, BeforeValidator(_to_text)]
