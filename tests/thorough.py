"""Whether to try everything that is proven, or what a change is likely to break."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import product
from typing import TypeVar

import pytest

THOROUGH = os.environ.get("OMNI_SP_THOROUGH") == "1"
thorough_only = pytest.mark.skipif(not THOROUGH, reason="tried with OMNI_SP_THOROUGH=1")

T = TypeVar("T")
S = TypeVar("S")


def in_turns(cases: Iterable[T], layouts: Sequence[S], each: int = 1) -> list[tuple[T, S]]:
    """Each case on some of the layouts, the next case on the next ones; with OMNI_SP_THOROUGH=1, on all.

    Args:
        cases: what is tried, each at least once.
        layouts: what it is tried on; with as many cases as layouts, each is used.
        each: on how many layouts each case is tried.
    """
    if THOROUGH:
        return list(product(cases, layouts))
    return [
        (case, layouts[(number * each + turn) % len(layouts)])
        for number, case in enumerate(cases)
        for turn in range(each)
    ]
