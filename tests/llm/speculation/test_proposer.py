"""The proposer, between a stand-in for vLLM's runner and the suffix index."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from omni_sp.llm.speculation.proposer import SuffixProposer
from omni_sp.llm.speculation.settings import SpeculationSettings
from omni_sp.llm.vllm import internals
from omni_sp.llm.vllm.config import LlmParallelConfig
from omni_sp.llm.vllm.step_metrics import StepCounter, start_step_counter

TEXT = [5, 6, 7, 8, 9, 10, 11, 12]


class Batch:
    """A runner with requests, whose tokens so far are in rows."""

    def __init__(self, max_length: int = 64, **options: Any) -> None:
        self.counter: StepCounter = start_step_counter()
        settings = LlmParallelConfig(
            speculation=SpeculationSettings(**options), step_counts_file=str(self.counter.path)
        )
        vllm_config = SimpleNamespace(
            additional_config=settings.additional_config(), model_config=SimpleNamespace(max_model_len=max_length)
        )
        self.input_batch = SimpleNamespace(req_ids=[], req_id_to_index={})
        self.texts: dict[str, list[int]] = {}
        self.proposer = SuffixProposer(vllm_config)
        self.proposer.load_model(None)
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
    assert batch.proposer._index is not None
    assert batch.proposer._index.length("a") == 2


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
