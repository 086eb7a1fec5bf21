"""Attention over all ranks: Ulysses inside, ring outside, any kernel on each device.

Source: the combination of both is USP (arXiv 2405.07719).
"""

from __future__ import annotations

import torch
from torch import Tensor

from omni_sp.attention.kernels import AttentionArgs, KeyBlock, attend, attention_args
from omni_sp.attention.layout import HeadShare, SequenceLayout, head_shares
from omni_sp.attention.overlap import choose_head_groups, ulysses_attention
from omni_sp.attention.ring import RingLayout, ring_attention
from omni_sp.attention.ulysses import UlyssesLayout
from omni_sp.collectives import require_equal
from omni_sp.errors import ShardingError, UnsupportedAttentionError
from omni_sp.mesh import Axis, ParallelMesh

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def sequence_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mesh: ParallelMesh,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    layout: SequenceLayout | None = None,
    kernel: str = "auto",
    head_groups: int | None = None,
) -> Tensor:
    """Attention over a sequence whose tokens are spread over the ranks, equal to attention over the whole sequence.

    All ranks of ``mesh.sequence`` call it at the same point of the program. They may hold different numbers of tokens,
    also none.

    Args:
        query: (batch, q_tokens, heads, head_dim) of this rank's tokens.
        key: (batch, kv_tokens, kv_heads, head_dim) of this rank's tokens; heads = n × kv_heads.
        value: (batch, kv_tokens, kv_heads, head_dim) of this rank's tokens.
        mesh: the ranks.
        key_mask: (batch, kv_tokens) bool of this rank's keys, True = attend. Passed by all ranks or by none. A query
            that no key may attend gets output 0.
        is_causal: each token attends to itself and to earlier tokens; query and key are the same tokens. The ranks
            hold consecutive tokens in rank order (ring-major), unless the layout is ``SequenceLayout.zigzag(...)``,
            which gives all ranks the same work.
        scale: the scores are multiplied by it; None means 1/sqrt(head_dim).
        layout: how many tokens each rank holds, where the caller knows. Passed by all ranks or by none: None asks the
            other ranks with one small exchange, which also checks that all ranks hold tensors that fit together.
        kernel: "auto", or one of ``omni_sp.attention.kernel_names()``.
        head_groups: into how many groups Ulysses splits each rank's heads, so that one group's exchange hides behind
            another's attention. With 1 nothing overlaps. None chooses by shape and device. The same on all ranks.

    Returns:
        (batch, q_tokens, heads, head_dim), contiguous, for this rank's queries.

    Raises:
        UnsupportedAttentionError: shapes or dtypes do not fit together, gradients are wanted, or no kernel can do it.
        ShardingError: the ranks hold tensors that do not fit together (checked where ``layout`` is None, and always
            with ``ParallelMesh(..., check=True)``).
    """
    _check_inputs(query, key, value, key_mask)
    axis = mesh.sequence
    if layout is None or mesh.check:
        agreed = agree_on_layout(query, key, key_mask=key_mask, is_causal=is_causal, axis=axis)
        if layout is not None and (layout.query, layout.key) != (agreed.query, agreed.key):
            raise ShardingError(f"the caller's layout is {layout}, but the ranks hold {agreed}")
        layout = layout or agreed
    _check_layout(query, key, layout, mesh, is_causal)
    args = attention_args(query, key_mask, is_causal=is_causal, scale=scale, kernel=kernel)
    return _hybrid_attention(query, KeyBlock(key, value, key_mask), mesh, layout, args, head_groups)


