"""Our proposer for vLLM's method "custom_class": trained speculators, suffix decoding, or both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omni_sp.llm.speculation import checkpoint
from omni_sp.llm.speculation.heads import Speculator
from omni_sp.llm.speculation.settings import SpeculationSettings
from omni_sp.llm.speculation.suffix import Draft, SuffixIndex
from omni_sp.llm.vllm import internals
from omni_sp.llm.vllm.speculation_internals import (
    RequestBatch,
    ShardedVocabulary,
    require_heads_fit,
    take_states,
    to_device,
)
from omni_sp.llm.vllm.step_metrics import StepCounter


class Proposer:
    """Drafts for the requests of a step.

    vLLM makes one on every rank, after sampling calls it on every rank, and schedules the drafts of rank 0. Suffix
    decoding works on rank 0 alone. A trained speculator is sharded over the ranks, so it runs on all of them, for the
    same requests: those that have new tokens, in steps of no more requests than the limit, which every rank knows. Rank
    0 decides afterwards which drafts it keeps. Other ranks return none, and learn of rank 0's drafts with the next
    step, as they learn of everything that is scheduled. No rank may decide by what it has drafted.

    An attribute named ``model`` would be taken for a draft model by vLLM.
    """

    def __init__(self, vllm_config: Any) -> None:
        settings = internals.settings_of(vllm_config)
        assert settings is not None, "our flags name this class"
        assert settings.speculation is not None, "our flags name this class"
        self._settings, self._vllm_config = settings.speculation, vllm_config
        self._max_length = internals.max_model_length(vllm_config)
        self._counts_file = settings.step_counts_file
        self._batch: RequestBatch | None = None
        self._heads: _Heads | None = None
        self._suffixes: _Suffixes | None = None
        self._counter: StepCounter | None = None
        self._drafted_by: dict[str, str] = {}  # who made the draft that a request's next step verifies

    def load_model(self, target: Any) -> None:
        """Load the trained speculator, where there is one. vLLM calls this when its model is loaded."""
        if self._settings.head is not None:
            self._heads = _Heads(self._settings, self._vllm_config, target)

    def attach(self, runner: Any) -> None:
        """Take the batch of vLLM's runner, which knows the names of the requests."""
        self._batch = RequestBatch(runner, needs_rows=self._heads is not None)
        if internals.world_rank() == 0:
            self._suffixes = _Suffixes(self._settings) if self._settings.enable_suffix else None
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
        batch = self._batch
        assert batch is not None, "our worker attaches the runner"
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        rows = [row for row, new in enumerate(sampled_token_ids) if new]
        limit = self._settings.disable_by_batch_size
        is_on = limit is None or len(sampled_token_ids) <= limit
        by_heads: list[list[int]] = [[] for _ in rows]
        if self._heads is not None and is_on and rows:
            last = [sampled_token_ids[row][-1] for row in rows]
            by_heads = self._heads.draft(batch.hidden_rows(rows, num_tokens), last)
        if internals.world_rank() != 0:
            return drafts
        names = [batch.names[row] for row in rows]
        room = [max(0, self._max_length - int(num_tokens[row]) - 1) for row in rows]
        by_suffix = [Draft([], 0.0)] * len(rows)
        if self._suffixes is not None:
            new = [len(sampled_token_ids[row]) for row in rows]
            self._suffixes.extend(names, [token_ids[row, : int(num_tokens[row])] for row in rows], new)
            self._suffixes.forget_all_but(batch)
            if is_on:
                by_suffix = self._suffixes.draft(names, room)
        self._count_accepted(names, [len(sampled_token_ids[row]) - 1 for row in rows])
        for row, name, most, head, suffix in zip(rows, names, room, by_heads, by_suffix, strict=True):
            own = head[:most]
            is_suffix = bool(suffix.tokens) and suffix.score >= len(own)
            drafts[row] = suffix.tokens if is_suffix else own
            if drafts[row]:
                self._drafted_by[name] = by = "suffix" if is_suffix else "head"
                if self._counter is not None:
                    self._counter.add_drafts(by, drafts=1, tokens=len(drafts[row]))
        return drafts

    def _count_accepted(self, names: Sequence[str], accepted: Sequence[int]) -> None:
        """Count the accepted tokens of the drafts before, by who made them."""
        for name, count in zip(names, accepted, strict=True):
            by = self._drafted_by.pop(name, None)
            if by is not None and count and self._counter is not None:
                self._counter.add_drafts(by, accepted=count)
        for name in [name for name in self._drafted_by if self._batch is not None and name not in self._batch]:
            del self._drafted_by[name]


class _Heads:
    """A trained speculator, sharded over the ranks, and the states from which it drafts."""

    def __init__(self, settings: SpeculationSettings, vllm_config: Any, target: Any) -> None:
        assert settings.head is not None, "the caller has looked"
        config = checkpoint.read_config(settings.head)
        require_heads_fit(vllm_config, settings.head, config, target)
        layers = ShardedVocabulary(vllm_config, config.vocab_size)
        example = next(target.parameters())
        with layers.current():
            self._speculator = Speculator(config, layers).to(example.device, layers.dtype).requires_grad_(False)
        self._speculator.load(checkpoint.weights(settings.head, config))
        for head in self._speculator.head:
            layers.finish(head)
        self._target, self._count = target, settings.head_tokens

    def draft(self, hidden_rows: Sequence[int], tokens: Sequence[int]) -> list[list[int]]:
        """Drafts from these rows of the step's hidden states and the tokens sampled from them. A collective."""
        states = take_states(self._target)
        chosen = states.index_select(0, to_device(hidden_rows, states))
        found: list[list[int]] = self._speculator.draft(chosen, to_device(tokens, states), self._count).tolist()
        return found


class _Suffixes:
    """The suffix index, kept up with the requests of a batch."""

    def __init__(self, settings: SpeculationSettings) -> None:
        self._index = SuffixIndex(settings)
        self._index.warm_up()

    def extend(self, names: Sequence[str], texts: Sequence[Any], new: Sequence[int]) -> None:
        """Enter the tokens that requests have more than before, of which the last ``new`` have just been sampled."""
        for name, text, count in zip(names, texts, new, strict=True):
            known = self._index.length(name)
            if known > len(text) - count:  # another request by the same name
                self._index.drop(name)
                known = 0
            if not known:
                known = len(text) - count
                self._index.extend(name, text[:known], is_answer=False)
            self._index.extend(name, text[known:])

    def forget_all_but(self, batch: RequestBatch) -> None:
        """Drop requests that have left."""
        for name in self._index.requests():
            if name not in batch:
                self._index.drop(name)

    def draft(self, names: Sequence[str], room: Sequence[int]) -> list[Draft]:
        """A draft for each request, of at most so many tokens."""
        return self._index.lookup(names, room)
