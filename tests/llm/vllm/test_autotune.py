"""The number of tokens from which Ulysses is quicker than tensor parallelism is measured."""

from __future__ import annotations

import time
from typing import Any

from omni_sp.llm.vllm.autotune import Trial, measure, threshold


def alone(value: Any) -> Any:
    return value


def test_measuring_ends_when_ulysses_has_won_twice() -> None:
    """The time of one grows with the tokens, that of the other does not."""

    def run(tokens: int, is_ulysses: bool) -> None:
        time.sleep(0.004 if is_ulysses else 0.0002 * tokens)

    trials = measure(run, 4096, alone)
    assert [trial.tokens for trial in trials] == [1, 2, 4, 8, 16, 32, 64]
    assert threshold(trials) == 16


def test_the_most_tokens_of_a_step_and_the_budget_bound_it() -> None:
    ran: list[int] = []

    def run(tokens: int, is_ulysses: bool) -> None:
        ran.append(tokens)
        time.sleep(0.002 if is_ulysses else 0.0)

    assert [trial.tokens for trial in measure(run, 12, alone)] == [1, 2, 4, 8, 12]
    assert max(ran) == 12
    assert len(measure(run, 4096, alone, budget_s=0.0)) == 1


def test_every_rank_uses_the_times_of_rank_0() -> None:
    """This rank's own times are the opposite."""
    measured = iter([(Trial(1, 1.0, 2.0), False), (Trial(2, 2.0, 1.0), False), (Trial(4, 2.0, 1.0), False)])
    trials = measure(lambda _tokens, _is_ulysses: None, 64, lambda _own: next(measured))
    assert [trial.tokens for trial in trials] == [1, 2, 4]
    assert threshold(trials) == 1


def test_where_tensor_parallelism_never_wins_no_step_runs_by_it() -> None:
    assert threshold([Trial(1, 2.0, 1.0), Trial(2, 2.0, 1.0)]) == 0
