"""Greedy generation: each rank stores the keys and values of its own tokens, and the ranks store new ones in turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from omni_sp.attention import SequenceLayout
from omni_sp.collectives import gather_ints
from omni_sp.errors import InvalidInputError
from omni_sp.llm.hf.attention import AttentionPhase, NextChunk, NextToken, Prefill
from omni_sp.llm.hf.kv_cache import TokenCache
from omni_sp.llm.hf.sequence_shard import SequenceShard, key_mask, prompt_layout, require_same_inputs
from omni_sp.mesh import ParallelMesh
from omni_sp.validation import require_int


class Streamer(Protocol):
    """The interface of transformers' streamers."""

    def put(self, value: Tensor) -> None:
        """Take the prompt, (batch, tokens), and later the tokens of each step, (batch,)."""

    def end(self) -> None:
        """Note that the answer is complete."""


class DistributedModel(Protocol):
    """What generation needs of `omni_sp.llm.hf.model.ParallelModel`, which offers it."""

    model: Any
    base: Any
    head: Any
    mesh: ParallelMesh
    kernel: str

    def run(self, phase: AttentionPhase, position_ids: Tensor, **inputs: Any) -> Any:
        """Run the model's own code, without its head, over this rank's tokens."""

    def set_cache(self, cache: TokenCache | None) -> None:
        """Note the keys and values that this rank now holds."""


@dataclass(frozen=True)
class _Prompt:
    """A batch of sequences, padded on the left.

    Attributes:
        ids: (batch, tokens).
        mask: (batch, tokens) bool, True = a real token; None where all are real.
        positions: (batch, tokens), each token's position in its own sequence.
    """

    ids: Tensor
    mask: Tensor | None
    positions: Tensor

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor | None) -> _Prompt:
        """Move the padding of each sequence to the front; no token attends to it, so its position does not matter."""
        if mask is None:
            return cls(ids, None, torch.arange(ids.shape[1], device=ids.device).expand(ids.shape))
        empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise InvalidInputError(f"rows {empty} of the prompt are padding alone: each needs a token to go on from")
        order = mask.to(torch.int8).argsort(dim=1, stable=True)
        mask = mask.gather(1, order)
        return cls(ids.gather(1, order), mask, (mask.cumsum(1) - 1).clamp_min(0))


@dataclass(frozen=True)
class _KvPlan:
    """Which rank stores the keys and values of which token, known before the first forward.

    Attributes:
        chunks: start and layout of each chunk of the prompt.
        new_token_ranks: the rank that stores each new token.
        num_stored: the number of tokens that each rank stores in the end.
    """

    chunks: tuple[tuple[int, SequenceLayout], ...]
    new_token_ranks: tuple[int, ...]
    num_stored: tuple[int, ...]

    @classmethod
    def of(cls, tokens: int, new_tokens: int, chunk: int | None, mesh: ParallelMesh) -> _KvPlan:
        """A plan that balances the ranks. The last new token is never an input, so it is not stored."""
        size = mesh.sequence.size
        chunks = []
        for start in range(0, tokens, chunk or tokens):
            length = min(chunk or tokens, tokens - start)
            # After the first chunk keys do not travel: zigzag over all ranks balances best, whatever the degrees.
            later = start and SequenceLayout.zigzag(length, ring=size, ulysses=1)
            chunks.append((start, later or prompt_layout(length, mesh)))
        stored = [sum(layout.key[rank] for _, layout in chunks) for rank in range(size)]
        new_token_ranks = []
        for _ in range(new_tokens - 1):
            rank = stored.index(min(stored))
            new_token_ranks.append(rank)
            stored[rank] += 1
        return cls(tuple(chunks), tuple(new_token_ranks), tuple(stored))


