"""The versions of the libraries beneath that the tests run with. Others are not refused, but named once."""

from __future__ import annotations

import re
import warnings
from functools import cache
from importlib import metadata

TESTED = {"diffusers": ("0.40.0", "0.42.1"), "transformers": ("5.0.0", "5.23.0")}
"""Package -> the oldest and the newest version that the tests run with (`make test-diffusers-range`, `make test`)."""


@cache
def warn_if_untested(package: str) -> None:
    """Warn, once in a process, where the installed version of a package is older or newer than the tested ones.

    What may change without notice is the first number that is not 0: the minor version of 0.42, the major one of 5.23.

    Args:
        package: a key of ``TESTED``.
    """
    try:
        installed = metadata.version(package)
    except metadata.PackageNotFoundError:  # read from its sources, without a version
        return
    oldest, newest = TESTED[package]
    if not is_tested(package, installed):
        warnings.warn(
            f"Omni-SP is not tested with {package} {installed}, but with {oldest} to {newest}: "
            "`omni-sp check MODEL --ulysses-degree 2` compares several ranks with one process",
            stacklevel=3,
        )


def is_tested(package: str, version: str) -> bool:
    """Whether a version of a package is one that the tests run with, or between them.

    Args:
        package: a key of ``TESTED``.
        version: such as "0.42.1".
    """
    oldest, newest = TESTED[package]
    return _series(oldest) <= _series(version) <= _series(newest)


def _series(version: str) -> tuple[int, ...]:
    """The numbers of a version up to the first that is not 0."""
    numbers = [int(number) for number in re.findall(r"\d+", version)]
    first = next((index for index, number in enumerate(numbers) if number), 0)
    return tuple(numbers[: first + 1])
