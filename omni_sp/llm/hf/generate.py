"""Greedy generation: a prompt's keys and values stay where its prefill left them, new ones go to the ranks in turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from omni_sp.attention import SequenceLayout
from omni_sp.collectives import gather_ints
from omni_sp.errors import InvalidInputError
from omni_sp.llm.hf.attention import AttentionPhase, NextChunk, NextToken, Prefill
from omni_sp.llm.hf.kv_cache import TokenCache
from omni_sp.llm.hf.sequence_shard import SequenceShard, key_mask, prompt_layout, require_same_inputs
from omni_sp.mesh import ParallelMesh
from omni_sp.validation import require_int


class Streamer(Protocol):
    """What transformers calls a streamer."""

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt (batch, tokens), later each step's tokens (batch,)."""

    def end(self) -> None:
        """Nothing more comes."""


class DistributedModel(Protocol):
    """What generation needs of :class:`omni_sp.llm.hf.model.ParallelModel`, which offers it."""

    model: Any
    base: Any
    head: Any
    mesh: ParallelMesh
    kernel: str

    def run(self, phase: AttentionPhase, position_ids: torch.Tensor, **inputs: Any) -> Any:
        """Run the model's own code, without its head, over this rank's tokens."""

    def set_cache(self, cache: TokenCache | None) -> None:
        """Note the keys and values that this rank now holds."""


