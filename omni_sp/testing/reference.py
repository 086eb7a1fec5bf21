"""References that parallel results are compared with, and weights that hide no error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    q, k, v = (x.double().transpose(1, 2) for x in (query, key, value))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if key_mask is not None:
        allowed &= key_mask[:, None, None, :]
    if is_causal:
        allowed &= torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)
    return (weights @ v).transpose(1, 2)


def split_tokens(tensor: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Split dim 1 into the shards of ranks that hold so many tokens each."""
    return list(tensor.split(list(lengths), dim=1))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Compute |actual - expected| / |expected| in float64, with Euclidean norms over all elements."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-30))


def randomise(model: Any, seed: int = 0) -> Any:
    """Draw all weights of a module at random, the same in every process.

    Layers that start at zero, as the last ones of many diffusion transformers do, would hide every error behind them.

    Args:
        model: a module, which is changed in place.
        seed: other seeds give other weights.

    Returns:
        The module, in evaluation mode.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                # Norm weights around 1, biases around 0; nothing of the unseeded initialisation stays.
                parameter.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
    return model.eval()