def _hybrid_attention(
    query: Tensor,
    block: KeyBlock,
    mesh: ParallelMesh,
    layout: SequenceLayout,
    args: AttentionArgs,
    head_groups: int | None,
) -> Tensor:
    """Ulysses inside, ring outside. Every decision follows from layout and head counts: all ranks decide alike."""
    degree, ring = mesh.ulysses.size, mesh.ring
    key_lengths = [sum(layout.key[start : start + degree]) for start in range(0, mesh.sequence.size, degree)]
    ring_layout = RingLayout(ring, key_lengths, layout.front_lengths)

    def attend_group(query: Tensor, block: KeyBlock, share: HeadShare) -> Tensor:
        return ring_attention(query, block, ring_layout, args, share.key_of_query)

    num_heads, num_kv_heads = query.shape[2], block.key.shape[2]
    if degree == 1:
        return attend_group(query, block, head_shares(num_heads, num_kv_heads, 1)[0][0]).contiguous()
    if head_groups is None:
        # Of the average Ulysses group, not of this one: Ulysses groups of different length must not choose differently,
        # or ring ranks would pass each other blocks of different heads.
        group_tokens = sum(layout.query) // ring.size
        head_bytes = group_tokens * query.shape[0] * query.shape[3] * query.element_size()
        head_groups = choose_head_groups(query.device.type, num_heads, degree, head_bytes)
    own = slice(ring.rank * degree, (ring.rank + 1) * degree)
    groups = [
        UlyssesLayout(mesh.ulysses, heads, layout.query[own], layout.key[own])
        for heads in head_shares(num_heads, num_kv_heads, degree, head_groups)
    ]
    return ulysses_attention(query, block, groups, attend_group)


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Attention to keys that are all on this rank: nothing is exchanged.

    Args:
        query: (batch, q_tokens, heads, head_dim).
        key: (batch, kv_tokens, kv_heads, head_dim); heads = n × kv_heads.
        value: (batch, kv_tokens, kv_heads, head_dim).
        key_mask: (batch, kv_tokens) bool, True = attend. A query that no key may attend gets output 0.
        is_causal: each token attends to itself and to earlier tokens; query and key are the same tokens.
        scale: the scores are multiplied by it; None means 1/sqrt(head_dim).
        kernel: "auto", or one of ``omni_sp.attention.kernel_names()``.

    Returns:
        (batch, q_tokens, heads, head_dim).

    Raises:
        UnsupportedAttentionError: shapes or dtypes do not fit together, gradients are wanted, or no kernel can do it.
    """
    _check_inputs(query, key, value, key_mask)
    share = head_shares(query.shape[2], key.shape[2], 1)[0][0]
    args = attention_args(query, key_mask, is_causal=is_causal, scale=scale, kernel=kernel)
    return attend(query, KeyBlock(key, value, key_mask), args, share.key_of_query)[0]


def agree_on_layout(
    query: Tensor, key: Tensor, *, key_mask: Tensor | None, is_causal: bool, axis: Axis
) -> SequenceLayout:
    """Ask all ranks along an axis how many tokens they hold, with one small exchange.

    Args:
        query: (batch, q_tokens, heads, head_dim), this rank's.
        key: (batch, kv_tokens, kv_heads, head_dim), this rank's.
        key_mask: as for `sequence_parallel_attention`.
        is_causal: as for `sequence_parallel_attention`.
        axis: the ranks.

    Raises:
        ShardingError: the ranks hold tensors that do not fit together; the message names ranks and values.
    """
    per_rank = require_equal(
        axis,
        "the ranks disagree about {name} of one attention: {values}",
        gathered=(query.shape[1], key.shape[1]),
        batch=query.shape[0],
        heads=query.shape[2],
        kv_heads=key.shape[2],
        head_dim=query.shape[3],
        dtype=query.dtype,
        key_mask=int(key_mask is not None),
        is_causal=int(is_causal),
    )
    return SequenceLayout(query=tuple(queries for queries, _ in per_rank), key=tuple(keys for _, keys in per_rank))


def _check_inputs(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> None:
    """Refuse what could not be exact, before anything is sent."""
    is_4d = query.ndim == 4 and key.ndim == 4 and key.shape == value.shape
    if not is_4d or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        rule = "batch and head_dim must be the same"
        raise UnsupportedAttentionError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}: "
            + (rule if is_4d else "all three are (batch, tokens, heads, head_dim), key and value alike")
        )
    if len({query.dtype, key.dtype, value.dtype}) > 1 or query.dtype not in _DTYPES:
        raise UnsupportedAttentionError(
            f"query {query.dtype}, key {key.dtype}, value {value.dtype}: give float32, bfloat16 or "
            "float16 for all three (float64 for reference)"
        )
    if len({query.device, key.device, value.device}) > 1:
        raise UnsupportedAttentionError(f"query on {query.device}, key on {key.device}, value on {value.device}")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != key.shape[:2]):
        raise UnsupportedAttentionError(
            f"key_mask {tuple(key_mask.shape)} of {key_mask.dtype}: give bool of shape "
            f"{tuple(key.shape[:2])}, True = attend"
        )
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        raise UnsupportedAttentionError(
            "no gradients flow through sequence-parallel attention: run under torch.no_grad()"
        )


def _check_layout(query: Tensor, key: Tensor, layout: SequenceLayout, mesh: ParallelMesh, is_causal: bool) -> None:
    """Refuse a layout that is not that of this rank's tensors: with it the wrong tokens would be sent."""
    axis = mesh.sequence
    if layout.front_lengths is not None and len(layout.front_lengths) != mesh.ring.size:
        raise ShardingError(
            f"{layout} is a zigzag over {len(layout.front_lengths)} ring ranks, the mesh has {mesh.ring.size}"
        )
    if len(layout.query) != axis.size or len(layout.key) != axis.size:
        raise ShardingError(f"{layout} speaks of {len(layout.query)} ranks, the mesh has {axis.size}")
    held = (query.shape[1], key.shape[1])
    expected = (layout.query[axis.rank], layout.key[axis.rank])
    if held != expected:
        raise ShardingError(f"rank {axis.rank} holds {held} query and key tokens, its layout says {expected}")
    if is_causal and layout.query != layout.key:
        raise UnsupportedAttentionError(
            f"causal attention needs queries and keys of the same tokens; the ranks hold {layout.query} "
            f"and {layout.key}"
        )
