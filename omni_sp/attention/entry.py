"""Attention over all ranks: Ulysses inside, ring outside, any kernel on each device.

Source: the combination of both is USP (arXiv 2405.07719).
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from types import NoneType
from typing import NamedTuple

import torch
from torch import Tensor

from omni_sp.attention.kernels import AttentionArgs, KeyBlock, Rows, attend, attention_args
from omni_sp.attention.key_mask import WholeKeyMask
from omni_sp.attention.layout import HeadShare, SequenceLayout, head_shares
from omni_sp.attention.overlap import choose_head_groups, ulysses_attention
from omni_sp.attention.ring import RingLayout, pays_to_gather, ring_attention
from omni_sp.attention.tuning import tuned_kernel
from omni_sp.attention.ulysses import UlyssesLayout
from omni_sp.collectives import require_equal
from omni_sp.errors import ShardingError, UnsupportedAttentionError
from omni_sp.mesh import Axis, ParallelMesh
from omni_sp.validation import require_bool, require_int, require_number, require_str, shown

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def sequence_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mesh: ParallelMesh,
    key_mask: Tensor | WholeKeyMask | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    layout: SequenceLayout | None = None,
    kernel: str = "auto",
    head_groups: int | None = None,
    gather_keys: bool | None = None,
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
            that no key may attend gets output 0. Where every rank has the mask of all ranks' keys, a ``WholeKeyMask``
            of it is faster: masked keys are not sent, and kernels that take no mask can run.
        is_causal: each token attends to itself and to earlier tokens; query and key are the same tokens. The ranks
            hold consecutive tokens in rank order (ring-major), unless the layout is ``SequenceLayout.zigzag(...)``,
            which gives all ranks the same work.
        scale: the scores are multiplied by it; None means 1/sqrt(head_dim).
        layout: how many tokens each rank holds, where the caller knows. Passed by all ranks or by none: None asks the
            other ranks with one small exchange, which also checks that all ranks hold tensors that fit together.
        kernel: "auto", "tune", or another of ``omni_sp.attention.kernel_names()``. With "tune", rank 0 times the exact
            kernels at the first attention of a shape, and all ranks take the fastest that all have.
        head_groups: into how many groups Ulysses splits each rank's heads, so that one group's exchange hides behind
            another's attention. With 1 nothing overlaps. None chooses by shape and device. The same on all ranks.
        gather_keys: whether one exchange along the ring brings all keys to every rank, which attends to them at once;
            else they pass from rank to rank. None chooses by their size and the device. The same on all ranks.

    Returns:
        (batch, q_tokens, heads, head_dim), contiguous, for this rank's queries.

    Raises:
        UnsupportedAttentionError: shapes or dtypes do not fit together, an option is invalid, gradients are wanted, or
            no kernel can do it.
        ShardingError: the ranks hold tensors or options that do not fit together (checked where ``layout`` is None, and
            always with ``ParallelMesh(..., check=True)``).
    """
    _check_options(mesh, layout, head_groups, gather_keys)
    _check_inputs(query, key, value, key_mask, is_causal, scale, kernel)
    axis = mesh.sequence
    if layout is None or mesh.check:
        alike = {
            "scale": query.shape[3] ** -0.5 if scale is None else float(scale),
            "head_groups": -1 if head_groups is None else head_groups,
            "gather_keys": -1 if gather_keys is None else int(gather_keys),
        }
        agreed = agree_on_layout(query, key, key_mask=key_mask, is_causal=is_causal, axis=axis, **alike)
        if layout is not None and (layout.query, layout.key) != (agreed.query, agreed.key):
            raise ShardingError(f"the caller's layout is {layout}, but the ranks hold {agreed}")
        layout = layout or agreed
    _check_layout(query, key, layout, mesh, is_causal)
    if isinstance(key_mask, WholeKeyMask) and key_mask.lengths != layout.key:
        raise ShardingError(f"the mask is for ranks that hold {key_mask.lengths} keys, they hold {layout.key}")
    whole_mask = None
    if not isinstance(key_mask, WholeKeyMask):
        block = KeyBlock(key, value, key_mask)
    elif is_causal:
        # Dropping keys would shift the diagonal.
        block = KeyBlock(key, value, key_mask.part(axis.rank, key.shape[0], key.device))
    else:
        block, whole_mask = key_mask.drop(KeyBlock(key, value, None), axis.rank), key_mask
        layout = replace(layout, key=key_mask.kept_lengths)
    if kernel == "tune":
        kernel = tuned_kernel(query, block, layout, mesh, is_causal=is_causal)
    num_tokens = min(sum(layout.query), sum(layout.key)) // mesh.ring.size
    args = attention_args(query, block.mask, is_causal=is_causal, scale=scale, kernel=kernel, num_tokens=num_tokens)
    return _hybrid_attention(query, block, mesh, layout, args, head_groups, gather_keys, whole_mask)


