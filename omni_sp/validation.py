"""Range checks of single values. Each returns the value, or raises an error that states name, value and what to give.

``error`` is the class of the exception, or a function that makes the exception out of its message, such as a partial.
True and False are no numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

_Error = Callable[[str], Exception]


def require_int(
    name: str, value: Any, *, minimum: int, maximum: int | None = None, error: _Error, hint: str | None = None
) -> int:
    """Require a whole number from ``minimum`` to ``maximum``, both included."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < minimum or (maximum is not None and value > maximum):
        raise error(f"{name}={value!r}: {hint or f'give a whole number of at least {minimum}'}")
    return int(value)


def require_number(
    name: str,
    value: Any,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    minimum: float = -math.inf,
    error: _Error,
    hint: str = "give a finite number",
) -> float:
    """Require a number between ``above`` and ``below``, both excluded, that is no less than ``minimum``."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    try:
        number = float(value) if is_number else math.nan
    except OverflowError:  # an int that no float can hold
        number = math.inf
    if not above < number < below or number < minimum:  # nan lies between no bounds
        raise error(f"{name}={value!r}: {hint}")
    return number


def require_str(name: str, value: Any, *, error: _Error, hint: str = "give a string") -> str:
    """Require a string."""
    if not isinstance(value, str):
        raise error(f"{name}={value!r}: {hint}")
    return value
