"""Attention over tracked tensors: to the core where tokens are cut, on this rank where they are not."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask

from omni_sp.attention import SequenceLayout
from omni_sp.errors import UnsupportedAttentionError
from omni_sp.sharding.forward import ShardedForward, current_forward
from omni_sp.sharding.tracked.tensor import FUNCTION_RULES, TokenTensor

F = torch.nn.functional
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
    mask = attn_mask.whole() if isinstance(attn_mask, TokenTensor) else attn_mask
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    tensors = query, key, value
    tracked = [x for x in tensors if isinstance(x, TokenTensor)]
    tokens = query.ndim - 2
    if not isinstance(query, TokenTensor) or query.cut_dim > tokens or key.ndim != query.ndim:
        # Whole queries want whole keys.
        return _all_whole(query, key, value, mask, options)
    if query.cut_dim < tokens:
        return _independent(query, key, value, mask, options)
    if any(x.cut_dim != tokens for x in tracked):
        key, value = (x.whole() if isinstance(x, TokenTensor) else x for x in (key, value))
        tracked = [query]
    if len(tracked) == 1:
        return _own_rows(query, key, value, mask, options)
    if len(tracked) == 2 or key.spans != value.spans:
        key, value = (x.whole() if isinstance(x, TokenTensor) else x for x in (key, value))
        return _own_rows(query, key, value, mask, options)
    key_mask = None if mask is None else _as_key_mask(mask, key)
    if is_causal or key_mask is False or query.ndim != 4:
        return _own_rows(query, key.whole(), value.whole(), mask, options)
    forward = _forward()
    forward.count_attention()
    layout = SequenceLayout(query=query.spans.lengths, key=key.spans.lengths)
    if key_mask is not None:
        key_mask = key.cut_alike(key_mask.expand(key.shape[0], -1), 1)
    q, k, v = (x.local.transpose(1, 2) for x in (query, key, value))
    out = forward.strategy(q, k, v, key_mask=key_mask, is_causal=False, scale=scale, layout=layout)
    return query.like(out.transpose(1, 2))


def _all_whole(query: Any, key: Any, value: Any, mask: Any, options: dict[str, Any]) -> torch.Tensor:
    q, k, v = (x.whole() if isinstance(x, TokenTensor) else x for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)


def _independent(query: TokenTensor, key: Any, value: Any, mask: Any, options: dict[str, Any]) -> Any:
    """Tokens are cut along a batch dim (a video's frames or places): each attends within its own."""
    same = [
        x for x in (key, value) if isinstance(x, TokenTensor) and (x.cut_dim, x.spans) == (query.cut_dim, query.spans)
    ]
    if len(same) != 2:
        if any(isinstance(x, TokenTensor) for x in (key, value)):
            return _all_whole(query, key, value, mask, options)
        q, k, v = (
            query.local,
            *(query.cut_alike(x, query.cut_dim) if x.shape[query.cut_dim] > 1 else x for x in (key, value)),
        )
    else:
        q, k, v = query.local, key.local, value.local
    if mask is not None and mask.ndim >= query.ndim - query.cut_dim:
        place = query.cut_dim - query.ndim
        mask = mask if mask.shape[place] == 1 else query.cut_alike(mask, mask.ndim + place)
    if q.numel() == 0:
        return query.like(q.new_empty((*q.shape[:-1], v.shape[-1])))
    return query.like(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options))


def _own_rows(query: TokenTensor, key: torch.Tensor, value: torch.Tensor, mask: Any, options: dict[str, Any]) -> Any:
    """This rank's queries against whole keys: any mask at all."""
    _forward().count_attention()
    if options["is_causal"]:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=key.device).tril()
    if mask is not None and mask.shape[-2] > 1:
        mask = query.cut_alike(mask, mask.ndim - 2)
    if query.local.numel() == 0:
        return query.like(query.local.new_empty((*query.local.shape[:-1], value.shape[-1])))
    options = {**options, "is_causal": False}
    return query.like(F.scaled_dot_product_attention(query.local, key, value, attn_mask=mask, **options))


def _as_key_mask(mask: torch.Tensor, key: TokenTensor) -> Any:
    """(batch or 1, kv_tokens) bool where the mask says no more than which keys may be attended; else False.

    What is found is kept for the other attentions of this forward that get the same mask.
    """
    found = _forward().masks
    name = (mask.data_ptr(), tuple(mask.shape), mask.stride(), mask._version)
    if name not in found:
        found[name] = mask, _key_mask_of(mask)
    key_mask = found[name][1]
    if key_mask is False or key_mask.shape[-1] != key.shape[-2]:
        return False
    return key_mask


def _key_mask_of(mask: torch.Tensor) -> Any:
    mask = mask[(None,) * (4 - mask.ndim)]
    # Along heads and queries it must say the same everywhere.
    for dim in (1, 2):
        if mask.shape[dim] != 1:
            first = mask.narrow(dim, 0, 1)
            if mask.stride(dim) != 0 and not bool((mask == first).all()):
                return False
            mask = first
    mask = mask[:, 0, 0]
    if mask.dtype == torch.bool:
        return mask
    open_, shut = mask == 0, mask <= _NEGLIGIBLE
    # Where all keys are shut by a number, they count alike; the core would give 0.
    return open_ if bool((open_ | shut).all() & open_.any(-1).all()) else False


def _dense(mask: BlockMask) -> torch.Tensor:
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


def tracked_attention(
    query: Any, key: Any, value: Any, *, attn_mask: Any, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Any:
    """The same for (batch, tokens, heads, head_dim), as diffusers' dispatcher has it."""
    if isinstance(attn_mask, BlockMask):
        attn_mask = _dense(attn_mask)
    out = scaled_dot_product_attention(
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
