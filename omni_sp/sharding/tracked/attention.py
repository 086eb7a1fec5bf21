"""Attention over sharded tensors: in the core where tokens are sharded, on this rank where another dim is."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention, noop_mask

from omni_sp.attention import SequenceLayout, WholeKeyMask
from omni_sp.errors import UnsupportedAttentionError
from omni_sp.mesh import Axis
from omni_sp.sharding.forward_context import ShardedForward, current_forward
from omni_sp.sharding.tracked.placement import Placement, local_shard
from omni_sp.sharding.tracked.recording import as_one_operation, will_read
from omni_sp.sharding.tracked.tensor import FUNCTION_RULES, TokenTensor

F = torch.nn.functional
_torch_attention = torch._C._nn.scaled_dot_product_attention
"""What torch.nn.functional has, unless somebody has put another function there."""
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
    query, key, value = map(as_autocast_does, (query, key, value))
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
    is_core = _require_forward().strategy is not None and not is_causal and query.ndim == 4
    if not is_core or isinstance(mask, TokenTensor):
        return _local_queries(query, _full(key), _full(value), mask, options)
    given = None if mask is None else _Mask(mask, will_read(mask), object())
    placements = query.placement, key.placement
    # As the core takes them, which is also how most models have them: a recording need not transpose them twice.
    q, k, v = (x.local.transpose(1, 2) for x in (query, key, value))
    out = as_one_operation(_under_any_mask, q, k, v, given, placements, query.axis, options)
    return _wrap_output(query, out.transpose(1, 2))


def _wrap_output(query: TokenTensor, local: torch.Tensor) -> TokenTensor:
    """An attention's output, (batch, heads, tokens, head_dim), sharded like its query.

    In memory the heads of a token lie side by side, as torch's kernels leave them: models join them next, and so need
    not copy them. All ranks say so, also those without a token.
    """
    if local.ndim != 4:
        return query.wrap(local)
    if not local.transpose(1, 2).is_contiguous():
        local = local.transpose(1, 2).contiguous().transpose(1, 2)
    shape = list(local.shape)
    shape[query.shard_dim] = query.placement.size
    _, heads, tokens, head_dim = shape
    strides = (tokens * heads * head_dim, head_dim, heads * head_dim, 1)
    return TokenTensor(local, query.shard_dim, query.placement, query.axis, strides)


def as_autocast_does(x: torch.Tensor) -> torch.Tensor:
    """A query, key or value in the dtype in which torch's attention would compute it."""
    device = x.device.type
    # Of a device that has no autocast, such as "meta", torch refuses to say that it is off.
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device)) if x.is_floating_point() and x.dtype != torch.float64 else x


class _Mask(NamedTuple):
    """A mask, as an attention gets it.

    Attributes:
        origins: in a recording, the tensors that decide its numbers; None where they are not known.
        place: stands for the attention in the recording.
    """

    tensor: torch.Tensor
    origins: list[torch.Tensor] | None
    place: object

    def name(self) -> Hashable:
        """Equal for masks of the same numbers in one forward; None where nothing would show a change of them."""
        if any(x.is_inference() for x in (self.tensor, *(self.origins or ()))):
            return None
        memory = self.tensor.untyped_storage().data_ptr()
        if self.origins is None or any(x.untyped_storage().data_ptr() == memory for x in self.origins):
            x = self.tensor
            return (x.data_ptr(), tuple(x.shape), x.stride(), x._version)
        # It is made anew in every block, of tensors that the blocks share.
        return (self.place, *((id(x), x._version) for x in self.origins))


def _under_any_mask(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: _Mask | None,
    placements: tuple[Placement, Placement],
    axis: Axis,
    options: dict[str, Any],
) -> torch.Tensor:
    """Attention of this rank's tokens to those of all ranks: in the core, where the mask says no more than which keys.

    It is one operation of a recording, so that what the mask says is looked at in every forward, and a recording holds
    for all masks. The mask is the same on all ranks, so that all decide alike. Query, key and value are (batch, this
    rank's tokens, heads, head_dim).

    Returns:
        (batch, this rank's queries, heads, head_dim).
    """
    forward, (of_queries, of_keys) = _require_forward(), placements
    known = _KeyAndQueryMask()
    if mask is not None:
        looked_at = _key_and_query_mask(mask, of_queries.size, of_keys.size)
        if looked_at is None:
            full_key, full_value = (
                TokenTensor(x.transpose(1, 2), 2, of_keys, axis).full_tensor("attention") for x in (key, value)
            )
            sharded = TokenTensor(query.transpose(1, 2), 2, of_queries, axis)
            local: torch.Tensor = _local_queries(sharded, full_key, full_value, mask.tensor, options).local
            return local.transpose(1, 2)
        known = looked_at
    assert forward.strategy is not None
    layout = SequenceLayout(query=of_queries.lengths, key=of_keys.lengths)
    out = forward.strategy(
        query, key, value, key_mask=known.of_keys(of_keys), is_causal=False, scale=options["scale"], layout=layout
    )
    if known.queries is not None:
        # The output of a query that may attend to no key is 0.
        may_attend = local_shard(known.queries.expand(len(query), -1), 1, of_queries, axis)
        out = out * may_attend[:, :, None, None].to(out.dtype)
    return out


def _mask_follows_query(mask: TokenTensor, query: Any) -> bool:
    """True where each rank holds the part of the mask that is about its own queries, or rows of the batch."""
    if not isinstance(query, TokenTensor) or query.shard_dim > query.ndim - 2:
        return False
    return mask.shard_dim - mask.ndim == query.shard_dim - query.ndim and mask.placement == query.placement


