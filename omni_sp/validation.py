"""Checks of single values. The caller chooses the class of the error, and so what kind of mistake it is.

Every check takes the name by which the user knows the value, and states name, value and hint in its error.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import re
import reprlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

__all__ = [
    "keyword_only",
    "nearest",
    "require_bool",
    "require_int",
    "require_number",
    "require_str",
    "shown",
    "suggestion",
]

_LONGEST_INT = 40  # digits; Python itself refuses to print 4300
_LARGEST = 2**63 - 1
_Class = TypeVar("_Class", bound=type)

Error = Callable[[str], Exception]
"""Makes the exception out of its message: an exception class, or a partial of one."""


def require_int(
    name: str, value: Any, *, minimum: int, maximum: int | None = None, error: Error, hint: str | None = None
) -> int:
    """Return the value if it is a whole number from ``minimum`` to ``maximum``; True and False are none."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if is_whole and maximum is None and value > _LARGEST:
        hint = "give a whole number of at most 2**63-1"
    if not is_whole or not minimum <= value <= (_LARGEST if maximum is None else maximum):
        raise error(f"{name}={shown(value)}: {hint or f'give a whole number of at least {minimum}'}")
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
        raise error(f"{name}={shown(value)}: {hint}")
    return number


def require_bool(name: str, value: Any, *, error: Error, hint: str = "give True or False") -> bool:
    """Return the value if it is True or False."""
    if not isinstance(value, bool):
        raise error(f"{name}={shown(value)}: {hint}")
    return value


def require_str(name: str, value: Any, *, error: Error, hint: str = "give a string") -> str:
    """Return the value if it is a string."""
    if not isinstance(value, str):
        raise error(f"{name}={shown(value)}: {hint}")
    return value


class _Short(reprlib.Repr):
    """repr() of bounded length, also of whole numbers that are too long for Python to print."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 200

    def repr_int(self, value: int, _level: int) -> str:
        digits = int(value.bit_length() * math.log10(2)) + 1
        return repr(value) if digits <= _LONGEST_INT else f"<a whole number of about {digits} digits>"


_SHORT = _Short()


def shown(value: Any) -> str:
    """A value that somebody gave, as an error shows it: its repr(), of which no more than a few lines are kept."""
    return _SHORT.repr(value)


def keyword_only(error: Error) -> Callable[[_Class], _Class]:
    """Have a class refuse positional and unknown arguments with an error of ours, which names what it takes."""

    def decorate(owner: _Class) -> _Class:
        made = owner.__init__  # type: ignore[misc]  # of this class itself
        known = list(inspect.signature(owner).parameters)

        @functools.wraps(made)
        def checked(self: Any, *values: Any, **fields: Any) -> None:
            for name in fields:
                if name not in known:
                    raise error(f"{owner.__name__} has no {shown(name)}; {suggestion(name, known)}")
            if values:
                named = ", ".join(f"{name}={shown(value)}" for name, value in zip(known, values, strict=False))
                raise error(
                    f"{owner.__name__} takes its values by name: {owner.__name__}({named}); it has {', '.join(known)}"
                )
            made(self, **fields)

        owner.__init__ = checked  # type: ignore[misc]
        return owner

    return decorate


def suggestion(name: str, known: Iterable[str], otherwise: str = "it takes {known}") -> str:
    """What to write in place of an unknown name: the nearest known one, or else ``otherwise``, with all of them."""
    names = list(known)
    near = nearest(name, names)
    return f"did you mean {near}?" if near is not None else otherwise.format(known=", ".join(names))


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant: one that is spelt alike, or that begins with such a word; else None.

    Dashes before a name say nothing about it.
    """
    wanted = name[:100].lstrip("-")
    whole = {one.lstrip("-"): one for one in known}
    words = {re.split("[-_]", one)[0]: name for one, name in reversed(whole.items())}
    for names, cutoff in ((whole, 0.6), (words, 0.8)):
        near = difflib.get_close_matches(wanted, names, n=1, cutoff=cutoff)
        if near:
            return names[near[0]]
    return None
