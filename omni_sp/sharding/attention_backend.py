"""Routing a model's attention to the core, through diffusers' own registry of attention backends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from omni_sp.attention import agree_on_layout, local_attention
from omni_sp.collectives import gather_ints
from omni_sp.errors import ShardingError, UnsupportedAttentionError
from omni_sp.sharding.forward_context import ShardedForward, current_forward
from omni_sp.sharding.tracked import TokenTensor, tracked_attention

BACKEND = "omni_sp"


class AttentionTag:
    """Takes the place of diffusers' parallel configuration, which a model passes on where an attention sees shards.

    Only our own backend may receive it. Another one would read attributes of a configuration, and gets an error.
    """

    def __init__(self, path: str, *, replicated_keys: bool) -> None:
        self.path = path
        self.replicated_keys = replicated_keys

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ShardingError(
            f"{self.path} did not pass through the parallel attention: its backend was changed after parallelize (and "
            f"asks for {name}). remove() the handle, and choose a kernel by parallelize(..., attention_backend=...)"
        )


def backend_key() -> Any:
    """Our key in diffusers' registry, which is registered on first use.

    The keys of the registry are an enum, which cannot be extended. A value of that type that is no member of it is
    looked up like any other key, and changes nothing for other users of the registry.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    for name in _AttentionBackendRegistry._backends:
        if name.value == BACKEND:
            return name
    key = str.__new__(AttentionBackendName, BACKEND)
    key._name_, key._value_ = BACKEND.upper(), BACKEND
    _AttentionBackendRegistry.register(key)(_attention)
    return key


@contextmanager
def tracking_flex_attention() -> Iterator[None]:
    """Let diffusers' flex backend, which some models select by its name, take sharded tensors for a while."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    backends = _AttentionBackendRegistry._backends
    original = backends[AttentionBackendName.FLEX]

    @wraps(original)
    def attend(query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any) -> Any:
        if not any(isinstance(x, TokenTensor) for x in (query, key, value)):
            return original(query, key, value, attn_mask, **options)
        taken = {name: options[name] for name in ("is_causal", "scale", "enable_gqa") if name in options}
        return tracked_attention(query, key, value, attn_mask, **taken)

    backends[AttentionBackendName.FLEX] = attend
    try:
        yield
    finally:
        backends[AttentionBackendName.FLEX] = original


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> torch.Tensor:
    """What diffusers' dispatcher calls: (batch, tokens, heads, head_dim) in and out, this rank's tokens."""
    # A compiled graph holds plain tensors only, so nothing is tracked there.
    if not torch.compiler.is_compiling() and (forward := current_forward()) is not None and forward.tracked:
        out: torch.Tensor = tracked_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return out
    # A model that passes no parallel configuration says thereby that the keys of this attention are replicated.
    tag = _parallel_config if isinstance(_parallel_config, AttentionTag) else None
    path = tag.path if tag is not None else "an attention without parallel_config"
    replicated_keys = tag is None or tag.replicated_keys
    if dropout_p:
        raise UnsupportedAttentionError(f"{path}: dropout {dropout_p} in attention is for training; this is inference")
    if key.shape[2] != query.shape[2] and not enable_gqa:
        raise UnsupportedAttentionError(
            f"{path}: {query.shape[2]} query heads, {key.shape[2]} key heads, no enable_gqa"
        )
    key_mask = _key_mask(attn_mask, key, path)
    if torch.compiler.is_compiling():
        compiled: torch.Tensor = _opaque_attend(query, key, value, key_mask, is_causal, scale, path, replicated_keys)
        return compiled
    return _attend(query, key, value, key_mask, is_causal, scale, path, replicated_keys)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    path: str,
    replicated_keys: bool,
) -> torch.Tensor:
    """Attention of the running forward, with the lengths that its ranks exchanged."""
    forward = current_forward()
    if forward is None:
        raise ShardingError(
            "a part of a parallelized transformer was called on its own: call the transformer as a whole, or remove() "
            "its handle first"
        )
    if forward.tracked:
        raise ShardingError(
            f"{path} was compiled; tensors in pieces cannot be followed through compiled blocks: parallelize the model "
            "as it is, or give it a ShardingPlan"
        )
    forward.count_attention()
    if replicated_keys:
        _require_replicated_keys(forward, path, key, value)
        return local_attention(
            query, key, value, key_mask=key_mask, is_causal=is_causal, scale=scale, kernel=forward.kernel
        )
    layout = forward.get_or_exchange(
        forward.call_site("attention", path),
        lambda: agree_on_layout(query, key, key_mask=key_mask, is_causal=is_causal, axis=forward.mesh.sequence),
    )
    return forward.strategy(query, key, value, key_mask=key_mask, is_causal=is_causal, scale=scale, layout=layout)


@torch.library.custom_op(
    "omni_sp::attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? key_mask, bool is_causal, float? scale, str path, "
    "bool replicated_keys) -> Tensor",
)
def _opaque_attend(*args: Any) -> torch.Tensor:
    """`_attend` as one opaque operation, so that torch.compile sees neither exchanges nor Python state."""
    return _attend(*args).contiguous()


@_opaque_attend.register_fake
def _(query: torch.Tensor, *_others: Any) -> torch.Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def _key_mask(mask: torch.Tensor | None, key: torch.Tensor, path: str) -> torch.Tensor | None:
    """A mask (batch, kv_tokens) bool from diffusers' (batch, kv), (batch, 1, 1, kv) or (1, 1, 1, kv) bool mask."""
    if mask is None:
        return None
    batch, tokens = key.shape[:2]
    fits = mask.ndim in (2, 4) and mask.shape[-1] == tokens and mask.shape[0] in (1, batch)
    if mask.ndim == 4:
        fits = fits and mask.shape[1] == mask.shape[2] == 1
    if not fits or mask.dtype != torch.bool:
        raise UnsupportedAttentionError(
            f"{path}: attention mask {tuple(mask.shape)} of {mask.dtype}: under sequence parallelism a mask is bool "
            f"and says which keys may be attended, shape ({batch}, 1, 1, {tokens}) on this rank"
        )
    return mask.reshape(mask.shape[0], tokens).expand(batch, tokens)


def _require_replicated_keys(forward: ShardedForward, path: str, key: torch.Tensor, value: torch.Tensor) -> None:
    """Raise where keys that are attended to without an exchange differ between the ranks; compare once per shape.

    Equal lengths would be no evidence: shards of a stream that divides evenly have equal lengths too. The numbers are
    compared here and not by ``require_equal``, because ranks with other kernels or devices may round differently.
    """

    def compare() -> bool:
        sums = [key.double().sum(), value.double().sum(), key.double().abs().sum(), value.double().abs().sum()]
        own = [key.shape[1], *torch.stack(sums).cpu().view(torch.int64).tolist()]
        lengths, *bits = zip(*gather_ints(own, forward.mesh.sequence), strict=True)
        sums_by_rank = torch.tensor(bits).view(torch.float64)
        differences = (sums_by_rank - sums_by_rank[:, :1]).abs()[:2]
        if len(set(lengths)) > 1 or bool((differences > 1e-3 * sums_by_rank[2:, :1]).any()):
            raise ShardingError(
                f"{path} attends to keys that differ between the ranks (tokens {list(lengths)}) without passing "
                "through the core: its keys are cut, so take it out of the plan's replicated_keys, or let the model "
                "pass parallel_config on"
            )
        return True

    forward.get_or_exchange(forward.call_site("replicated keys", path), compare)
