"""The proposer, between a stand-in for vLLM's runner and the suffix index."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from omni_sp.llm.speculation.proposer import Proposer
from omni_sp.llm.speculation.settings import SpeculationSettings
from omni_sp.llm.vllm import internals
from omni_sp.llm.vllm.config import LlmParallelConfig
from omni_sp.llm.vllm.step_metrics import StepCounter, start_step_counter

TEXT = [5, 6, 7, 8, 9, 10, 11, 12]


class Heads:
    """A trained speculator that drafts 91, 92, 93 after anything, and notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], list[int]]] = []

    def draft(self, hidden_rows: list[int], tokens: list[int]) -> list[list[int]]:
        self.asked.append((hidden_rows, tokens))
        return [[91, 92, 93] for _ in tokens]


class Batch:
    """A runner with requests, whose tokens so far are in rows."""

    def __init__(self, max_length: int = 64, heads: Heads | None = None, **options: Any) -> None:
        self.counter: StepCounter = start_step_counter()
        settings = LlmParallelConfig(
            speculation=SpeculationSettings(**options), step_counts_file=str(self.counter.path)
        )
        vllm_config = SimpleNamespace(
            additional_config=settings.additional_config(), model_config=SimpleNamespace(max_model_len=max_length)
        )
        self.input_batch = SimpleNamespace(req_ids=[], req_id_to_index={}, num_computed_tokens_cpu=[])
        self.query_start_loc = SimpleNamespace(np=[])
        self.texts: dict[str, list[int]] = {}
        self.proposer = Proposer(vllm_config)
        if heads is None:
            self.proposer.load_model(None)
        else:
            self.proposer._heads = heads  # type: ignore[assignment]
        self.proposer.attach(self)

    def step(self, **new: list[int]) -> list[list[int]]:
        """Tokens that are sampled for each request of the batch; the others leave it."""
        names = list(new)
        self.input_batch.req_ids = names
        self.input_batch.req_id_to_index = {name: row for row, name in enumerate(names)}
        ids = np.zeros((len(names), 64), np.int32)
        for row, name in enumerate(names):
            self.texts[name] += new[name]
            ids[row, : len(self.texts[name])] = self.texts[name]
        counts = np.array([len(self.texts[name]) for name in names], np.int32)
        # Each request has passed through the model up to its last token but one, all in this step.
        self.query_start_loc.np = np.cumsum([0, *(counts - 1)])
        self.input_batch.num_computed_tokens_cpu = np.zeros(len(names), np.int32)
        return self.proposer.propose(list(new.values()), counts, ids, slot_mappings=None)


@pytest.fixture(autouse=True)
def rank(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rank of this process."""
    ranks = [0]
    monkeypatch.setattr(internals, "world_rank", lambda: ranks[0])
    return ranks


def test_drafts_come_from_a_requests_own_prompt_and_from_other_answers_and_are_counted() -> None:
    batch = Batch()
    batch.texts = {"a": list(TEXT), "b": [1, 2]}
    assert batch.step(a=[5], b=[]) == [[6], []]  # b's prompt is not complete yet
    assert batch.step(a=[6, 7], b=[20]) == [[8, 9, 10], []]
    assert batch.step(a=[8, 9, 10, 30], b=[8]) == [[], [9]]
    counts = batch.counter.read()
    assert (counts.drafts, counts.draft_tokens, counts.accepted_tokens) == (3, 5, 4)
    assert not counts.head_drafts


def test_a_request_that_left_is_forgotten_and_its_answer_is_not() -> None:
    batch = Batch()
    batch.texts = {"a": list(TEXT), "b": [1]}
    batch.step(a=[40], b=[2])
    batch.texts["a"] += [41, 42]  # tokens of steps in which vLLM does not ask for drafts
    batch.step(a=[43], b=[3])
    assert batch.step(b=[41]) == [[42]]
    assert batch.step(b=[7]) == [[]]  # only in the prompt of a
    batch.texts["a"] = [50, 51]  # the name again
    assert batch.step(a=[50], b=[60]) == [[51], []]
    batch.texts["a"] = [60]  # and once more, without a step in between
    assert batch.step(a=[61], b=[62]) == [[], []]
    assert batch.proposer._suffixes is not None
    assert batch.proposer._suffixes._index.length("a") == 2


def test_no_drafts_beyond_the_longest_request_or_in_large_batches() -> None:
    batch = Batch(max_length=13, disable_by_batch_size=2)
    batch.texts = {"a": list(TEXT), "b": list(TEXT), "c": list(TEXT)}
    assert batch.step(a=[5, 6, 7], b=[5], c=[5]) == [[], [], []]
    assert batch.step(a=[8], b=[6]) == [[], [7, 8]]  # 12 tokens of 13, and 10


def test_other_ranks_draft_nothing(rank: list[int]) -> None:
    rank[0] = 1
    batch = Batch()
    batch.texts = {"a": list(TEXT)}
    assert batch.step(a=[5, 6]) == [[]]
    assert not batch.counter.read().drafts


def test_a_speculator_drafts_where_suffix_decoding_expects_less_and_each_is_counted() -> None:
    heads = Heads()
    batch = Batch(heads=heads, head="x", head_tokens=3)
    batch.texts = {"a": list(TEXT), "b": [1, 2], "c": [3]}
    # Suffix decoding expects one token of a to be right, and a speculator three.
    assert batch.step(a=[5], b=[20], c=[]) == [[91, 92, 93], [91, 92, 93], []]
    assert heads.asked == [([7, 9], [5, 20])]  # the rows before the new tokens; none of c, which is not complete yet
    assert batch.step(a=[6, 7], b=[91, 92, 21]) == [[8, 9, 10], [91, 92, 93]]
    assert batch.step(a=[8, 9, 10, 30], b=[22]) == [[91, 92, 93], [91, 92, 93]]
    counts = batch.counter.read()
    assert (counts.drafts, counts.draft_tokens, counts.accepted_tokens) == (1, 3, 3)
    assert (counts.head_drafts, counts.head_draft_tokens, counts.head_accepted_tokens) == (5, 15, 3)


def test_a_speculator_drafts_alone_and_not_beyond_the_longest_request_or_in_large_batches() -> None:
    heads = Heads()
    options = {"enable_suffix": False, "disable_by_batch_size": 2}
    batch = Batch(max_length=12, heads=heads, head="x", head_tokens=3, **options)
    batch.texts = {"a": list(TEXT), "b": list(TEXT), "c": [5]}
    assert batch.step(a=[6], b=[6], c=[6]) == [[], [], []]
    assert not heads.asked
    assert batch.step(a=[7], b=[5, 6]) == [[91], []]  # 10 tokens of 12, and 11


def test_other_ranks_run_the_speculator_for_the_same_requests_and_return_nothing(rank: list[int]) -> None:
    """Also where rank 0 takes another draft, or has no room for one."""
    asked = []
    for rank[0] in (0, 1):
        heads = Heads()
        batch = Batch(max_length=16, heads=heads, head="x", head_tokens=3)
        batch.texts = {"a": list(TEXT), "b": list(range(20, 35))}
        drafts = [batch.step(a=[5, 6, 7], b=[5]), batch.step(a=[8, 9], b=[])]
        asked.append(heads.asked)
        assert any(map(any, drafts)) == (rank[0] == 0)
    assert asked[0] == asked[1]
    assert [len(tokens) for _, tokens in asked[0]] == [2, 1]
