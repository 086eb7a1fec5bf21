"""The number of tokens from which Ulysses is quicker than tensor parallelism is measured."""

from __future__ import annotations

from typing import Any

import pytest

from omni_sp.llm.vllm import autotune
from omni_sp.llm.vllm.autotune import Trial, measure, threshold


class Clock:
    """A clock that only moves when a step runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that the measurement reads."""
    clock = Clock()
    monkeypatch.setattr(autotune, "time", clock)
    return clock


def alone(value: Any) -> Any:
    return value


def test_measuring_ends_when_ulysses_has_won_twice(clock: Clock) -> None:
    """The time of one grows with the tokens, that of the other does not."""

    def run(tokens: int, is_ulysses: bool) -> None:
        clock.now += 4.0 if is_ulysses else 0.25 * tokens

    trials = measure(run, 4096, alone, budget_s=1e9)
    assert [trial.tokens for trial in trials] == [1, 2, 4, 8, 16, 32, 64]
    assert threshold(trials) == 16


def test_the_most_tokens_of_a_step_and_the_budget_bound_it(clock: Clock) -> None:
    ran: list[int] = []

    def run(tokens: int, is_ulysses: bool) -> None:
        ran.append(tokens)
        clock.now += 2.0 if is_ulysses else 0.0

    assert [trial.tokens for trial in measure(run, 12, alone, budget_s=1e9)] == [1, 2, 4, 8, 12]
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
