"""torch's own CUDA kernels that also give the log-sum-exp: flash, cuDNN, and the memory-efficient one."""

from __future__ import annotations

import torch
from torch import Tensor

from omni_sp.attention.kernels.base import Capabilities, Kernel, additive_mask

_CUDA = frozenset({"cuda"})
_HALF = frozenset({torch.bfloat16, torch.float16})


def _flash(
    query: Tensor, key: Tensor, value: Tensor, _no_mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), 0.0, is_causal, False, scale=scale
    )
    return out.transpose(1, 2), lse


def _cudnn(
    query: Tensor, key: Tensor, value: Tensor, _no_mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    if key.shape[1] == 1:
        # Torch's own dispatcher keeps single keys from cuDNN, which does not take them.
        return _flash(query, key, value, None, is_causal, scale)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(x.transpose(1, 2) for x in (query, key, value)), None, True, 0.0, is_causal, False, scale=scale
    )
    # The kernel's LSE has a last dim of 1 behind the tokens.
    return out.transpose(1, 2), lse.reshape(query.shape[0], query.shape[2], query.shape[1])


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    bias = None
    if key_mask is not None:
        bias, is_causal = _bias(key_mask, is_causal, query, key), False
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), bias, True, 0.0, is_causal, scale=scale
    )
    # The kernel pads its LSE to whole tiles of queries.
    return out.transpose(1, 2), lse[:, :, : query.shape[1]]


def _bias(key_mask: Tensor, is_causal: bool, query: Tensor, key: Tensor) -> Tensor:
    """The additive mask, whose stride between queries is a multiple of 8 elements: the kernel's loads demand it."""
    mask = additive_mask(key_mask, is_causal, query.shape[1], key)
    num_keys = mask.shape[-1]
    padded = mask.new_zeros((*mask.shape[:-1], -(-num_keys // 8) * 8))
    padded[..., :num_keys] = mask
    return padded[..., :num_keys].expand(query.shape[0], query.shape[2], query.shape[1], num_keys)


CUDA_FLASH = Kernel("cuda_flash", Capabilities(_CUDA, _HALF, causal=True, head_dim_multiple=8), _flash)
CUDA_CUDNN = Kernel(
    "cuda_cudnn", Capabilities(_CUDA, _HALF, causal=True, max_head_dim=128, head_dim_multiple=8), _cudnn
)
CUDA_EFFICIENT = Kernel(
    "cuda_efficient",
    Capabilities(
        _CUDA, _HALF | {torch.float32}, key_mask=True, causal=True, causal_with_mask=True, head_dim_multiple=8
    ),
    _efficient,
)
