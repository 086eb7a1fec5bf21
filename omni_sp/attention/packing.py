"""Key masks in messages: one byte a token, behind the keys and values that the same message carries."""

from __future__ import annotations

import torch
from torch import Tensor


def mask_elements(num_bytes: int, dtype: torch.dtype) -> int:
    """The number of elements of ``dtype`` that hold a mask of so many bytes."""
    return -(-num_bytes // dtype.itemsize)


def pack_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch, tokens) bool -> flat tensor of ``dtype`` whose bytes are the mask, token-major. It is only ever moved."""
    flat = torch.zeros(mask_elements(mask.numel(), dtype) * dtype.itemsize, dtype=torch.uint8, device=mask.device)
    flat[: mask.numel()] = mask.transpose(0, 1).reshape(-1)
    return flat.view(dtype)


def unpack_mask(packed: Tensor, tokens: int, batch: int) -> Tensor:
    """The inverse of `pack_mask`: (batch, tokens) bool."""
    return packed.view(torch.uint8)[: tokens * batch].view(tokens, batch).transpose(0, 1).to(torch.bool)
