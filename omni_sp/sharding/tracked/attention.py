"""Attention over sharded tensors: in the core where tokens are sharded, on this rank where another dim is."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention, noop_mask

from omni_sp.attention import SequenceLayout
from omni_sp.errors import UnsupportedAttentionError
from omni_sp.sharding.forward_context import ShardedForward, current_forward
from omni_sp.sharding.tracked.placement import Placement, local_shard
from omni_sp.sharding.tracked.tensor import FUNCTION_RULES, TokenTensor

F = torch.nn.functional
_MAX_CACHED_MASKS = 4
_NEGLIGIBLE = -9000.0
"""exp() of it is 0 in every dtype: models write -10000 where they mean minus infinity."""


def _require_forward() -> ShardedForward:
    forward = current_forward()
    if forward is None:
        raise UnsupportedAttentionError("attention over pieces outside of a sharded forward")
    return forward


def _full(x: Any, operation: str = "attention") -> Any:
    return x.full_tensor(operation) if isinstance(x, TokenTensor) else x


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """The rule for torch's function of that name: (…, heads, tokens, head_dim) tensors of which some are sharded."""
    if dropout_p:
        raise UnsupportedAttentionError(f"dropout {dropout_p} in attention is for training; this is inference")
    mask = attn_mask
    if isinstance(mask, TokenTensor) and not _mask_follows_query(mask, query):
        mask = mask.full_tensor("mask")
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    tracked = [x for x in (query, key, value) if isinstance(x, TokenTensor)]
    tokens = query.ndim - 2
    if not isinstance(query, TokenTensor) or query.shard_dim > tokens or key.ndim != query.ndim:
        # Full queries need the full keys.
        return _on_full_tensors(query, key, value, mask, options)
    if query.shard_dim < tokens:
        return _along_batch(query, key, value, mask, options)
    if len(tracked) < 3 or any(x.shard_dim != tokens for x in tracked) or key.placement != value.placement:
        return _local_queries(query, _full(key), _full(value), mask, options)
    key_mask, query_mask = (None, None) if mask is None else _key_and_query_mask(mask, query, key)
    if is_causal or key_mask is False or query.ndim != 4:
        return _local_queries(query, _full(key), _full(value), mask, options)
    forward = _require_forward()
    forward.count_attention()
    layout = SequenceLayout(query=query.placement.lengths, key=key.placement.lengths)
    if key_mask is not None:
        key_mask = key.shard_like(key_mask.expand(key.shape[0], -1), 1)
    q, k, v = (x.local.transpose(1, 2) for x in (query, key, value))
    out = forward.strategy(q, k, v, key_mask=key_mask, is_causal=False, scale=scale, layout=layout)
    if query_mask is not None:
        # The output of a query that may attend to no key is 0.
        out = out * query.shard_like(query_mask.expand(key.shape[0], -1), 1)[:, :, None, None].to(out.dtype)
    return query.wrap(out.transpose(1, 2))


def _mask_follows_query(mask: TokenTensor, query: Any) -> bool:
    """True where each rank holds the part of the mask that is about its own queries."""
    if not isinstance(query, TokenTensor) or query.shard_dim != query.ndim - 2:
        return False
    return mask.shard_dim == mask.ndim - 2 and mask.placement == query.placement


def _on_full_tensors(query: Any, key: Any, value: Any, mask: Any, options: dict[str, Any]) -> torch.Tensor:
    q, k, v, mask = map(_full, (query, key, value, mask))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)


def _along_batch(query: TokenTensor, key: Any, value: Any, mask: Any, options: dict[str, Any]) -> Any:
    """A batch dim is sharded (a video's frames or positions): each of its indices attends by itself."""
    dim, q = query.shard_dim, query.local
    if all(isinstance(x, TokenTensor) and (x.shard_dim, x.placement) == (dim, query.placement) for x in (key, value)):
        k, v = key.local, value.local
    elif any(isinstance(x, TokenTensor) or x.shape[dim] not in (1, query.placement.size) for x in (key, value)):
        # Where grouped heads are sharded, there are fewer heads of keys than of queries.
        return _on_full_tensors(query, key, value, mask, options)
    else:
        k, v = (query.shard_like(x, dim) if x.shape[dim] > 1 else x for x in (key, value))
    if mask is not None and mask.ndim >= query.ndim - query.shard_dim:
        dim_from_end = query.shard_dim - query.ndim
        mask = mask if mask.shape[dim_from_end] == 1 else query.shard_like(mask, mask.ndim + dim_from_end)
    if q.numel() == 0:
        return query.wrap(q.new_empty((*q.shape[:-1], v.shape[-1])))
    return query.wrap(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options))


def _local_queries(
    query: TokenTensor, key: torch.Tensor, value: torch.Tensor, mask: Any, options: dict[str, Any]
) -> Any:
    """This rank's queries against the full keys, under any mask."""
    _require_forward().count_attention()
    if options["is_causal"]:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=key.device).tril()
    if isinstance(mask, TokenTensor):
        mask = mask.local
    elif mask is not None and mask.shape[-2] > 1:
        mask = query.shard_like(mask, mask.ndim - 2)
    if query.local.numel() == 0:
        return query.wrap(query.local.new_empty((*query.local.shape[:-1], value.shape[-1])))
    options = {**options, "is_causal": False}
    return query.wrap(F.scaled_dot_product_attention(query.local, key, value, attn_mask=mask, **options))


