"""Token vectors, which is what messages consist of: a token's heads of several tensors side by side, then its mask.

Vectors lie token-major, (tokens, batch, width). So tensors are packed by one permuted copy, whatever is received from
several ranks lies one behind the other, and the tensors that it holds are views of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omni_sp.attention.layout import HeadRun

PARTS_DIM = 3
"""The dim along which the parts of vectors are concatenated."""
_MASK_BYTES = 16
"""A mask takes so many bytes of a vector, though it is one bit: kernels on CUDA load 16 aligned bytes at a time."""


def mask_elements(mask: Tensor | None, dtype: torch.dtype) -> int:
    """The number of elements of ``dtype`` that a mask takes in a vector."""
    return 0 if mask is None else _MASK_BYTES // dtype.itemsize


def pack(tensors: Sequence[Tensor], run: HeadRun, mask: Tensor | None) -> list[Tensor]:
    """What each rank of a run gets, in parts: concatenated along ``PARTS_DIM`` they are the ranks' vectors.

    Args:
        tensors: (batch, tokens, heads, head_dim), of the same tokens.
        run: the ranks, and which heads of each tensor they get.
        mask: (batch, tokens) bool of the same tokens.

    Returns:
        Views (ranks, tokens, batch, some of the width), or (ranks, tokens, batch, heads, head_dim) where a token's
        heads do not lie side by side.
    """
    batch, tokens, _, head_dim = tensors[0].shape
    are_rows = all(tensor.stride()[2:] == (head_dim, 1) for tensor in tensors)
    if mask is not None and not are_rows:
        tensors, are_rows = [tensor.contiguous() for tensor in tensors], True
    parts = []
    for tensor, (start, step, count) in zip(tensors, run.heads, strict=True):
        of_batch, of_token, of_head, of_element = tensor.stride()
        inner_size, inner_stride = (
            ((count * head_dim,), (1,)) if are_rows else ((count, head_dim), (of_head, of_element))
        )
        size, stride = (run.num_ranks, tokens, batch, *inner_size), (step * of_head, of_token, of_batch, *inner_stride)
        parts.append(tensor.as_strided(size, stride, tensor.storage_offset() + start * of_head))
    if mask is not None:
        numbers = mask.to(tensors[0].dtype)
        of_batch, of_token = numbers.stride()
        size = (run.num_ranks, tokens, batch, mask_elements(mask, numbers.dtype))
        parts.append(numbers.as_strided(size, (0, of_token, of_batch, 0)))
    return parts


def unpack(
    vectors: Tensor, tokens: int, batch: int, counts: Sequence[int], head_dim: int, mask_width: int
) -> tuple[list[Tensor], Tensor | None]:
    """The tensors that vectors hold, as views (batch, tokens, heads, head_dim), and their mask (batch, tokens).

    Args:
        vectors: flat and contiguous.
        tokens: number of tokens.
        batch: the batch size.
        counts: number of heads of each tensor.
        head_dim: of all tensors.
        mask_width: as `mask_elements` gives it; 0 where there is no mask.
    """
    width = sum(counts) * head_dim + mask_width
    start, tensors = vectors.storage_offset(), []
    for count in counts:
        size, stride = (batch, tokens, count, head_dim), (width, batch * width, head_dim, 1)
        tensors.append(vectors.as_strided(size, stride, start))
        start += count * head_dim
    if not mask_width:
        return tensors, None
    return tensors, vectors.as_strided((batch, tokens), (width, batch * width), start) != 0
