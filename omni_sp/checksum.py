"""Checksums of values that ranks compare."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import reduce

import torch


def checksum(value: object, before: int = 0) -> int:
    """A checksum of a value, and of what was before it. Tensors, arrays and pictures count by their content."""
    if isinstance(value, torch.Tensor):
        content = value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        return zlib.crc32(content.tobytes(), checksum((tuple(value.shape), str(value.dtype)), before))
    if isinstance(value, (list, tuple)):
        return reduce(lambda sum_, item: checksum(item, sum_), value, checksum(len(value), before))
    if isinstance(value, Mapping):
        return checksum(sorted(((str(key), item) for key, item in value.items()), key=lambda pair: pair[0]), before)
    if hasattr(value, "tobytes"):  # an array or a PIL image
        described = [getattr(value, name, None) for name in ("shape", "dtype", "mode", "size")]
        return zlib.crc32(value.tobytes(), zlib.crc32(repr(described).encode(), before))
    return zlib.crc32(repr(value).encode(), before)