def _key_and_query_mask(mask: torch.Tensor, query: TokenTensor, key: TokenTensor) -> tuple[Any, Any]:
    """A mask as two bool masks (batch or 1, tokens): of the keys that may be attended to, and of the queries that may.

    The second is None where all queries may; the first is False where the mask says more than that. The result is
    cached for other attentions of this forward that get the same mask.
    """
    if isinstance(mask, TokenTensor):
        return False, None
    if mask.is_inference():  # such tensors have no version that would show that they were changed
        key_mask, query_mask = _split_mask(mask)
    else:
        cache = _require_forward().masks
        name = (mask.data_ptr(), tuple(mask.shape), mask.stride(), mask._version)
        if name not in cache:
            while len(cache) >= _MAX_CACHED_MASKS:
                # Models that make a mask in every block would keep all of them alive.
                cache.pop(next(iter(cache)))
            cache[name] = mask, _split_mask(mask)
        key_mask, query_mask = cache[name][1]
    if key_mask is not False and (
        key_mask.shape[-1] != key.shape[-2] or (query_mask is not None and query_mask.shape[-1] != query.shape[-2])
    ):
        return False, None
    return key_mask, query_mask


def _split_mask(mask: torch.Tensor) -> tuple[Any, Any]:
    """The two masks of `_key_and_query_mask`, without a look at the numbers of queries and keys."""
    mask = mask[(None,) * (4 - mask.ndim)]
    query_mask = None
    # All heads and queries must have the same keys, except for queries that have none.
    for dim in (1, 2):
        if mask.shape[dim] == 1:
            continue
        first = mask.narrow(dim, 0, 1)
        if mask.stride(dim) == 0 or bool((mask == first).all()):
            mask = first
        elif dim == 2 and mask.dtype == torch.bool:
            queries, keys = mask.any(-1, keepdim=True), mask.any(-2, keepdim=True)
            if not bool((mask == (queries & keys)).all()):
                return False, None
            mask, query_mask = keys, queries[:, 0, :, 0]
        else:
            return False, None
    mask = mask[:, 0, 0]
    if mask.dtype == torch.bool:
        return mask, query_mask
    is_open, is_masked = mask == 0, mask <= _NEGLIGIBLE
    # Where a number masks all keys, torch weighs them alike; the core would give 0.
    return (is_open, None) if bool((is_open | is_masked).all() & is_open.any(-1).all()) else (False, None)


def _dense_mask(mask: BlockMask) -> torch.Tensor:
    """A flex mask as a bool tensor, cached for the other attentions of this forward."""
    cache = _require_forward().masks
    if id(mask) not in cache:
        batch, heads, queries, keys = mask.shape
        device = str(mask.kv_indices.device)
        cache[id(mask)] = mask, create_mask(mask.mask_mod, batch, heads, queries, keys, device=device)
    dense: torch.Tensor = cache[id(mask)][1]
    return dense


def _under_block_mask(query: Any, key: Any, value: Any, mask: Any, options: dict[str, Any]) -> Any:
    """FlexAttention of this rank's queries to all keys, under a mask that is nothing but tables of blocks.

    Compiled flex obeys the tables, plain flex does not, so flex itself is called. Where the shards do not end where
    blocks end, every rank computes all queries.
    """
    key, value = _full(key), _full(value)
    tables: list[Any] = [mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices]
    block_placement: Placement | None = None
    if isinstance(query, TokenTensor):
        _require_forward().count_attention()
        blocks = tables[0].shape[-1]
        if query.shard_dim == query.ndim - 2 and blocks * mask.BLOCK_SIZE[0] == query.shape[-2]:
            block_placement = query.placement.unflatten_dims(1, blocks, mask.BLOCK_SIZE[0])
    if block_placement is None:
        q = _full(query)
        tables = [_full(x, "mask") for x in tables]
    else:
        q = query.local
        # This may gather, so that ranks without a query have to call it too.
        tables = [None if x is None else _local_blocks(x, block_placement, query) for x in tables]
        if q.numel() == 0:
            return query.wrap(q.new_empty((*q.shape[:-1], value.shape[-1])))
    numbers, indices, full_numbers, full_indices = tables
    lengths = (q.shape[-2], key.shape[-2])
    local_mask = BlockMask.from_kv_blocks(
        numbers, indices, full_numbers, full_indices, mask.BLOCK_SIZE, mask.mask_mod, lengths, compute_q_blocks=False
    )
    out = flex_attention(q, key, value, block_mask=local_mask, **options)
    if not isinstance(query, TokenTensor):
        return out
    return query.wrap(out if block_placement is not None else query.shard_like(out, query.shard_dim))


def _local_blocks(table: Any, placement: Placement, query: TokenTensor) -> torch.Tensor:
    """A block mask's table, (batch, heads, blocks of queries, …), for this rank's queries."""
    if isinstance(table, TokenTensor):
        if (table.shard_dim, table.placement) == (2, placement):
            return table.local
        table = table.full_tensor("mask")
    return local_shard(table, 2, placement, query.axis)


def tracked_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Any:
    """Attention as diffusers' dispatcher calls it, over (batch, tokens, heads, head_dim) of which some may be sharded.

    The mask is what torch's attention takes, a bool mask (batch, kv_tokens), or a mask of FlexAttention. The output is
    sharded like the query.
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if isinstance(attn_mask, BlockMask):
        if attn_mask.mask_mod is noop_mask:
            return _under_block_mask(q, k, v, attn_mask, options).transpose(1, 2)
        attn_mask = _dense_mask(attn_mask)
    # Torch's own function, so that a mode that somebody activated for it (to skip attention, for one) sees the call.
    mask = attn_mask if attn_mask is None or attn_mask.ndim != 2 else attn_mask[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal, **options)
    return out.transpose(1, 2)


FUNCTION_RULES[F.scaled_dot_product_attention] = scaled_dot_product_attention