def _hybrid_attention(
    query: Tensor,
    block: KeyBlock,
    mesh: ParallelMesh,
    layout: SequenceLayout,
    args: AttentionArgs,
    head_groups: int | None,
    gather_keys: bool | None,
    whole_mask: WholeKeyMask | None,
) -> Tensor:
    """Ulysses inside, ring outside."""
    ring, degree = mesh.ring, mesh.ulysses.size
    batch, _, num_heads, head_dim = query.shape
    token_bytes = batch * head_dim * query.element_size()
    heads = num_heads, block.key.shape[2]
    plan = _plan(layout, heads, token_bytes, query.device.type, degree, ring.rank, head_groups, gather_keys)

    def rows(start: int, stop: int) -> tuple[Rows, ...] | None:
        return None if whole_mask is None else whole_mask.rows(start * degree, stop * degree, block.key.device)

    ring_layout = RingLayout(ring, plan.key_lengths, layout.front_lengths, plan.gathers_keys, rows)

    def attend_group(query: Tensor, block: KeyBlock, share: HeadShare) -> Tensor:
        return ring_attention(query, block, ring_layout, args, share.key_of_query)

    if degree == 1:
        return attend_group(query, block, plan.groups[0][0]).contiguous()
    groups = [UlyssesLayout(mesh.ulysses, shares, plan.query, plan.key) for shares in plan.groups]
    return ulysses_attention(query, block, groups, attend_group)


class _Plan(NamedTuple):
    """What follows from the shapes of an attention.

    Attributes:
        groups: for each group of heads, the heads of each Ulysses rank.
        query: number of query tokens of each rank of this Ulysses group.
        key: number of key tokens of each rank of this Ulysses group.
        key_lengths: number of key tokens of each Ulysses group.
        gathers_keys: as in `RingLayout`.
    """

    groups: tuple[tuple[HeadShare, ...], ...]
    query: tuple[int, ...]
    key: tuple[int, ...]
    key_lengths: tuple[int, ...]
    gathers_keys: bool


