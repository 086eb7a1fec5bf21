"""Suffix decoding as a proposer of vLLM's method "custom_class"."""

from __future__ import annotations

from typing import Any

from omni_sp.llm.speculation.suffix import SuffixIndex
from omni_sp.llm.vllm import internals
from omni_sp.llm.vllm.step_metrics import StepCounter


class SuffixProposer:
    """Drafts for the requests of a step, from what the same and other requests have generated.

    vLLM makes one on every rank, after sampling calls it on every rank, and schedules the drafts of rank 0. The index
    is on rank 0 alone: other ranks draft nothing, and learn of rank 0's drafts with the next step, as they learn of
    everything that is scheduled. No other rank may decide by what it has drafted.

    An attribute named ``model`` would be taken for a draft model by vLLM.
    """

    def __init__(self, vllm_config: Any) -> None:
        settings = internals.settings_of(vllm_config)
        assert settings is not None, "our flags name this class"
        assert settings.speculation is not None, "our flags name this class"
        self._settings, self._max_length = settings.speculation, internals.max_model_length(vllm_config)
        self._counts_file = settings.step_counts_file
        self._batch: Any = None
        self._index: SuffixIndex | None = None
        self._counter: StepCounter | None = None

    def load_model(self, model: Any) -> None:
        """Part of vLLM's interface: there is no draft model to load."""

    def attach(self, runner: Any) -> None:
        """Take the batch of vLLM's runner, which knows the names of the requests."""
        self._batch = internals.request_batch(runner)
        if internals.world_rank() == 0:
            self._index = SuffixIndex(self._settings)
            self._index.warm_up()
            self._counter = StepCounter.open(self._counts_file)

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens: Any,
        token_ids: Any,
        slot_mappings: Any = None,  # noqa: ARG002
    ) -> list[list[int]]:
        """A draft for each request of a step; empty where none is made.

        Args:
            sampled_token_ids: the new tokens of each request; none where its prompt is not complete yet.
            num_tokens: the number of tokens of each request, the new ones included.
            token_ids: (requests, length) the tokens of each request.
            slot_mappings: part of vLLM's interface.
        """
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        index = self._index
        if index is None:
            return drafts
        names, accepted = self._batch.req_ids, 0
        rows = [row for row, new in enumerate(sampled_token_ids) if new]
        for row in rows:
            name, count, new = names[row], int(num_tokens[row]), len(sampled_token_ids[row])
            known = index.length(name)
            if known > count - new:  # another request by the same name
                index.drop(name)
                known = 0
            if not known:
                known = count - new
                index.extend(name, token_ids[row, :known], is_answer=False)
            index.extend(name, token_ids[row, known:count])
            accepted += new - 1
        for name in index.requests():
            if name not in self._batch.req_id_to_index:
                index.drop(name)
        limit = self._settings.disable_by_batch_size
        if limit is None or len(sampled_token_ids) <= limit:
            room = [self._max_length - int(num_tokens[row]) - 1 for row in rows]
            for row, draft in zip(rows, index.lookup([names[row] for row in rows], room), strict=True):
                drafts[row] = draft.tokens
        if self._counter is not None:
            self._counter.add_drafts(sum(map(bool, drafts)), sum(map(len, drafts)), accepted)
        return drafts
