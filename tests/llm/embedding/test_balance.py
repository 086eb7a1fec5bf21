"""How a request is cut: every input once, in order, and the loads level afterwards."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_sp.llm.embedding.balance import cost_of, is_ids, split
from omni_sp.llm.embedding.settings import LEAST_LOADED, POLICIES, RANDOM, ROUND_ROBIN


@settings(deadline=None, max_examples=60)
@given(
    costs=st.lists(st.integers(16, 2000), min_size=1, max_size=1200),
    loads=st.lists(st.integers(0, 50_000), min_size=1, max_size=6),
    policy=st.sampled_from(POLICIES),
    turn=st.integers(0, 1000),
)
def test_every_input_goes_to_one_replica(costs: list[int], loads: list[int], policy: str, turn: int) -> None:
    parts = sorted(split(costs, loads, policy, turn), key=lambda part: part.start)
    assert [part.start for part in parts] == [0, *(part.end for part in parts[:-1])]
    assert parts[-1].end == len(costs)
    for part in parts:
        assert 0 < part.end - part.start <= 512
        assert part.cost == sum(costs[part.start : part.end])
        assert 0 <= part.replica < len(loads)


@settings(deadline=None, max_examples=60)
@given(
    costs=st.lists(st.integers(16, 500), min_size=50, max_size=400),
    loads=st.lists(st.integers(0, 20_000), min_size=2, max_size=6),
)
def test_least_loaded_levels(costs: list[int], loads: list[int]) -> None:
    """No replica that gets something ends above another by more than two inputs, or the least that is worth a part."""
    after = list(loads)
    for part in split(costs, loads, LEAST_LOADED, 0):
        after[part.replica] += part.cost
    used = [height for height, before in zip(after, loads, strict=True) if height > before]
    assert max(used) - min(after) <= 2 * max(costs) + 256


def test_small_requests_stay_whole() -> None:
    assert [part.replica for part in split([20], [300, 100, 200], LEAST_LOADED, 0)] == [1]
    assert len(split([20] * 12, [0, 0], LEAST_LOADED, 0)) == 1
    assert len(split([20] * 26, [0, 0], LEAST_LOADED, 0)) == 2


def test_round_robin_takes_turns_and_random_reaches_all() -> None:
    assert [split([20], [0, 9, 99], ROUND_ROBIN, turn)[0].replica for turn in range(5)] == [0, 1, 2, 0, 1]
    halves = split([100] * 10, [0, 10_000], ROUND_ROBIN, 1)
    assert [(part.replica, part.start, part.end) for part in halves] == [(1, 0, 5), (0, 5, 10)]
    assert {split([20], [0, 9, 99], RANDOM, 0)[0].replica for _ in range(200)} == {0, 1, 2}


@pytest.mark.parametrize(
    ("entry", "cost"), [("", 16), ("word " * 8, 26), ([1] * 10, 26), ("文" * 30, 46), ("\ud800", 17)]
)
def test_costs(entry: str | list[int], cost: int) -> None:
    assert cost_of(entry) == cost


def test_ids() -> None:
    assert is_ids([1, 2])
    assert not any(map(is_ids, ([], [1, True], [1.0], ["a"], "ab", None)))
