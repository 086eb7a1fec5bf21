"""What a kernel is, and the one way to call one: every degenerate case is settled here, before a kernel sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Capabilities:
    """What a kernel can serve.

    Attributes:
        devices: device types. dtypes: of query, key and value alike.
        key_mask: takes a mask over keys. causal: takes causal attention. causal_with_mask: both at once.
        gqa: takes fewer key/value heads than query heads, in equal runs.
        max_head_dim, head_dim_multiple: which head sizes.
    """

    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]
    key_mask: bool = False
    causal: bool = False
    causal_with_mask: bool = False
    gqa: bool = False
    max_head_dim: int = 256
    head_dim_multiple: int = 1


@dataclass(frozen=True)
class KernelCall:
    """What a call asks of a kernel, for choosing one."""

    device: str
    dtype: torch.dtype
    head_dim: int
    key_mask: bool
    causal: bool


Run = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, bool, float], tuple[torch.Tensor, torch.Tensor]
]


@dataclass(frozen=True)
class Kernel:
    """One attention kernel.

    Attributes:
        name: what users choose it by.
        capabilities: what it can serve; it is never asked for more.
        run: ``run(query, key, value, key_mask, is_causal, scale) -> (out, lse)``, computing
            softmax(query · keyᵀ · scale) · value. query is (batch, q_tokens, heads, head_dim), key and value
            (batch, kv_tokens, kv_heads, head_dim), none of them empty, last dim contiguous; key_mask (batch, kv_tokens)
            bool, True = attend, or None. ``out`` is shaped like query; ``lse`` is the natural log-sum-exp
            (batch, heads, q_tokens) in fp32 (fp64 for fp64). What they hold for rows that no key may attend does not
            matter: ``attend`` overrides it.
        lossy: it approximates. Such a kernel runs where it is named, never by "auto".
        modules: of packages that are no part of an installation; it needs one of them. install: how to come by it.
    """

    name: str
    capabilities: Capabilities
    run: Run
    lossy: bool = False
    modules: tuple[str, ...] = ()
    install: str = ""


def unsupported_reason(kernel: Kernel, call: KernelCall) -> str | None:
    """Why ``kernel`` cannot serve ``call``; None where it can."""
    can = kernel.capabilities
    if call.device not in can.devices:
        return f"runs on {_names(can.devices)}, not on {call.device}"
    if call.dtype not in can.dtypes:
        return f"takes {_names(can.dtypes)}, not {call.dtype}"
    if call.head_dim > can.max_head_dim or call.head_dim % can.head_dim_multiple:
        return f"takes head_dim up to {can.max_head_dim} in multiples of {can.head_dim_multiple}, not {call.head_dim}"
    if call.key_mask and not can.key_mask:
        return "takes no key mask"
    if call.causal and not can.causal:
        return "is not causal"
    if call.causal and call.key_mask and not can.causal_with_mask:
        return "takes no key mask together with causal"
    return None


def _names(things: frozenset[str] | frozenset[torch.dtype]) -> str:
    return ", ".join(sorted(str(thing) for thing in things))


def attend(
    kernel: Kernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    key_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float,
    key_of_query: tuple[int, ...] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one kernel on one device's tensors, any of which may be empty.

    Args:
        query: (batch, q_tokens, heads, head_dim). key, value: (batch, kv_tokens, kv_heads, head_dim).
        key_mask: (batch, kv_tokens), True = attend. key_of_query: for each query head its key/value head, where they
            do not form equal runs.

    Returns:
        Output (batch, q_tokens, heads, head_dim) and LSE (batch, heads, q_tokens); a row without a key has output 0
        and LSE -inf.
    """
    batch, num_queries, heads, head_dim = query.shape
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if query.numel() == 0 or key.shape[1] == 0:
        # Kernels are not asked: torch's CPU kernel kills the process on empty keys or queries.
        lse = torch.full((batch, heads, num_queries), -torch.inf, dtype=lse_dtype, device=query.device)
        return query.new_zeros(batch, num_queries, heads, head_dim), lse
    if key_of_query is not None:
        index = torch.tensor(key_of_query, device=key.device)
        key, value = key.index_select(2, index), value.index_select(2, index)
    elif key.shape[2] != heads and not kernel.capabilities.gqa:
        repeats = heads // key.shape[2]
        key, value = key.repeat_interleave(repeats, dim=2), value.repeat_interleave(repeats, dim=2)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out, lse = kernel.run(query, key, value, key_mask, is_causal, scale)
    if key_mask is not None:
        # Kernels disagree about rows without a key (0, nan, an average of everything): settle it.
        if is_causal:
            without_keys = key_mask.cumsum(dim=1)[:, :num_queries] == 0
        else:
            without_keys = ~key_mask.any(dim=1, keepdim=True)
        out = out.masked_fill(without_keys[:, :, None, None], 0)
        lse = lse.masked_fill(without_keys[:, None, :], -torch.inf)
    return out, lse


def additive_mask(key_mask: torch.Tensor | None, is_causal: bool, num_queries: int, like: torch.Tensor) -> torch.Tensor:
    """0 where a query may attend a key, -inf elsewhere.

    Args:
        like: the key, whose dtype and number of tokens the mask takes.

    Returns:
        (batch or 1, 1, q_tokens or 1, kv_tokens).
    """
    num_keys = like.shape[1]
    allowed = torch.ones(1, 1, 1, num_keys, dtype=torch.bool, device=like.device)
    if is_causal:
        allowed = torch.ones(num_queries, num_keys, dtype=torch.bool, device=like.device).tril()[None, None]
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None, :]
    return torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill_(~allowed, -torch.inf)