@torch.no_grad()
def greedy(
    parallel: DistributedModel,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    prefill_chunk: int | None,
    streamer: Streamer | None,
) -> Tensor:
    """Generate as `omni_sp.llm.hf.model.ParallelModel.generate` documents."""
    _check(parallel, input_ids, max_new_tokens, prefill_chunk)
    mask = key_mask(attention_mask, input_ids)
    end_ids, padding = _end_and_padding(parallel.model, eos_token_id, pad_token_id)
    require_same_inputs(
        parallel.mesh.sequence,
        batch=input_ids.shape[0],
        tokens=input_ids.shape[1],
        input_ids=input_ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        prefill_chunk=prefill_chunk,
        eos_token_id=torch.tensor(sorted(end_ids)),
        pad_token_id=padding,
    )
    prompt = _Prompt.of(input_ids, mask)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    running = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    stops = torch.tensor(sorted(end_ids), device=input_ids.device, dtype=input_ids.dtype)
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
) -> Iterator[Tensor]:
    """Yield the tokens of each step, (batch,). What the caller writes into them is the next step's input."""
    mesh, kernel, num_tokens = parallel.mesh, parallel.kernel, prompt.ids.shape[1]
    axis, span = mesh.sequence, num_tokens + max_new_tokens
    plan = _KvPlan.of(num_tokens, max_new_tokens, prefill_chunk, mesh)
    mask = None if prompt.mask is None else prompt.mask[:, :0]
    cache = TokenCache(len(parallel.base.layers), plan.num_stored[axis.rank], mask)
    parallel.set_cache(cache)
    for start, layout in plan.chunks:
        chunk = slice(start, start + sum(layout.query))
        shard = SequenceShard(layout, axis, prompt.ids.device)
        own_mask = None if prompt.mask is None else shard.shard_tokens(prompt.mask[:, chunk])
        phase: Prefill | NextChunk
        if start == 0:
            phase = Prefill(mesh, shard, own_mask, span, kernel, cache)
        else:
            phase = NextChunk(shard, own_mask, span, kernel, cache)
        ids, positions = (shard.shard_for_model(whole[:, chunk]) for whole in (prompt.ids, prompt.positions))
        hidden = parallel.run(phase, positions, input_ids=ids).last_hidden_state
    # Only the last token's hidden state is gathered; every rank computes its logits, here and for new tokens.
    last = torch.tensor([chunk.stop - chunk.start - 1])
    token = _choose(parallel, shard.gather_selected(shard.select(hidden, last), last))
    yield token
    position = prompt.positions[:, -1:]
    for rank in plan.new_token_ranks:
        position = position + 1
        step = NextToken(mesh, rank == axis.rank, span, kernel, cache)
        hidden = parallel.run(step, position, input_ids=token[:, None]).last_hidden_state
        token = _choose(parallel, hidden)
        yield token


def _choose(parallel: DistributedModel, hidden: Tensor) -> Tensor:
    """The most likely next token for (batch, 1, hidden size).

    All ranks take the first rank's choice: different machines may round differently, and ranks that continued with
    different tokens would generate nonsense.
    """
    chosen = parallel.head(hidden)[:, -1].float().argmax(dim=-1)
    first = gather_ints(chosen.tolist(), parallel.mesh.sequence)[0]
    return torch.tensor(first, dtype=torch.int64, device=chosen.device)


def _check(parallel: DistributedModel, input_ids: Tensor, max_new_tokens: int, prefill_chunk: int | None) -> None:
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


def _end_and_padding(
    model: Any, eos_token_id: int | Sequence[int] | None, pad_token_id: int | None
) -> tuple[set[int], int]:
    """The tokens that end a sequence, and the one that pads it afterwards."""
    own = model.generation_config
    if eos_token_id is None:
        eos_token_id = own.eos_token_id
    if eos_token_id is None:
        eos_token_id = ()
    end_ids = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    if pad_token_id is None:
        pad_token_id = own.pad_token_id
    if pad_token_id is None:
        # Transformers does the same.
        pad_token_id = eos_token_id if isinstance(eos_token_id, int) else next(iter(eos_token_id), 0)
    return end_ids, pad_token_id