def _on_full_tensors(query: Any, key: Any, value: Any, mask: Any, options: dict[str, Any]) -> torch.Tensor:
    q, k, v, mask = map(_full, (query, key, value, mask))
    return _torch_attention(q, k, v, attn_mask=mask, **options)


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
    if isinstance(mask, TokenTensor):
        mask = mask.local
    elif mask is not None and mask.ndim >= query.ndim - query.shard_dim:
        dim_from_end = query.shard_dim - query.ndim
        mask = mask if mask.shape[dim_from_end] == 1 else query.shard_like(mask, mask.ndim + dim_from_end)
    if q.numel() == 0:
        return _wrap_output(query, q.new_empty((*q.shape[:-1], v.shape[-1])))
    return _wrap_output(query, _torch_attention(q, k, v, attn_mask=mask, **options))


def _local_queries(
    query: TokenTensor, key: torch.Tensor, value: torch.Tensor, mask: Any, options: dict[str, Any]
) -> Any:
    """This rank's queries against the full keys, under any mask."""
    if options["is_causal"]:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=key.device).tril()
    if isinstance(mask, TokenTensor):
        mask = mask.local
    elif mask is not None and mask.shape[-2] > 1:
        mask = query.shard_like(mask, mask.ndim - 2)
    if query.local.numel() == 0:
        return _wrap_output(query, query.local.new_empty((*query.local.shape[:-1], value.shape[-1])))
    options = {**options, "is_causal": False}
    return _wrap_output(query, _torch_attention(query.local, key, value, attn_mask=mask, **options))


@dataclass(frozen=True)
class _KeyAndQueryMask:
    """A mask as two bool masks (batch or 1, tokens), each None where it masks nothing.

    Attributes:
        keys: True for keys that may be attended to.
        queries: True for queries that may attend.
    """

    keys: torch.Tensor | None = None
    queries: torch.Tensor | None = None
    _by_placement: dict[Placement, WholeKeyMask | None] = field(default_factory=dict)

    def of_keys(self, placement: Placement) -> WholeKeyMask | None:
        """The mask of keys in rank order, whose numbers are read once; None where it masks nothing."""
        if self.keys is None:
            return None
        if placement not in self._by_placement:
            mask = self.keys
            if not placement.in_rank_order:
                mask = torch.cat([mask[:, a:b] for ranges in placement.ranges_per_rank for a, b in ranges], dim=1)
            whole = WholeKeyMask(mask, placement.lengths)
            # The mask is the same on all ranks, so that all decide alike.
            self._by_placement[placement] = None if whole.masks_nothing else whole
        return self._by_placement[placement]


def _key_and_query_mask(mask: _Mask, queries: int, keys: int) -> _KeyAndQueryMask | None:
    """A mask of so many queries and keys as masks of each; None where it says more than that.

    The result is cached for other attentions of this forward that get the same mask.
    """
    cache, name = _require_forward().masks, mask.name()
    known: _KeyAndQueryMask | None
    if name in cache:
        _, known = cache[name]
    else:
        known = _split_mask(mask.tensor)
        while len(cache) >= _MAX_CACHED_MASKS:
            # Models that make a mask in every block would keep all of them alive.
            cache.pop(next(iter(cache)))
        if name is not None:
            # With what it is called by, so that no other tensor gets that name.
            cache[name] = mask, known
    for one, tokens in () if known is None else ((known.keys, keys), (known.queries, queries)):
        if one is not None and one.shape[-1] != tokens:
            return None
    return known


def _split_mask(mask: torch.Tensor) -> _KeyAndQueryMask | None:
    """What `_key_and_query_mask` gives, without a look at the numbers of queries and keys."""
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
                return None
            mask, query_mask = keys, queries[:, 0, :, 0]
        else:
            return None
    mask = mask[:, 0, 0]
    if mask.dtype == torch.bool:
        return _KeyAndQueryMask(mask, query_mask)
    is_open, is_masked = mask == 0, mask <= _NEGLIGIBLE
    # Where a number masks all keys, torch weighs them alike; the core would give 0.
    return _KeyAndQueryMask(is_open) if bool((is_open | is_masked).all() & is_open.any(-1).all()) else None


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
    out = as_one_operation(_flex_by_tables, q, key, value, tables, mask.BLOCK_SIZE, mask.mask_mod, options)
    if not isinstance(query, TokenTensor):
        return out
    return query.wrap(out if block_placement is not None else query.shard_like(out, query.shard_dim))


def _flex_by_tables(
    query: Any, key: Any, value: Any, tables: Sequence[Any], block_size: Any, mask_mod: Any, options: dict[str, Any]
) -> torch.Tensor:
    lengths = (query.shape[-2], key.shape[-2])
    numbers, indices, full_numbers, full_indices = tables
    mask = BlockMask.from_kv_blocks(
        numbers, indices, full_numbers, full_indices, block_size, mask_mod, lengths, compute_q_blocks=False
    )
    out: torch.Tensor = flex_attention(query, key, value, block_mask=mask, **options)
    return out


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
        out = scaled_dot_product_attention(q, k, v, _dense_mask(attn_mask), dropout_p, is_causal, **options)
    else:
        # Looked up as models do, so that a mode that somebody activated for it (to skip attention, for one) sees the
        # call, and so does a function that somebody put in its place.
        mask = attn_mask if attn_mask is None or attn_mask.ndim != 2 else attn_mask[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, **options)
    return out.transpose(1, 2)


FUNCTION_RULES[_torch_attention] = scaled_dot_product_attention
