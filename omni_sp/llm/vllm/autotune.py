"""Up to how many tokens of a step tensor parallelism is quicker than Ulysses: measured where they run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

BUDGET_S = 5.0
"""After so long, measuring ends with the number of tokens under way."""
_ROUNDS = 3


class Trial(NamedTuple):
    """Seconds of a step of so many tokens, each way; the quickest of some rounds."""

    tokens: int
    tensor_s: float
    ulysses_s: float


def measure(
    run: Callable[[int, bool], None],
    max_tokens: int,
    agree: Callable[[tuple[Trial, bool]], tuple[Trial, bool]],
    budget_s: float = BUDGET_S,
) -> list[Trial]:
    """Time steps of 1, 2, 4, ... tokens, each way in turns, until Ulysses wins twice in a row. A collective.

    Args:
        run: run a step of so many tokens, sharing them (True) or not, and wait for its end.
        most: the most tokens of any step.
        agree: what rank 0 gave, on every rank: ranks that went by clocks of their own would part.
        budget_s: no further number of tokens is begun after this time.
    """
    for is_ulysses in (True, False):
        run(1, is_ulysses)  # the very first step may take seconds
    began, trials, tokens = time.perf_counter(), list[Trial](), 1
    while True:
        quickest = {True: float("inf"), False: float("inf")}
        for number in range(_ROUNDS + 1):
            for is_ulysses in quickest:
                started = time.perf_counter()
                run(tokens, is_ulysses)
                if number:  # the first one makes ready what later ones find
                    quickest[is_ulysses] = min(quickest[is_ulysses], time.perf_counter() - started)
        mine = Trial(tokens, quickest[False], quickest[True])
        trial, is_over = agree((mine, time.perf_counter() - began > budget_s))
        trials.append(trial)
        settled = len(trials) > 1 and all(one.ulysses_s < one.tensor_s for one in trials[-2:])
        if settled or is_over or tokens >= max_tokens:
            return trials
        tokens = min(2 * tokens, max_tokens)


def threshold(trials: list[Trial]) -> int:
    """The most tokens with which tensor parallelism was quicker; 0 where it never was."""
    return max((trial.tokens for trial in trials if trial.tensor_s <= trial.ulysses_s), default=0)