@dataclass(frozen=True)
class _Prompt:
    """Rows that end together.

    Attributes:
        ids: (batch, tokens), real tokens last. mask: (batch, tokens) bool, or None where all are real.
        positions: (batch, tokens), each token's place in its own row.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    positions: torch.Tensor

    @classmethod
    def of(cls, ids: torch.Tensor, mask: torch.Tensor | None) -> _Prompt:
        """Move padding to the front, wherever it was: what nobody attends to has no place that matters."""
        if mask is None:
            return cls(ids, None, torch.arange(ids.shape[1], device=ids.device).expand(ids.shape))
        empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise InvalidInputError(f"rows {empty} of the prompt are padding alone: each needs a token to go on from")
        order = mask.to(torch.int8).argsort(dim=1, stable=True)
        mask = mask.gather(1, order)
        return cls(ids.gather(1, order), mask, (mask.cumsum(1) - 1).clamp_min(0))

    @property
    def tokens(self) -> int:
        """Of the longest row."""
        return self.ids.shape[1]


@dataclass(frozen=True)
class _KvPlan:
    """Which rank keeps which token's keys and values: known before the first token passes.

    Attributes:
        chunks: start and layout of each part of the prompt. turns: the rank that keeps each token fed back.
    """

    chunks: tuple[tuple[int, SequenceLayout], ...]
    turns: tuple[int, ...]

    @classmethod
    def of(cls, tokens: int, new_tokens: int, chunk: int | None, mesh: ParallelMesh) -> _KvPlan:
        """The last new token is never fed back, and so is kept nowhere."""
        size = mesh.sequence.size
        chunks = []
        for start in range(0, tokens, chunk or tokens):
            length = min(chunk or tokens, tokens - start)
            # Behind the first chunk keys do not travel: whole zigzag, whatever the degrees, balances best.
            later = start and SequenceLayout.zigzag(length, ring=size, ulysses=1)
            chunks.append((start, later or prompt_layout(length, mesh)))
        held = [sum(layout.key[rank] for _, layout in chunks) for rank in range(size)]
        turns = []
        for _ in range(new_tokens - 1):
            turns.append(held.index(min(held)))
            held[turns[-1]] += 1
        return cls(tuple(chunks), tuple(turns))

    def kept_by(self, rank: int) -> int:
        """Tokens that a rank holds in the end."""
        return sum(layout.key[rank] for _, layout in self.chunks) + self.turns.count(rank)


@torch.no_grad()
def greedy(
    parallel: DistributedModel,
    input_ids: torch.Tensor,
    *,
    max_new_tokens: int,
    attention_mask: torch.Tensor | None,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    prefill_chunk: int | None,
    streamer: Streamer | None,
) -> torch.Tensor:
    """See :meth:`ParallelModel.generate`."""
    _check(parallel, input_ids, max_new_tokens, prefill_chunk)
    mask = key_mask(attention_mask, input_ids)
    ends, padding = _special(parallel.model, eos_token_id, pad_token_id)
    require_same_inputs(
        parallel.mesh.sequence,
        batch=input_ids.shape[0],
        tokens=input_ids.shape[1],
        input_ids=input_ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        prefill_chunk=prefill_chunk,
        eos_token_id=torch.tensor(sorted(ends)),
        pad_token_id=padding,
    )
    prompt = _Prompt.of(input_ids, mask)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    running = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    stops = torch.tensor(sorted(ends), device=input_ids.device, dtype=input_ids.dtype)
    added = []
    try:
        for chosen in _tokens(parallel, prompt, max_new_tokens, prefill_chunk):
            chosen.masked_fill_(~running, padding)
            running &= ~torch.isin(chosen, stops)
            added.append(chosen)
            if streamer is not None:
                streamer.put(chosen.cpu())
            if not running.any():
                break
    finally:
        parallel.set_cache(None)
    if streamer is not None:
        streamer.end()
    return torch.cat([input_ids, torch.stack(added, dim=1)], dim=1)


def _tokens(
    parallel: DistributedModel, prompt: _Prompt, max_new_tokens: int, prefill_chunk: int | None
) -> Iterator[torch.Tensor]:
    """(batch,) token after token. What the taker writes into one is what is fed back."""
    mesh, kernel, span = parallel.mesh, parallel.kernel, prompt.tokens + max_new_tokens
    axis = mesh.sequence
    plan = _KvPlan.of(prompt.tokens, max_new_tokens, prefill_chunk, mesh)
    mask = None if prompt.mask is None else prompt.mask[:, :0]
    cache = TokenCache(len(parallel.base.layers), plan.kept_by(axis.rank), mask)
    parallel.set_cache(cache)
    for start, layout in plan.chunks:
        part = slice(start, start + sum(layout.query))
        shard = SequenceShard(layout, axis, prompt.ids.device)
        own_mask = None if prompt.mask is None else shard.shard_tokens(prompt.mask[:, part])
        phase: Prefill | NextChunk
        if start == 0:
            phase = Prefill(mesh, shard, own_mask, span, kernel, cache)
        else:
            phase = NextChunk(shard, own_mask, span, kernel, cache)
        ids, positions = (shard.shard_for_model(whole[:, part]) for whole in (prompt.ids, prompt.positions))
        hidden = parallel.run(phase, positions, input_ids=ids).last_hidden_state
    # Only the last token's hidden state travels; every rank makes its logits, as it does for all that follow.
    last = torch.tensor([part.stop - part.start - 1])
    token = _choose(parallel, shard.gather_selected(shard.select(hidden, last), last))
    yield token
    position = prompt.positions[:, -1:]
    for turn in plan.turns:
        position = position + 1
        step = NextToken(mesh, turn == axis.rank, span, kernel, cache)
        hidden = parallel.run(step, position, input_ids=token[:, None]).last_hidden_state
        token = _choose(parallel, hidden)
        yield token


def _choose(parallel: DistributedModel, hidden: torch.Tensor) -> torch.Tensor:
    """The most likely next token for (batch, 1, hidden size).

    All ranks take what the first one chose: unlike machines may round unlike, and ranks that went on from different
    tokens would answer with nonsense.
    """
    chosen = parallel.head(hidden)[:, -1].float().argmax(dim=-1)
    first = gather_ints(chosen.tolist(), parallel.mesh.sequence)[0]
    return torch.tensor(first, dtype=torch.int64, device=chosen.device)


def _check(parallel: DistributedModel, input_ids: torch.Tensor, max_new_tokens: int, prefill_chunk: int | None) -> None:
    if parallel.head is None:
        raise InvalidInputError(f"{type(parallel.model).__name__} has no head and cannot generate: load …ForCausalLM")
    if input_ids.ndim != 2 or not input_ids.numel() or input_ids.dtype != torch.int64:
        raise InvalidInputError(
            f"input_ids of shape {tuple(input_ids.shape)} and {input_ids.dtype}: give (batch, tokens) of int64, at "
            "least one token"
        )
    for name, value in (("max_new_tokens", max_new_tokens), ("prefill_chunk", prefill_chunk)):
        if value is not None:
            require_int(name, value, minimum=1, error=InvalidInputError)


def _special(model: Any, eos_token_id: int | Sequence[int] | None, pad_token_id: int | None) -> tuple[set[int], int]:
    """The tokens that end a row, and the one that follows its end."""
    own = model.generation_config
    if eos_token_id is None:
        eos_token_id = own.eos_token_id
    if eos_token_id is None:
        eos_token_id = ()
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    if pad_token_id is None:
        pad_token_id = own.pad_token_id
    if pad_token_id is None:
        # As transformers does.
        first = eos_token_id if isinstance(eos_token_id, int) else next(iter(eos_token_id), 0)
        pad_token_id = first
    return ends, pad_token_id
