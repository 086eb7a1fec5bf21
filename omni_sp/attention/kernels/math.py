"""Attention written out in plain torch: slow, on every device and for every shape. The reference for the others.

Shape suffixes: B batch, H heads, L query tokens, S key tokens, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omni_sp.attention.kernels.base import Capabilities, Kernel, additive_mask

_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})
_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_MAX_SCORES = 1 << 26
"""At most this many scores are in memory at a time (256 MiB in fp32): queries are taken in portions."""


def _run(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    q_BHLD, k_BHSD, v_BHSD = (x.transpose(1, 2).to(exact) for x in (query, key, value))
    batch, heads, num_queries, _ = q_BHLD.shape
    mask = None
    if key_mask is not None or is_causal:
        mask = additive_mask(key_mask, is_causal, num_queries, key).to(exact)
    out_BHLD = torch.empty_like(q_BHLD)
    lse_BHL = q_BHLD.new_empty(batch, heads, num_queries)
    portion = max(1, _MAX_SCORES // (batch * heads * k_BHSD.shape[2]))
    for start in range(0, num_queries, portion):
        chosen = slice(start, start + portion)
        scores_BHLS = (q_BHLD[:, :, chosen] @ k_BHSD.mT).mul_(scale)
        if mask is not None:
            scores_BHLS += mask[:, :, chosen] if mask.shape[2] > 1 else mask
        lse_BHL[:, :, chosen] = scores_BHLS.logsumexp(dim=-1)
        out_BHLD[:, :, chosen] = scores_BHLS.softmax(dim=-1) @ v_BHSD
    return out_BHLD.transpose(1, 2).to(query.dtype), lse_BHL


MATH = Kernel(
    "math",
    Capabilities(_DEVICES, _DTYPES, key_mask=True, causal=True, causal_with_mask=True, max_head_dim=1 << 16),
    _run,
)
