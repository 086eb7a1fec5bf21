"""Routing a model's attention to the core, through diffusers' own registry of attention backends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from omni_sp.sharding.diffusers_internals import attention_backends, flex_attention_key, register_attention_backend
from omni_sp.sharding.tracked import TokenTensor, tracked_attention

BACKEND = "omni_sp"


def backend_key() -> Any:
    """Our key in diffusers' registry, which is registered on first use."""
    return register_attention_backend(BACKEND, _attention)


@contextmanager
def tracking_flex_attention() -> Iterator[None]:
    """Let diffusers' flex backend, which some models select by its name, take sharded tensors for a while."""
    backends, flex = attention_backends(), flex_attention_key()
    if flex is None:
        yield
        return
    original = backends[flex]

    @wraps(original)
    def attend(query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any) -> Any:
        if not any(isinstance(x, TokenTensor) for x in (query, key, value)):
            return original(query, key, value, attn_mask, **options)
        taken = {name: options[name] for name in ("is_causal", "scale", "enable_gqa") if name in options}
        return tracked_attention(query, key, value, attn_mask, **taken)

    backends[flex] = attend
    try:
        yield
    finally:
        backends[flex] = original


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
    """What diffusers' dispatcher calls: (batch, tokens, heads, head_dim) in and out."""
    out: torch.Tensor = tracked_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return out
