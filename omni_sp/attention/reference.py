"""Attention in float64, which what kernels and ranks compute is compared with."""

from __future__ import annotations

import torch


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    key_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Compute softmax(q·kᵀ·scale)·v over the whole sequence in float64.

    Args:
        query: (batch, q_tokens, heads, head_dim).
        key: (batch, kv_tokens, kv_heads, head_dim), where kv_heads divides heads.
        value: (batch, kv_tokens, kv_heads, head_dim).
        key_mask: (batch, kv_tokens), True for keys that may be attended; None for all.
        is_causal: query i attends to keys 0 to i only.
        scale: a factor for the scores; None for 1/√head_dim.

    Returns:
        (batch, q_tokens, heads, head_dim) in float64; a query that no key may attend gets 0.
    """
    weights = _scores(query, key, key_mask, is_causal, scale).softmax(-1).nan_to_num(0.0)
    groups = query.shape[2] // value.shape[2]
    return (weights @ value.double().transpose(1, 2).repeat_interleave(groups, 1)).transpose(1, 2)


def log_sum_exp(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    key_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Compute the natural log-sum-exp of the scores in float64.

    Args:
        query: (batch, q_tokens, heads, head_dim).
        key: (batch, kv_tokens, kv_heads, head_dim), where kv_heads divides heads.
        key_mask: (batch, kv_tokens), True for keys that may be attended; None for all.
        is_causal: query i attends to keys 0 to i only.
        scale: a factor for the scores; None for 1/√head_dim.

    Returns:
        (batch, heads, q_tokens) in float64; -inf for a query that no key may attend.
    """
    return _scores(query, key, key_mask, is_causal, scale).logsumexp(-1)


def _scores(
    query: torch.Tensor, key: torch.Tensor, key_mask: torch.Tensor | None, is_causal: bool, scale: float | None
) -> torch.Tensor:
    """Scores (batch, heads, q_tokens, kv_tokens) in float64, -inf where a query may not attend a key."""
    q, k = (x.double().transpose(1, 2) for x in (query, key))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    if is_causal:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~causal, -torch.inf)
    return scores


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Compute |actual - expected| / |expected| in float64, with Euclidean norms over all elements."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-30))
