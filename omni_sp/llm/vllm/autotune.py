"""Up to how many tokens a step is quicker by tensor parallelism than by Ulysses, measured on the ranks themselves."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

BUDGET_S = 5.0
"""After so many seconds, measuring ends with the current number of tokens."""
_ROUNDS = 3


class Trial(NamedTuple):
    """Seconds of a step of ``tokens`` tokens, each way; the quickest of some rounds."""

    tokens: int
    tensor_s: float
    ulysses_s: float


def measure(
    run: Callable[[int, bool], None],
    max_tokens: int,
    broadcast: Callable[[tuple[Trial, bool]], tuple[Trial, bool]],
    budget_s: float = BUDGET_S,
) -> list[Trial]:
    """Time steps of 1, 2, 4, ... tokens, each way in turns, until Ulysses wins twice in a row. A collective.

    Args:
        run: runs a step of so many tokens, by Ulysses (True) or by tensor parallelism, and waits for its end.
        max_tokens: the most tokens of any step.
        broadcast: returns rank 0's value on every rank. Ranks that decided by clocks of their own would run different
            steps, and wait for each other forever.
        budget_s: after this time no further number of tokens is tried.
    """
    for is_ulysses in (True, False):
        run(1, is_ulysses)  # the very first step may take seconds
    start, trials, tokens = time.perf_counter(), list[Trial](), 1
    while True:
        quickest = {True: float("inf"), False: float("inf")}
        for number in range(_ROUNDS + 1):
            for is_ulysses in quickest:
                step_start = time.perf_counter()
                run(tokens, is_ulysses)
                if number:  # the first round warms up
                    quickest[is_ulysses] = min(quickest[is_ulysses], time.perf_counter() - step_start)
        own_trial = Trial(tokens, quickest[False], quickest[True])
        trial, is_over = broadcast((own_trial, time.perf_counter() - start > budget_s))
        trials.append(trial)
        ulysses_won_twice = len(trials) > 1 and all(one.ulysses_s < one.tensor_s for one in trials[-2:])
        if ulysses_won_twice or is_over or tokens >= max_tokens:
            return trials
        tokens = min(2 * tokens, max_tokens)


def threshold(trials: list[Trial]) -> int:
    """The most tokens with which tensor parallelism was quicker; 0 where it never was."""
    return max((trial.tokens for trial in trials if trial.tensor_s <= trial.ulysses_s), default=0)
