"""Attention over a KV cache whose tokens are spread over the ranks: keys stay, and queries are sent to them.

Each rank attends to its own keys, and the partial results are merged by log-sum-exp. What crosses between ranks grows
with the number of queries alone, however long the cache has become: the queries of a new token, or of the next chunk of
a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor

from omni_sp.attention.kernels import AttentionArgs, KeyBlock, attend, attention_args
from omni_sp.attention.layout import SequenceLayout
from omni_sp.attention.merge import Merger
from omni_sp.collectives import exchange, gather
from omni_sp.mesh import Axis


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    axis: Axis,
    key_mask: Tensor | None = None,
    scale: float,
    kernel: str = "auto",
) -> Tensor:
    """Attention of queries that every rank has to the keys of all ranks, with one gather.

    Args:
        query: (batch, q_tokens, heads, head_dim), the same on all ranks. Each query attends to all keys.
        key: (batch, kv_tokens, kv_heads, head_dim), this rank's, as the value is; it may have no tokens.
        key_mask: (batch, kv_tokens) bool of this rank's keys, passed by all ranks or by none.

    Returns:
        (batch, q_tokens, heads, head_dim), bit for bit the same on all ranks.
    """
    args = attention_args(
        query, key_mask, is_causal=False, scale=scale, kernel=kernel, num_tokens=min(query.shape[1], key.shape[1])
    )
    out, lse = _attend_all(query, KeyBlock(key, value, key_mask), args)
    if axis.size == 1:
        return out
    return _merge(gather(_pack(out, lse)[None], [1] * axis.size, 0, axis).unbind(), query.dtype)


class ChunkedPrefillAttention:
    """Causal attention of a chunk of tokens to itself and to all earlier tokens, whose keys are spread over the ranks.

    Each rank computes the attention of all queries of the chunk to its own keys. Zigzag over all ranks gives them the
    same work.

    Args:
        layout: which rank holds which tokens of the chunk: ``SequenceLayout.zigzag(total, ring=axis.size, ulysses=1)``.
    """

    def __init__(self, layout: SequenceLayout, axis: Axis, device: torch.device) -> None:
        self._layout, self._axis = layout, axis
        positions = [torch.tensor(layout.positions(rank), dtype=torch.int64) for rank in range(axis.size)]
        self._order = torch.cat(positions).argsort().to(device)
        self._positions = [of_rank.to(device) for of_rank in positions]
        self._runs = _runs(positions[axis.rank].tolist())

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_mask: Tensor | None = None,
        scale: float,
        kernel: str = "auto",
    ) -> Tensor:
        """Attend with one gather of queries and one exchange of partial results.

        Args:
            query: (batch, own tokens of the chunk, heads, head_dim).
            key: (batch, kv_tokens, kv_heads, head_dim), this rank's: first those of earlier tokens in any order, then
                those of its own tokens of the chunk. The value is of the same tokens.
            key_mask: (batch, kv_tokens) bool, passed by all ranks or by none.

        Returns:
            (batch, own tokens of the chunk, heads, head_dim).
        """
        lengths, axis = self._layout.query, self._axis
        # Every rank chooses both kernels, whether it needs them or not: where there is none, all ranks raise alike.
        causal, whole = (
            attention_args(
                query,
                key_mask,
                is_causal=is_causal,
                scale=scale,
                kernel=kernel,
                num_tokens=min(query.shape[1], key.shape[1]),
            )
            for is_causal in (True, False)
        )
        queries = gather(query, lengths, 1, axis).index_select(1, self._order)
        out, lse = self._attend_own_keys(queries, KeyBlock(key, value, key_mask), causal, whole)
        if axis.size == 1:
            return out
        packed = _pack(out, lse).transpose(0, 1)
        width, own = packed[0].numel(), lengths[axis.rank]
        send_sizes = [length * width for length in lengths]
        pending = exchange(send_sizes, [own * width] * axis.size, packed.dtype, packed.device, axis)
        for send_buffer, positions in zip(pending.send_buffers, self._positions, strict=True):
            send_buffer.copy_(packed.index_select(0, positions).reshape(-1))
        pending.start()
        partials = pending.wait().view(axis.size, own, *packed.shape[1:]).transpose(1, 2)
        return _merge(partials.unbind(), query.dtype)

    def _attend_own_keys(
        self, queries: Tensor, block: KeyBlock, causal: AttentionArgs, whole: AttentionArgs
    ) -> tuple[Tensor, Tensor]:
        """Attention of all queries of the chunk, in order, to this rank's keys."""
        start = block.key.shape[1] - self._layout.key[self._axis.rank]
        merger = Merger()
        merger.add(*_attend_all(queries, block.tokens(0, start), whole))
        for first, length in self._runs:
            # Queries of the run attend to its earlier keys, later queries to all its keys, earlier queries to none.
            run = block.tokens(start, start + length)
            out, lse = attend(queries[:, first : first + length], run, causal)
            later_out, later_lse = _attend_all(queries[:, first + length :], run, whole)
            merger.add(torch.cat([out, later_out], 1), torch.cat([lse, later_lse], 2), first)
            start += length
        return merger.result(queries.dtype)


def _runs(positions: list[int]) -> list[tuple[int, int]]:
    """(first position, length) of each run of consecutive positions."""
    bounds = [0, *(i for i in range(1, len(positions)) if positions[i] != positions[i - 1] + 1), len(positions)]
    return [(positions[start], stop - start) for start, stop in pairwise(bounds) if stop > start]


def _attend_all(query: Tensor, block: KeyBlock, args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """Attention of every query to every key. Query heads that share a key/value head become tokens of one head.

    So no kernel gets keys that are repeated for every query head: the cache is read without being copied.
    """
    kv_heads = block.key.shape[2]
    tokens_and_repeats = (query.shape[1], query.shape[2] // kv_heads)
    folded = query.unflatten(2, (kv_heads, tokens_and_repeats[1])).transpose(2, 3).flatten(1, 2)
    out, lse = attend(folded, block, args)
    out = out.unflatten(1, tokens_and_repeats).transpose(2, 3).flatten(2, 3)
    return out, lse.unflatten(2, tokens_and_repeats).transpose(2, 3).flatten(1, 2)


def _pack(out: Tensor, lse: Tensor) -> Tensor:
    """(batch, tokens, heads, head_dim + some): behind each head's output the bits of its log-sum-exp."""
    lse_bits = lse.transpose(1, 2).unsqueeze(-1).contiguous().view(out.dtype)
    return torch.cat([out, lse_bits], dim=-1)


def _merge(partials: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    """The attention over all keys, from what `_pack` made on each rank, merged in rank order."""
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    lse_width = lse_dtype.itemsize // dtype.itemsize
    merger = Merger()
    for packed in partials:
        # Cloned, because a view as another dtype needs an aligned start.
        lse = packed[..., -lse_width:].clone(memory_format=torch.contiguous_format).view(lse_dtype)
        merger.add(packed[..., :-lse_width], lse.squeeze(-1).transpose(1, 2))
    return merger.result(dtype)[0]
