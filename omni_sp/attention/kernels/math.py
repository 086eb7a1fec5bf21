"""Attention written out in plain torch: slow, on every device and for every shape. The reference for the others."""

from __future__ import annotations

import torch

from omni_sp.attention.kernels.base import Capabilities, Kernel, additive_mask

_MAX_SCORES = 1 << 26
"""Scores held at a time (256 MiB in fp32); queries are taken in portions below it."""


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v = (x.transpose(1, 2).to(exact) for x in (query, key, value))
    batch, heads, num_queries, _ = q.shape
    mask = None
    if key_mask is not None or is_causal:
        mask = additive_mask(key_mask, is_causal, num_queries, key).to(exact)
    out = torch.empty_like(q)
    lse = q.new_empty(batch, heads, num_queries)
    portion = max(1, _MAX_SCORES // (batch * heads * k.shape[2]))
    for start in range(0, num_queries, portion):
        rows = slice(start, start + portion)
        scores = (q[:, :, rows] @ k.mT).mul_(scale)
        if mask is not None:
            scores += mask[:, :, rows] if mask.shape[2] > 1 else mask
        lse[:, :, rows] = scores.logsumexp(dim=-1)
        out[:, :, rows] = scores.softmax(dim=-1) @ v
    return out.transpose(1, 2).to(query.dtype), lse


MATH = Kernel(
    "math",
    Capabilities(
        devices=frozenset({"cpu", "cuda", "mps", "xpu"}),
        dtypes=frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16}),
        key_mask=True,
        causal=True,
        causal_with_mask=True,
        max_head_dim=1 << 16,
    ),
    _run,
)
