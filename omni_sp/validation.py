"""Checks of single values. The caller chooses the class of the error, and so what kind of mistake it is.

Every check takes the name by which the user knows the value, and states name, value and hint in its error.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["require_int", "require_number", "require_str", "suggestion"]

Error = Callable[[str], Exception]
"""Makes the exception out of its message: an exception class, or a partial of one."""


def require_int(
    name: str, value: Any, *, minimum: int, maximum: int | None = None, error: Error, hint: str | None = None
) -> int:
    """Return the value if it is a whole number from ``minimum`` to ``maximum``; True and False are none."""
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
    """Return the value as a float if it is finite, at least ``minimum``, and between ``above`` and ``below``."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    try:
        number = float(value) if is_number else math.nan
    except OverflowError:  # an int that no float can hold
        number = math.inf
    if not (number >= minimum and above < number < below):  # nan lies within no bounds
        raise error(f"{name}={value!r}: {hint}")
    return number


def require_str(name: str, value: Any, *, error: Error, hint: str = "give a string") -> str:
    """Return the value if it is a string."""
    if not isinstance(value, str):
        raise error(f"{name}={value!r}: {hint}")
    return value


def suggestion(name: str, known: Iterable[str], otherwise: str = "it takes {known}") -> str:
    """What to write in place of an unknown name: the nearest known one, or else ``otherwise``, with all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else otherwise.format(known=", ".join(names))
