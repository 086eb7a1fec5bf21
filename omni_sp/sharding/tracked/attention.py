"""Attention over tracked tensors: to the core where tokens are cut, on this rank where they are not."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention, noop_mask

from omni_sp.attention import SequenceLayout
from omni_sp.errors import UnsupportedAttentionError
from omni_sp.sharding.forward_context import ShardedForward, current_forward
from omni_sp.sharding.tracked.placement import Placement
from omni_sp.sharding.tracked.tensor import FUNCTION_RULES, TokenTensor, local_shard

F = torch.nn.functional
_KEPT_MASKS = 4
_NEGLIGIBLE = -9000.0
"""exp() of it is 0 in every dtype: models write -10000 where they mean minus infinity."""


def _forward() -> ShardedForward:
    forward = current_forward()
    if forward is None:
        raise UnsupportedAttentionError("attention over pieces outside of a sharded forward")
    return forward


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
    """Torch's function of that name for (…, heads, tokens, head_dim) of which some are tracked."""
    if dropout_p:
        raise UnsupportedAttentionError(f"dropout {dropout_p} in attention is for training; this is inference")
    mask = attn_mask
    if isinstance(mask, TokenTensor) and not _mask_follows_query(mask, query):
        mask = mask.full_tensor("mask")
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    tensors = query, key, value
    tracked = [x for x in tensors if isinstance(x, TokenTensor)]
    tokens = query.ndim - 2
    if not isinstance(query, TokenTensor) or query.shard_dim > tokens or key.ndim != query.ndim:
        # Whole queries want whole keys.
        return _on_full_tensors(query, key, value, mask, options)
    if query.shard_dim < tokens:
        return _along_batch(query, key, value, mask, options)
    if any(x.shard_dim != tokens for x in tracked):
        key, value = (x.full_tensor("attention") if isinstance(x, TokenTensor) else x for x in (key, value))
        tracked = [query]
    if len(tracked) == 1:
        return _local_queries(query, key, value, mask, options)
    if len(tracked) == 2 or key.placement != value.placement:
        key, value = (x.full_tensor("attention") if isinstance(x, TokenTensor) else x for x in (key, value))
        return _local_queries(query, key, value, mask, options)
    key_mask, row_mask = (None, None) if mask is None else _as_masks(mask, query, key)
    if is_causal or key_mask is False or query.ndim != 4:
        return _local_queries(query, key.full_tensor("attention"), value.full_tensor("attention"), mask, options)
    forward = _forward()
    forward.count_attention()
    layout = SequenceLayout(query=query.placement.lengths, key=key.placement.lengths)
    if key_mask is not None:
        key_mask = key.shard_like(key_mask.expand(key.shape[0], -1), 1)
    q, k, v = (x.local.transpose(1, 2) for x in (query, key, value))
    out = forward.strategy(q, k, v, key_mask=key_mask, is_causal=False, scale=scale, layout=layout)
    if row_mask is not None:
        # A query that may attend to no key gets 0.
        out = out * query.shard_like(row_mask.expand(key.shape[0], -1), 1)[:, :, None, None].to(out.dtype)
    return query.wrap(out.transpose(1, 2))


def _mask_follows_query(mask: TokenTensor, query: Any) -> bool:
    """True where each rank holds the mask's rows of its own queries."""
    if not isinstance(query, TokenTensor) or query.shard_dim != query.ndim - 2:
        return False
    return mask.shard_dim == mask.ndim - 2 and mask.placement == query.placement


def _on_full_tensors(query: Any, key: Any, value: Any, mask: Any, options: dict[str, Any]) -> torch.Tensor:
    q, k, v, mask = (x.full_tensor("attention") if isinstance(x, TokenTensor) else x for x in (query, key, value, mask))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)


def _along_batch(query: TokenTensor, key: Any, value: Any, mask: Any, options: dict[str, Any]) -> Any:
    """Tokens are cut along a batch dim (a video's frames or places): each attends within its own."""
    same = [
        x
        for x in (key, value)
        if isinstance(x, TokenTensor) and (x.shard_dim, x.placement) == (query.shard_dim, query.placement)
    ]
    if len(same) != 2:
        # With grouped heads that are cut there are fewer heads of keys than of queries.
        if any(
            isinstance(x, TokenTensor) or x.shape[query.shard_dim] not in (1, query.placement.size)
            for x in (key, value)
        ):
            return _on_full_tensors(query, key, value, mask, options)
        q, k, v = (
            query.local,
            *(query.shard_like(x, query.shard_dim) if x.shape[query.shard_dim] > 1 else x for x in (key, value)),
        )
    else:
        q, k, v = query.local, key.local, value.local
    if mask is not None and mask.ndim >= query.ndim - query.shard_dim:
        dim_from_end = query.shard_dim - query.ndim
        mask = mask if mask.shape[dim_from_end] == 1 else query.shard_like(mask, mask.ndim + dim_from_end)
    if q.numel() == 0:
        return query.wrap(q.new_empty((*q.shape[:-1], v.shape[-1])))
    return query.wrap(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options))


def _local_queries(
    query: TokenTensor, key: torch.Tensor, value: torch.Tensor, mask: Any, options: dict[str, Any]
) -> Any:
    """This rank's queries against whole keys: any mask at all."""
    _forward().count_attention()
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


