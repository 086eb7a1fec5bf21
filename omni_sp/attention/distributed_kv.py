"""Keys that stay where they are: queries come to them, and partial results go back to be merged by log-sum-exp.

What crosses between ranks grows with the queries alone. So a cache of keys and values can lie in pieces on the ranks,
however long it has become: the few queries of a new token, or of the next chunk of a prompt, are what travels.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from omni_sp.attention.kernels import KernelCall, attend, select_kernel
from omni_sp.attention.layout import SequenceLayout
from omni_sp.attention.merge import Merger
from omni_sp.collectives import exchange, gather
from omni_sp.mesh import Axis


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    axis: Axis,
    key_mask: torch.Tensor | None = None,
    scale: float,
    kernel: str = "auto",
) -> torch.Tensor:
    """Attention of queries that every rank has to keys that lie in pieces on the ranks: one gather, nothing else.

    Args:
        query: (batch, q_tokens, heads, head_dim), the same on all ranks. Each attends to all keys of all ranks.
        key, value: (batch, kv_tokens, kv_heads, head_dim), this rank's; also none.
        axis: the ranks. key_mask: (batch, kv_tokens) bool of this rank's keys, passed by all ranks or by none.

    Returns:
        (batch, q_tokens, heads, head_dim), bit for bit the same on all ranks that were given the same partial results.
    """
    part = _attend_all(query, key, value, key_mask, scale, kernel)
    if axis.size == 1:
        return part[0]
    return _merge(gather(_pack(*part)[None], [1] * axis.size, 0, axis).unbind(), query)


class ChunkedPrefillAttention:
    """Causal attention of a chunk of tokens to itself and to all that came before it, whose keys lie in pieces.

    Zigzag over all ranks gives them the same work: within the chunk, too, each rank attends for everybody, to its own
    keys alone.

    Args:
        layout: who holds which tokens of the chunk: ``SequenceLayout.zigzag(total, ring=axis.size, ulysses=1)``.
        axis: the ranks. device: where the tensors will be.
    """

    def __init__(self, layout: SequenceLayout, axis: Axis, device: torch.device) -> None:
        self._layout, self._axis = layout, axis
        positions = [torch.tensor(layout.positions(rank), dtype=torch.int64) for rank in range(axis.size)]
        self._order = torch.cat(positions).argsort().to(device)
        self._positions = [held.to(device) for held in positions]
        self._runs = _runs(positions[axis.rank].tolist())

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        key_mask: torch.Tensor | None = None,
        scale: float,
        kernel: str = "auto",
    ) -> torch.Tensor:
        """One gather of queries, one exchange of partial results.

        Args:
            query: (batch, own tokens of the chunk, heads, head_dim).
            key, value: (batch, kv_tokens, kv_heads, head_dim), this rank's: of earlier tokens in any order, and
                behind them those of its own tokens of the chunk.
            key_mask: (batch, kv_tokens) bool, passed by all ranks or by none.

        Returns:
            (batch, own tokens of the chunk, heads, head_dim).
        """
        lengths, axis = self._layout.query, self._axis
        queries = gather(query, lengths, 1, axis).index_select(1, self._order)
        out, lse = self._attend_own(queries, key, value, key_mask, scale, kernel)
        if axis.size == 1:
            return out
        packed = _pack(out, lse).transpose(0, 1)
        row = packed[0].numel()
        own = lengths[axis.rank]
        sizes = [length * row for length in lengths]
        returning = exchange(sizes, [own * row] * axis.size, packed.dtype, packed.device, axis)
        for place, positions in zip(returning.send_buffers, self._positions, strict=True):
            place.copy_(packed.index_select(0, positions).reshape(-1))
        returning.start()
        parts = returning.wait().view(axis.size, own, *packed.shape[1:]).transpose(1, 2)
        return _merge(parts.unbind(), query)

    def _attend_own(
        self,
        queries: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_mask: torch.Tensor | None,
        scale: float,
        kernel: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All queries of the chunk, in order, to the keys that are here."""

        def piece(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
            return key[:, start:stop], value[:, start:stop], None if key_mask is None else key_mask[:, start:stop]

        place = key.shape[1] - self._layout.key[self._axis.rank]
        merger = Merger()
        merger.add(*_attend_all(queries, *piece(0, place), scale, kernel))
        for start, length in self._runs:
            # Queries of the run see what lies before them in it, later ones see all of it, earlier ones nothing.
            run = piece(place, place + length)
            inside = _attend(queries[:, start : start + length], *run, True, scale, kernel)
            behind = _attend_all(queries[:, start + length :], *run, scale, kernel)
            merger.add(torch.cat([inside[0], behind[0]], 1), torch.cat([inside[1], behind[1]], 2), start)
            place += length
        return merger.result(queries.dtype)


def _runs(positions: list[int]) -> list[tuple[int, int]]:
    """(first position, length) of each run of positions that follow one another."""
    bounds = [0, *(i for i in range(1, len(positions)) if positions[i] != positions[i - 1] + 1), len(positions)]
    return [(positions[start], stop - start) for start, stop in pairwise(bounds) if stop > start]


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    kernel: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    call = KernelCall(query.device.type, query.dtype, query.shape[-1], key_mask is not None, is_causal)
    able = select_kernel(kernel, call)
    return attend(able, query, key, value, key_mask=key_mask, is_causal=is_causal, scale=scale)


def _attend_all(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    scale: float,
    kernel: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every query to every key. Query heads that share a key/value head become tokens of one head.

    So no kernel has to be given the keys once for every query head: a cache is not copied to be read.
    """
    heads, kv_heads = query.shape[2], key.shape[2]
    shape = (query.shape[1], heads // kv_heads)
    folded = query.unflatten(2, (kv_heads, shape[1])).transpose(2, 3).flatten(1, 2)
    out, lse = _attend(folded, key, value, key_mask, False, scale, kernel)
    out = out.unflatten(1, shape).transpose(2, 3).flatten(2, 3)
    return out, lse.unflatten(2, shape).transpose(2, 3).flatten(1, 2)


def _pack(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """(batch, tokens, heads, head_dim) with its log-sum-exp, all bits of it, behind each head's numbers."""
    tail = lse.transpose(1, 2).unsqueeze(-1).contiguous().view(out.dtype)
    return torch.cat([out, tail], dim=-1)


def _merge(parts: tuple[torch.Tensor, ...], like: torch.Tensor) -> torch.Tensor:
    """What :func:`_pack` made on each rank, merged in rank order."""
    exact = torch.float64 if like.dtype == torch.float64 else torch.float32
    head_dim = like.shape[-1]
    merger = Merger()
    for part in parts:
        # Cloned: a view of other bits wants memory that begins where its own does.
        lse = part[..., head_dim:].clone(memory_format=torch.contiguous_format).view(exact)
        merger.add(part[..., :head_dim], lse.squeeze(-1).transpose(1, 2))
    return merger.result(like.dtype)[0]
