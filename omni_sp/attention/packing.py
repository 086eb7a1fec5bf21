"""Masks on the wire: one byte a token, riding in the same message as the tokens' numbers."""

from __future__ import annotations

import torch


def mask_elements(num_bytes: int, dtype: torch.dtype) -> int:
    """Elements of ``dtype`` that hold so many bytes."""
    return -(-num_bytes // dtype.itemsize)


def pack_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(batch, tokens) bool -> flat tensor of ``dtype`` whose bytes are the mask, token-major. Only ever moved."""
    flat = torch.zeros(mask_elements(mask.numel(), dtype) * dtype.itemsize, dtype=torch.uint8, device=mask.device)
    flat[: mask.numel()] = mask.transpose(0, 1).reshape(-1)
    return flat.view(dtype)


def unpack_mask(packed: torch.Tensor, tokens: int, batch: int) -> torch.Tensor:
    """The inverse of :func:`pack_mask`: (batch, tokens) bool."""
    return packed.view(torch.uint8)[: tokens * batch].view(tokens, batch).transpose(0, 1).to(torch.bool)