def _as_masks(mask: torch.Tensor, query: TokenTensor, key: TokenTensor) -> tuple[Any, Any]:
    """(batch or 1, tokens) bool of the keys that may be attended, and of the queries that may attend (None: all do).

    False in place of the first where the mask says more than that. What is found is kept for other attentions of this
    forward that get the same mask.
    """
    if isinstance(mask, TokenTensor):
        return False, None
    if mask.is_inference():  # such tensors do not tell whether they were changed since
        keys, rows = _masks_of(mask)
    else:
        found = _forward().masks
        name = (mask.data_ptr(), tuple(mask.shape), mask.stride(), mask._version)
        if name not in found:
            while len(found) >= _KEPT_MASKS:
                # Models that make a mask in every block would keep all of them alive.
                found.pop(next(iter(found)))
            found[name] = mask, _masks_of(mask)
        keys, rows = found[name][1]
    if keys is not False and (
        keys.shape[-1] != key.shape[-2] or (rows is not None and rows.shape[-1] != query.shape[-2])
    ):
        return False, None
    return keys, rows


def _masks_of(mask: torch.Tensor) -> tuple[Any, Any]:
    mask = mask[(None,) * (4 - mask.ndim)]
    rows = None
    # Along heads and queries it must say the same everywhere; or shut some queries altogether.
    for dim in (1, 2):
        if mask.shape[dim] == 1:
            continue
        first = mask.narrow(dim, 0, 1)
        if mask.stride(dim) == 0 or bool((mask == first).all()):
            mask = first
        elif dim == 2 and mask.dtype == torch.bool:
            rows, keys = mask.any(-1, keepdim=True), mask.any(-2, keepdim=True)
            if not bool((mask == (rows & keys)).all()):
                return False, None
            mask, rows = keys, rows[:, 0, :, 0]
        else:
            return False, None
    mask = mask[:, 0, 0]
    if mask.dtype == torch.bool:
        return mask, rows
    open_, shut = mask == 0, mask <= _NEGLIGIBLE
    # Where all keys are shut by a number, they count alike; the core would give 0.
    return (open_, None) if bool((open_ | shut).all() & open_.any(-1).all()) else (False, None)


def _dense_mask(mask: BlockMask) -> torch.Tensor:
    """What a flex mask says, as a bool tensor; kept for the other attentions of this forward."""
    found = _forward().masks
    batch, heads, queries, keys = mask.shape
    if id(mask) not in found:
        found[id(mask)] = (
            mask,
            create_mask(mask.mask_mod, batch, heads, queries, keys, device=str(mask.kv_indices.device)),
        )
    whole: torch.Tensor = found[id(mask)][1]
    return whole


def _under_block_mask(query: Any, key: Any, value: Any, mask: Any, scale: float | None, enable_gqa: bool) -> Any:
    """FlexAttention under a mask that is nothing but tables of blocks: this rank's queries, all keys.

    Compiled flex obeys the tables, plain flex does not; so flex itself is asked. Where the pieces do not end where
    blocks do, every rank does all of it.
    """
    key, value = (x.full_tensor("attention") if isinstance(x, TokenTensor) else x for x in (key, value))
    tables: list[Any] = [mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices]
    own: Placement | None = None
    if isinstance(query, TokenTensor):
        _forward().count_attention()
        blocks = tables[0].shape[-1]
        if query.shard_dim == query.ndim - 2 and blocks * mask.BLOCK_SIZE[0] == query.shape[-2]:
            own = query.placement.unflatten_dims(1, blocks, mask.BLOCK_SIZE[0])
    if own is None:
        q = query.full_tensor("attention") if isinstance(query, TokenTensor) else query
        parts = [x.full_tensor("mask") if isinstance(x, TokenTensor) else x for x in tables]
    else:
        q = query.local
        # May gather, so ranks without a query come by here too.
        parts = [None if x is None else _local_blocks(x, own, query) for x in tables]
        if q.numel() == 0:
            return query.wrap(q.new_empty((*q.shape[:-1], value.shape[-1])))
    numbers, indices, full_numbers, full_indices = parts
    part = BlockMask.from_kv_blocks(
        numbers,
        indices,
        full_numbers,
        full_indices,
        BLOCK_SIZE=mask.BLOCK_SIZE,
        mask_mod=mask.mask_mod,
        seq_lengths=(q.shape[-2], key.shape[-2]),
        compute_q_blocks=False,
    )
    out = flex_attention(q, key, value, block_mask=part, scale=scale, enable_gqa=enable_gqa)
    if not isinstance(query, TokenTensor):
        return out
    return query.wrap(out if own is not None else query.shard_like(out, query.shard_dim))


def _local_blocks(table: Any, own: Placement, beside: TokenTensor) -> torch.Tensor:
    """A block mask's table, (batch, heads, blocks of queries, …), for this rank's queries."""
    if isinstance(table, TokenTensor):
        if (table.shard_dim, table.placement) == (2, own):
            return table.local
        table = table.full_tensor("mask")
    return local_shard(table, 2, own, beside.axis)


def tracked_attention(
    query: Any, key: Any, value: Any, *, attn_mask: Any, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Any:
    """The same for (batch, tokens, heads, head_dim), as diffusers' dispatcher has it."""
    if isinstance(attn_mask, BlockMask):
        if attn_mask.mask_mod is noop_mask:
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            return _under_block_mask(q, k, v, attn_mask, scale, enable_gqa).transpose(1, 2)
        attn_mask = _dense_mask(attn_mask)
    # Torch's own function, so that a mode that somebody put on it (to skip attention, for one) sees the call.
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=attn_mask if attn_mask is None or attn_mask.ndim != 2 else attn_mask[:, None, None],
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    return out.transpose(1, 2)


FUNCTION_RULES[F.scaled_dot_product_attention] = scaled_dot_product_attention