@lru_cache(maxsize=256)
def _plan(
    layout: SequenceLayout,
    heads: tuple[int, int],
    token_bytes: int,
    device: str,
    degree: int,
    ring_rank: int,
    head_groups: int | None,
    gather_keys: bool | None,
) -> _Plan:
    """Decide how an attention is exchanged. Whatever that depends on is the same on all ranks, which decide alike.

    Args:
        layout: how many tokens each rank holds.
        heads: number of query heads and of key/value heads.
        token_bytes: bytes of one head of a token, of the whole batch.
        device: the type of the device.
        degree: the Ulysses degree.
        ring_rank: which Ulysses group this rank is in. It decides nothing.
        head_groups: as for `sequence_parallel_attention`.
        gather_keys: as for `sequence_parallel_attention`.
    """
    num_heads, num_kv_heads = heads
    key_lengths = tuple(sum(layout.key[start : start + degree]) for start in range(0, len(layout.key), degree))
    if gather_keys is None:
        gather_keys = pays_to_gather(device, 2 * sum(layout.key) * num_kv_heads * token_bytes // degree)
    if degree == 1:
        head_groups = 1
    elif head_groups is None:
        # Of the average Ulysses group, not of this one: Ulysses groups of different length must not choose differently,
        # or ring ranks would pass each other blocks of different heads.
        head_bytes = sum(layout.query) // len(key_lengths) * token_bytes
        head_groups = choose_head_groups(device, num_heads, degree, head_bytes)
    own = slice(ring_rank * degree, (ring_rank + 1) * degree)
    groups = head_shares(num_heads, num_kv_heads, degree, head_groups)
    return _Plan(groups, layout.query[own], layout.key[own], key_lengths, gather_keys)


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
    if isinstance(key_mask, WholeKeyMask):
        raise UnsupportedAttentionError("a WholeKeyMask is for keys that are spread over ranks: pass its tensor here")
    _check_inputs(query, key, value, key_mask, is_causal, scale, kernel)
    share = head_shares(query.shape[2], key.shape[2], 1)[0][0]
    num_tokens = min(query.shape[1], key.shape[1])
    args = attention_args(query, key_mask, is_causal=is_causal, scale=scale, kernel=kernel, num_tokens=num_tokens)
    return attend(query, KeyBlock(key, value, key_mask), args, share.key_of_query)[0]


def agree_on_layout(
    query: Tensor,
    key: Tensor,
    *,
    key_mask: Tensor | WholeKeyMask | None,
    is_causal: bool,
    axis: Axis,
    **alike: float,
) -> SequenceLayout:
    """Ask all ranks along an axis how many tokens they hold, with one small exchange.

    Args:
        query: (batch, q_tokens, heads, head_dim), this rank's.
        key: (batch, kv_tokens, kv_heads, head_dim), this rank's.
        key_mask: as for `sequence_parallel_attention`.
        is_causal: as for `sequence_parallel_attention`.
        axis: the ranks.
        **alike: further numbers that all ranks must have alike, by name.

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
        key_mask=key_mask.numbers if isinstance(key_mask, WholeKeyMask) else int(key_mask is not None),
        is_causal=int(is_causal),
        **alike,
    )
    return SequenceLayout(query=tuple(queries for queries, _ in per_rank), key=tuple(keys for _, keys in per_rank))


def _check_options(mesh: object, layout: object, head_groups: object, gather_keys: object) -> None:
    if not isinstance(mesh, ParallelMesh):
        raise UnsupportedAttentionError(f"mesh={shown(mesh)}: give a ParallelMesh")
    if not isinstance(layout, (SequenceLayout, NoneType)):
        raise UnsupportedAttentionError(f"layout={shown(layout)}: give a SequenceLayout, or None to ask the ranks")
    if head_groups is not None:
        hint = "give a number of groups from 1 on, or None to let it choose"
        require_int("head_groups", head_groups, minimum=1, error=UnsupportedAttentionError, hint=hint)
    if gather_keys is not None:
        hint = "give True or False, or None to let it choose"
        require_bool("gather_keys", gather_keys, error=UnsupportedAttentionError, hint=hint)


def _check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | WholeKeyMask | None,
    is_causal: object,
    scale: object,
    kernel: object,
) -> None:
    """Refuse what could not be exact, before anything is sent."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise UnsupportedAttentionError(f"{name}={shown(tensor)}: give a tensor")
    if not isinstance(key_mask, (Tensor, WholeKeyMask, NoneType)):
        raise UnsupportedAttentionError(f"key_mask={shown(key_mask)}: give a tensor, a WholeKeyMask or None")
    require_bool("is_causal", is_causal, error=UnsupportedAttentionError)
    if scale is not None:
        hint = "give a finite number, or None for 1/sqrt(head_dim)"
        require_number("scale", scale, error=UnsupportedAttentionError, hint=hint)
    require_str("kernel", kernel, error=UnsupportedAttentionError)
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
    if isinstance(key_mask, WholeKeyMask):
        if key_mask.batch not in (1, key.shape[0]):
            raise UnsupportedAttentionError(f"a mask of {key_mask.batch} rows for keys {tuple(key.shape)}")
    elif key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != key.shape[:2]):
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
