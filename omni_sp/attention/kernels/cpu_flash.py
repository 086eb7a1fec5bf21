"""torch's flash kernel for the CPU, which also gives the log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

from omni_sp.attention.kernels.base import Capabilities, Kernel, additive_mask

_HALF = frozenset({torch.bfloat16, torch.float16})
_DEVICES, _DTYPES = frozenset({"cpu"}), _HALF | {torch.float32, torch.float64}


def _run(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    if query.dtype in _HALF:
        # The kernel reads keys and values once for every block of queries. In 16 bit it is about a tenth faster, the
        # copy included, where the tokens of a head are contiguous; in fp32 that makes no difference.
        key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value))
    mask = None
    if key_mask is not None:
        # The kernel takes no mask beside its causal flag, so the mask says both.
        mask, is_causal = additive_mask(key_mask, is_causal, query.shape[1], key), False
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), 0.0, is_causal, attn_mask=mask, scale=scale
    )
    return out.transpose(1, 2), lse


CPU_FLASH = Kernel(
    "cpu_flash",
    Capabilities(_DEVICES, _DTYPES, key_mask=True, causal=True, causal_with_mask=True, gqa=True, max_head_dim=1024),
    _run,
)
