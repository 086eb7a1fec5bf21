"""Range checks of single values. Callers choose the class of the error, and so what kind of mistake it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

__all__ = ["require_int", "require_number", "require_str"]

Error = Callable[[str], Exception]
"""Makes the exception out of its message: an exception class, or a partial of one."""


def require_int(
    name: str, value: Any, *, minimum: int, maximum: int | None = None, error: Error, hint: str | None = None
) -> int:
    """Return the value if it is a whole number in the range; True and False are none.

    Args:
        name: what the user calls the value.
        value: the value.
        minimum: the smallest allowed.
        maximum: the largest allowed; None for any.
        error: the exception class, or a function that makes the exception out of its message.
        hint: what to do instead, for the message; by default "give a whole number of at least <minimum>".

    Raises:
        Exception: of the class given. The message states the name, the value and the hint.
    """
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < minimum or (maximum is not None and value > maximum):
        raise error(f"{name}={value!r}: {hint or f'give a whole number of at least {minimum}'}")
    return int(value)


def require_number(
    name: str,
    value: Any,
    *,
    minimum: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    error: Error,
    hint: str = "give a finite number",
) -> float:
    """Return the value as a float if it is a finite number within the bounds; True and False are none.

    Args:
        name: what the user calls the value.
        value: the value.
        minimum: the smallest allowed.
        above: the value must be greater.
        below: the value must be less.
        error: the exception class, or a function that makes the exception out of its message.
        hint: what to do instead, for the message.

    Raises:
        Exception: of the class given. The message states the name, the value and the hint.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    try:
        number = float(value) if is_number else math.nan
    except OverflowError:  # an int that no float can hold
        number = math.inf
    if not (number >= minimum and above < number < below):  # nan lies within no bounds
        raise error(f"{name}={value!r}: {hint}")
    return number


def require_str(name: str, value: Any, *, error: Error, hint: str = "give a string") -> str:
    """Return the value if it is a string.

    Args:
        name: what the user calls the value.
        value: the value.
        error: the exception class, or a function that makes the exception out of its message.
        hint: what to do instead, for the message.

    Raises:
        Exception: of the class given. The message states the name, the value and the hint.
    """
    if not isinstance(value, str):
        raise error(f"{name}={value!r}: {hint}")
    return value
