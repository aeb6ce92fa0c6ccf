"""Field types of the preset: what text and numbers a key accepts, with messages in the user's words.

YAML and `--set` give the same plain values, and both pass through these validators, so `3e-4`, `"3e-4"` and
`0.0003` are one learning rate wherever they are written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)([eE][-+]?\d+)?")
_LEADING_ZERO = re.compile(r"[-+]?0\d")


def to_float(value: Any) -> float:
    """A finite number; text that reads as one counts."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"must be a number, not {describe(value)}")
    if isinstance(value, str):
        if not _NUMBER.fullmatch(value.strip()):
            raise ValueError(f"must be a finite number, not {describe(value)}")
        value = value.strip().replace("_", "")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"must be a finite number, not {number}")
    return number


def to_int(value: Any) -> int:
    """A whole number; `1_000`, `1e3` and `2.0` count, `1.5`, `010` and booleans do not."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"must be a whole number, not {describe(value)}")
    if isinstance(value, int) and abs(value) <= 2**63:
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


def to_bool(value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, not {describe(value)}")
    return value


def to_text(value: Any) -> str:
    """Non-empty text; numbers and booleans are refused with a hint to quote them."""
    if isinstance(value, bool | int):
        raise ValueError(f'must be text, not {describe(value)}; if text is meant, quote it: "{str(value).lower()}"')
    if isinstance(value, float):
        raise ValueError(f"must be text, not {describe(value)}; if text is meant, quote it")
    if not isinstance(value, str):
        raise ValueError(f"must be text, not {describe(value)}")
    if not value.strip():
        raise ValueError("must not be empty")
    if "\0" in value:
        raise ValueError("must not contain a NUL character")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("must be text that UTF-8 can hold")
    return value


def to_amp(value: Any) -> Any:
    """Autocast: true, false or `selective`."""
    if value is None or isinstance(value, bool) or value == "selective":
        return value
    raise ValueError(f"must be true, false or selective, not {describe(value)}")


def to_count_or(word: str) -> Callable[[Any], Any]:
    """A validator for a whole number of at least 1, or one word."""
    return lambda value: word if value == word else _to_count(value, word)


def to_switch_or(word: str) -> Callable[[Any], Any]:
    """A validator for true, false, or one word."""

    def check(value: Any) -> Any:
        if isinstance(value, bool) or value == word:
            return value
        raise ValueError(f"must be true, false or {word}, not {describe(value)}")

    return check


def to_checkpointing(value: Any) -> Any:
    """false, true, or every how many blocks."""
    return value if isinstance(value, bool) else _to_count(value, "false, true")


def _to_count(value: Any, otherwise: str) -> int:
    try:
        count = to_int(value)
    except ValueError:
        count = 0
    if count < 1:
        raise ValueError(f"must be {otherwise} or a whole number of at least 1, not {describe(value)}")
    return count


def to_data_path(value: Any) -> Any:
    """A path, a list of paths, or a mixture: a list of `{path, weight}`."""
    if not isinstance(value, list):
        if isinstance(value, dict):
            raise ValueError("must be a path, a list of paths, or a list of {path, weight}, not a mapping")
        return to_text(value)
    if not value:
        raise ValueError("must not be an empty list")
    if any(isinstance(entry, dict) for entry in value):
        return [_to_mixture_source(number, entry) for number, entry in enumerate(value, 1)]
    return [_named(number, to_text, entry) for number, entry in enumerate(value, 1)]


def _to_mixture_source(number: int, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"entry {number} has no weight: in a mixture each entry is {{path: ..., weight: ...}}")
    for name in entry:
        if name not in ("path", "weight"):
            raise ValueError(f"entry {number} has an unknown key {name!r}; it takes path and weight")
    for name in ("path", "weight"):
        if name not in entry:
            raise ValueError(f"entry {number} has no {name}: each entry is {{path: ..., weight: ...}}")
    weight = _named(number, to_float, entry["weight"])
    if weight <= 0:
        raise ValueError(f"entry {number}: weight must be greater than 0, not {entry['weight']}")
    return {"path": _named(number, to_text, entry["path"]), "weight": weight}


def _named(number: int, convert: Callable[[Any], Any], value: Any) -> Any:
    try:
        return convert(value)
    except ValueError as error:
        raise ValueError(f"entry {number}: {error}") from None


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


Float = Annotated[float, BeforeValidator(to_float)]
NonNegativeFloat = Annotated[float, Field(ge=0), BeforeValidator(to_float)]
PositiveFloat = Annotated[float, Field(gt=0), BeforeValidator(to_float)]
Fraction = Annotated[float, Field(ge=0, le=1), BeforeValidator(to_float)]
OpenFraction = Annotated[float, Field(gt=0, lt=1), BeforeValidator(to_float)]
Beta = Annotated[float, Field(ge=0, lt=1), BeforeValidator(to_float)]
NonNegativeInt = Annotated[int, Field(ge=0), BeforeValidator(to_int)]
PositiveInt = Annotated[int, Field(ge=1), BeforeValidator(to_int)]
Seed = Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(to_int)]
ChunkLength = Annotated[int, Field(ge=2, le=2**24), BeforeValidator(to_int)]
MicroBatchRows = Annotated[int, Field(ge=1, le=2**16), BeforeValidator(to_int)]
Bool = Annotated[bool, BeforeValidator(to_bool)]
Text = Annotated[str, BeforeValidator(to_text)]
